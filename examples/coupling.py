r"""A model and its posterior are two factorisations of one coupling, and training makes them agree.

    python examples/coupling.py

The encoder with the data, and the decoder with the prior, are two joint distributions of x and z,

    n_f(x, z) = p_data(x) q(z|x),        n_g(x, z) = p(z) p(x|z),

and the loss of a VAE is their divergence, up to the entropy H of the data, which nothing learned changes:

    KL(n_f‖n_g) = E_{p_data}[−ELBO(x)] − H[p_data].

With q(z|x) = N(f(x), σ_f²), p(x|z) = N(g(z), σ_g²), p(z) = N(0, 1) and both σ fixed, this is a regularised autoencoder:

    E[−ELBO] = E[ |x − g(f(x) + σ_f ε)|² / 2σ_g² + f(x)² / 2 ] + const,    ε ~ N(0, 1),
    const = (σ_f² − 1 − log σ_f²) / 2 + log(2π σ_g²) / 2.

Here f and g are linear and p_data is a Normal, so that both joints are Normal and the divergence has a closed form. At
KL = 0 they are the same: the decoder generates p_data, and the encoder is its exact posterior, which for linear g and
p_data of variance v needs σ_f² = σ_g² / v. Any other σ_f leaves a gap that no f and g close.

Kingma & Welling (2019), *An Introduction to Variational Autoencoders*, section 2.7.
"""

from __future__ import annotations

from math import e, log, pi

import pyro
import torch
from matplotlib import pyplot as plt
from script import parse_options, save
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

from pyro_vae import VAE, draw_particles, fit
from pyro_vae.distributions import ConditionalNormal, StandardNormal
from pyro_vae.networks import MLP

MEAN, VARIANCE = 1.0, 2.0  # of p_data
SCALE_G = 0.6  # σ_g
EXACT_SCALE_F = SCALE_G / VARIANCE**0.5
ENTROPY = 0.5 * log(2 * pi * e * VARIANCE)


def main() -> None:
    options = parse_options(__doc__)
    num_rows, num_epochs = (5_000, 3) if options.quick else (50_000, 30)
    x = MEAN + VARIANCE**0.5 * torch.randn(num_rows, 1)
    print(f"{'':<36}{'KL(n_f‖n_g)':>13}{'E[−ELBO] − H':>20}{'autoencoder − H':>20}")
    figure, axes = plt.subplots(2, 2, figsize=(9, 7.5), sharex=True, sharey=True)
    pictures = []
    for name, scale_f in (("exact σ_f", EXACT_SCALE_F), ("σ_f twice as large", 2 * EXACT_SCALE_F)):
        pyro.set_rng_seed(options.seed)
        vae = VAE(
            StandardNormal(1),
            ConditionalNormal(MLP(1, []), 1, scale=SCALE_G),
            ConditionalNormal(MLP(1, []), 1, scale=scale_f),
            name=name,
        )
        for when in ("before training", "after training"):
            if when == "after training":
                fit(
                    vae.model,
                    vae.guide,
                    x,
                    num_epochs=num_epochs,
                    batch_size=500,
                    learning_rate=1e-2,
                    scheduler=lambda optim: torch.optim.lr_scheduler.CosineAnnealingLR(optim, num_epochs),
                    seed=options.seed,
                )
            n_f, n_g = joints(vae, scale_f)
            exact = kl_divergence(n_f, n_g).item()
            with torch.no_grad():
                elbo = draw_particles(vae.model, vae.guide, x, num_particles=1).log_weight[0]
            estimates = [above_entropy(values) for values in (-elbo, loss(vae, x, scale_f))]
            print(f"{f'{name}, {when}':<36}{exact:>13.4f}{estimates[0]:>20}{estimates[1]:>20}")
            pictures.append((f"{name}, {when}\nKL = {exact:.4f}", n_f, n_g))
    for ax, (title, n_f, n_g) in zip(axes.flat, pictures, strict=True):
        draw_joints(ax, n_f, n_g)
        ax.set_title(title)
    figure.supxlabel("x")
    figure.supylabel("z")
    axes[0, 0].legend(frameon=False, loc="upper left")
    print(f"\nH[p_data] = {ENTROPY:.4f} nats. Both estimates: over the {num_rows} rows of data.")
    save(figure, options, "coupling")


@torch.no_grad()
def joints(vae: VAE, scale_f: float) -> tuple[MultivariateNormal, MultivariateNormal]:
    """n_f and n_g as Normals of (x, z), from the lines z = a x + b and x = w z + m."""
    (a, b), (w, m) = ((p.head.weight.item(), p.head.bias.item()) for p in (vae.posterior, vae.likelihood))
    covariance_f = [[VARIANCE, a * VARIANCE], [a * VARIANCE, a**2 * VARIANCE + scale_f**2]]
    covariance_g = [[w**2 + SCALE_G**2, w], [w, 1.0]]
    means = [MEAN, a * MEAN + b], [m, 0.0]
    n_f, n_g = (
        MultivariateNormal(torch.tensor(mean).double(), torch.tensor(covariance).double())
        for mean, covariance in zip(means, (covariance_f, covariance_g), strict=True)
    )
    return n_f, n_g


@torch.no_grad()
def loss(vae: VAE, x: Tensor, scale_f: float) -> Tensor:
    """The regularised autoencoder's loss of each row, with its constant."""
    code = vae.encode(x).mean
    reconstruction = vae.decode(code + scale_f * torch.randn_like(code)).mean
    constant = 0.5 * (scale_f**2 - 1 - log(scale_f**2)) + 0.5 * log(2 * pi * SCALE_G**2)
    return ((x - reconstruction) ** 2 / (2 * SCALE_G**2) + code**2 / 2 + constant).squeeze(-1)


def above_entropy(values: Tensor) -> str:
    """The mean minus the entropy of the data, and its standard error."""
    return f"{values.mean() - ENTROPY:.4f} ± {values.std() / len(values) ** 0.5:.4f}"


def draw_joints(ax: plt.Axes, n_f: MultivariateNormal, n_g: MultivariateNormal) -> None:
    """Both as ellipses of one and two standard deviations."""
    angle = torch.linspace(0, 2 * pi, 200).double()
    circle = torch.stack([angle.cos(), angle.sin()])
    lines = (n_f, "$n_f$: data, encoder", "C0", "-"), (n_g, "$n_g$: prior, decoder", "C1", "--")
    for joint, label, colour, style in lines:
        for radius in (1, 2):
            ellipse = joint.mean[:, None] + radius * joint.scale_tril @ circle
            ax.plot(*ellipse, style, color=colour, label=label if radius == 1 else None)


if __name__ == "__main__":
    main()
