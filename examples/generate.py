r"""New data, reconstructions and similar data, and their distributions.

    python examples/generate.py

    generate       z ~ p(z),      x ~ p(x|z)          reconstruct    z ~ q(z|x),     x' ~ p(x'|z)
    similar        z_1, … ~ q(z|x), x'_s ~ p(x'|z_s), several for each x

With `mean=True`, the last step gives E[x|z] instead of a draw, which looks better and varies less. For the linear VAE
with p(x|z) = N(W z + m, s² I), all moments are known. With C = (Wᵀ W / s² + I)⁻¹,

    generate: Cov(x) = W Wᵀ + s² I,  with mean=True W Wᵀ,        similar: Cov(x'|x) = W C Wᵀ + s² I,

The last equation is for the exact posterior. Under it, z | x has the marginal p(z), so that reconstructions of draws
from the model are again draws from the model. (The learned posterior is close to the exact one, and so are the
moments.) The moments of digits are not known; a picture shows them.

Kingma & Welling (2014), *Auto-Encoding Variational Bayes*.
"""

from __future__ import annotations

import pyro
import torch
from images import load_digits
from matplotlib import pyplot as plt
from script import parse_options, save
from torch import Tensor

from pyro_vae import VAE, fit
from pyro_vae.distributions import (
    ConditionalContinuousBernoulli,
    ConditionalMultivariateNormal,
    ConditionalNormal,
    LearnedScale,
    StandardNormal,
)
from pyro_vae.networks import MLP
from pyro_vae.plots import plot_images


def main() -> None:
    options = parse_options(__doc__)
    compare_moments(options.seed, *((5, 2_000) if options.quick else (100, 50_000)))
    data = load_digits()
    vae = VAE(
        StandardNormal(8),
        ConditionalContinuousBernoulli(MLP(8, [128]), (8, 8)),
        ConditionalMultivariateNormal(MLP((8, 8), [128]), 8),
        name="digits",
    )
    fit(
        vae.model,
        vae.guide,
        data.train,
        num_epochs=3 if options.quick else 100,
        batch_size=100,
        learning_rate=3e-3,
        seed=options.seed,
    )
    x = data.test[[int((data.test_classes == c).int().argmax()) for c in range(10)]]  # the first of each class
    figure, axes = plt.subplots(1, 2, figsize=(12, 3.4))
    similar = vae.similar(x, size=3, mean=True)
    rows = torch.stack([x, vae.reconstruct(x, mean=True), vae.reconstruct(x), *similar])
    labels = ["test image", "reconstruct, mean", "reconstruct", *["similar, mean"] * 3]
    plot_images(rows, row_labels=labels, ax=axes[0]).set_title("from test images")
    rows = torch.cat([vae.generate(30, mean=True), vae.generate(30)]).unflatten(0, (6, 10))
    plot_images(rows, row_labels=["generate, mean"] * 3 + ["generate"] * 3, ax=axes[1]).set_title("from the prior")
    save(figure, options, "generate")


def compare_moments(seed: int, num_epochs: int, size: int) -> None:
    """Compares draws of a linear VAE with its exact moments."""
    x = torch.randn(2000, 2) @ torch.randn(2, 4) + 0.7 * torch.randn(2000, 4) + 1.0
    pyro.set_rng_seed(seed)
    vae = VAE(
        StandardNormal(2),
        ConditionalNormal(MLP(2, []), 4, scale=LearnedScale()),
        ConditionalMultivariateNormal(MLP(4, []), 2),
        name="linear",
    )
    fit(
        vae.model,
        vae.guide,
        x,
        num_epochs=num_epochs,
        batch_size=250,
        learning_rate=2e-2,
        scheduler=lambda optim: torch.optim.lr_scheduler.CosineAnnealingLR(optim, num_epochs),
        seed=seed,
    )
    with torch.no_grad():
        w, m, s = vae.likelihood.head.weight, vae.likelihood.head.bias, vae.likelihood.scale()
        noise = s**2 * torch.eye(4)
        c = torch.linalg.inv(w.T @ w / s**2 + torch.eye(2))
        posterior_mean = c @ w.T @ (x[0] - m) / s**2
    new = vae.generate(size)
    print(f"linear VAE, {size} draws: largest deviation from exact moments, and in standard errors (se) of its entry\n")
    print(f"{'':<40}{'mean, 4 entries':>20}{'covariance, 10':>20}")
    compare("generate", new, m, w @ w.T + noise)
    compare("generate, mean=True", vae.generate(size, mean=True), m, w @ w.T)
    compare("reconstruct of generated data", vae.reconstruct(new), m, w @ w.T + noise)
    similar = vae.similar(x[:1], size=size)[:, 0]
    compare("similar to one x", similar, w @ posterior_mean + m, w @ c @ w.T + noise)
    compare("generate, against moments of the data", new, x.mean(0), x.T.cov(), len(x))
    print("Of 10 independent normal errors, the largest is below 3.3 se in 99 of 100 cases.")


@torch.no_grad()
def compare(name: str, draws: Tensor, mean: Tensor, covariance: Tensor, num_data: int | None = None) -> None:
    """Standard errors are those of Normal draws. Moments of data have their own standard errors too."""
    per_draw = 1 / len(draws) + (0 if num_data is None else 1 / num_data)
    variance = covariance.diagonal()
    gaps = (draws.mean(0) - mean).abs(), (draws.T.cov() - covariance).abs()
    errors = (variance * per_draw).sqrt(), ((covariance**2 + variance[:, None] * variance) * per_draw).sqrt()
    cells = [f"{gap.max():.4f} ({(gap / se).max():.1f} se)" for gap, se in zip(gaps, errors, strict=True)]
    print(f"{name:<40}{cells[0]:>20}{cells[1]:>20}")


if __name__ == "__main__":
    main()
