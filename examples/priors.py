r"""Four priors for one VAE: the best prior is the aggregated posterior.

The KL term of the ELBO, averaged over the data, splits into two (Hoffman & Johnson 2016, *ELBO surgery*),

    1/N Σ_n KL(q(z|x_n) ‖ p(z)) = I_q(n; z) + KL(q(z) ‖ p(z)),     q(z) = 1/N Σ_n q(z|x_n),

and only the second depends on the prior. It vanishes if p(z) is the aggregated posterior q(z). A standard Normal makes
the encoder fill a disc; a learned prior can go where the codes are. Both terms are estimated over the training images,
from draws of the trained encoder.

The script compares N(0, I), a mixture of Normals, a mixture of posteriors q(z|u_k) at learned pseudo-inputs u_k
(VampPrior), and a flow of splines. All have the same encoder and decoder, on binary 8 × 8 digits with a two-dimensional
z. In such a small example a learned prior need not win: the decoder can also warp the plane to fit N(0, I), and 1300
images are few to learn a prior from. The picture shows the difference: where the codes lie, and how closely the prior
follows them.

    python examples/priors.py

Tomczak & Welling (2018), *VAE with a VampPrior*.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
from images import load_digits
from matplotlib import pyplot as plt
from script import parse_options, save
from torch import Tensor
from zuko.flows import NSF

from pyro_vae import VAE, fit, importance_sampling
from pyro_vae.distributions import (
    ConditionalBernoulli,
    ConditionalNormal,
    GaussianMixture,
    StandardNormal,
    VampPrior,
    condition,
)
from pyro_vae.networks import MLP


def build_vae(make_prior: Callable[[Any], Any], name: str) -> VAE:
    posterior = ConditionalNormal(MLP((8, 8), [128]), 2)
    likelihood = ConditionalBernoulli(MLP(2, [128, 128]), (8, 8))
    return VAE(make_prior(posterior), likelihood, posterior, name=name)


def main() -> None:
    options = parse_options(__doc__)
    digits = load_digits()
    train, test = (torch.bernoulli(x) for x in (digits.train, digits.test))
    x, validation = train[:1300], train[1300:]
    start = x[torch.randperm(len(x))[:50]]  # pseudo-inputs start as images
    priors: dict[str, Callable[[Any], Any]] = {
        "standard Normal": lambda _: StandardNormal(2),
        "mixture of 20 Normals": lambda _: GaussianMixture(20, 2),
        "VampPrior, 50 inputs": lambda posterior: VampPrior(posterior, start, limits=(0.0, 1.0)),
        "flow of 2 splines": lambda _: NSF(2, bins=8, transforms=2, hidden_features=[32]),
    }
    num_epochs, num_particles = (2, 50) if options.quick else (50, 300)
    vaes = {}
    print(f"{len(test)} test images, {num_particles} particles; nats per image")
    print(f"{'prior':<22} {'log p(x)':>15} {'I_q(n; z)':>14} {'KL(q(z)‖p(z))':>15} {'epochs':>7}")
    for name, make_prior in priors.items():
        torch.manual_seed(options.seed)  # the same encoder and decoder to start with
        vae = vaes[name] = build_vae(make_prior, name)
        settings = {"num_epochs": num_epochs, "learning_rate": 3e-3, "validation_data": validation, "patience": 20}
        result = fit(vae.model, vae.guide, x, seed=options.seed, **settings)
        evidence = importance_sampling(
            vae.model, vae.guide, test, num_particles=num_particles, compile=False, progress=False
        )
        log_p, error, _ = evidence.mean
        cells = [f"{v.mean():.3f} ± {v.std() / len(v) ** 0.5:.3f}" for v in surgery(vae, x)]
        print(f"{name:<22} {f'{log_p:.2f} ± {error:.2f}':>15} {cells[0]:>14} {cells[1]:>15} {len(result.loss):>7}")
    print("± of log p(x): over the images; of the two terms of the KL: over one draw of z for each training image")
    print("KL(q(z)‖p(z)) is all that a better prior could save the same encoder")
    draw_figure(vaes, test, digits.test_classes, options)


@torch.no_grad()
def surgery(vae: VAE, x: Tensor) -> tuple[Tensor, Tensor]:
    """log q(z|x_n) / q(z) and log q(z) / p(z) at a draw from each q(z|x_n). Their means are I_q and KL(q(z)‖p(z))."""
    q = vae.encode(x)
    z = q.sample()
    aggregated = q.log_prob(z[:, None]).logsumexp(1) - math.log(len(x))
    return q.log_prob(z) - aggregated, aggregated - condition(vae.prior).log_prob(z)


def draw_figure(vaes: dict[str, VAE], test: Tensor, classes: Tensor, options: Namespace) -> None:
    """Draws the density of the prior as shades, and z ~ q(z|x) of each test image in the colour of its class."""
    figure, axes = plt.subplots(1, len(vaes), figsize=(14, 3.9))
    for ax, (name, vae) in zip(axes, vaes.items(), strict=True):
        z = vae.encode(test).sample()
        centre, reach = z.mean(0), 1.1 * (z - z.mean(0)).abs().amax()
        steps = torch.linspace(-1, 1, 150) * reach
        grid = torch.stack(torch.meshgrid(centre[0] + steps, centre[1] + steps, indexing="xy"), -1)
        with torch.no_grad():
            density = condition(vae.prior).log_prob(grid.reshape(-1, 2)).exp().reshape(150, 150)
        ax.contourf(*grid.unbind(-1), density.sqrt(), levels=12, cmap="Greys", alpha=0.7)
        points = ax.scatter(*z.T, c=classes, cmap="tab10", vmin=-0.5, vmax=9.5, s=6)
        ax.set(title=name, xlabel="$z_1$", aspect="equal")
    axes[0].set_ylabel("$z_2$")
    figure.colorbar(points, ax=axes, label="digit", ticks=range(10), shrink=0.8)
    figure.suptitle("prior p(z) (shades) and one draw of z ~ q(z|x) for each test image (points)")
    save(figure, options, "priors")


if __name__ == "__main__":
    main()
