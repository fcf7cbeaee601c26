r"""A model and its posterior are two factorisations of one coupling of x and z, and training makes them agree.

    python examples/coupling.py

The encoder with the data, and the decoder with the prior, each make a joint distribution of x and z,

    n_f(x, z) = p_data(x) q(z|x),        n_g(x, z) = p(z) p(x|z),

and the loss of a VAE is their divergence, up to the entropy H of the data, which training does not change:

    KL(n_f‖n_g) = E_{p_data}[−ELBO(x)] − H[p_data].

With q(z|x) = N(f(x), σ_f²), p(x|z) = N(g(z), σ_g²), p(z) = N(0, 1) and both σ fixed, this is a regularised autoencoder:

    E[−ELBO] = E[ |x − g(f(x) + σ_f ε)|² / 2σ_g² + f(x)² / 2 ] + const,    ε ~ N(0, 1),
    const = (σ_f² − 1 − log σ_f²) / 2 + log(2π σ_g²) / 2.

Here f and g are linear and p_data is Normal, so that both joint distributions are Normal and the divergence has a
closed form. At KL = 0 they are the same: the decoder generates p_data, and the encoder is its exact posterior. For
linear g and p_data of variance v, this requires σ_f² = σ_g² / v. Any other σ_f leaves a gap that no f and g can close.

Kingma & Welling (2019), *An Introduction to Variational Autoencoders*, section 2.7.
"""

from __future__ import annotations

from functools import partial
from math import e, log, pi

import pyro
import torch
from matplotlib import pyplot as plt
from script import parse_options, save
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence
from torch.optim.lr_scheduler import ExponentialLR

from pyro_vae import VAE, draw_particles, fit
from pyro_vae.distributions import ConditionalNormal, StandardNormal
from pyro_vae.networks import MLP

MEAN, VARIANCE = 1.0, 2.0  # of p_data
SCALE_G = 0.6  # σ_g
EXACT = SCALE_G / VARIANCE**0.5  # σ_f of the exact posterior
ENTROPY = 0.5 * log(2 * pi * e * VARIANCE)


def main() -> None:
    options = parse_options(__doc__)
    num_rows, num_epochs = (5_000, 3) if options.quick else (50_000, 30)
    x = MEAN + VARIANCE**0.5 * torch.randn(num_rows, 1)
    print(f"{'nats':<28}{'KL(n_f‖n_g)':>13}{'E[−ELBO] − H':>19}{'autoencoder − H':>19}")
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.9), sharex=True, sharey=True)
    cases = (
        ("before training", EXACT, 0),
        ("trained", EXACT, num_epochs),
        ("trained, σ_f doubled", 2 * EXACT, num_epochs),
    )
    for ax, (name, scale_f, epochs) in zip(axes, cases, strict=True):
        pyro.set_rng_seed(options.seed)
        likelihood = ConditionalNormal(MLP(1, []), 1, scale=SCALE_G)
        vae = VAE(StandardNormal(1), likelihood, ConditionalNormal(MLP(1, []), 1, scale=scale_f), name=name)
        if epochs:
            settings = {"num_epochs": epochs, "batch_size": 500, "learning_rate": 1e-2, "seed": options.seed}
            fit(vae.model, vae.guide, x, scheduler=partial(ExponentialLR, gamma=0.85), **settings)
        with torch.no_grad():
            n_f, n_g = joints(vae, scale_f)
            exact = kl_divergence(n_f, n_g).item()
            losses = -draw_particles(vae.model, vae.guide, x, num_particles=1).log_weight[0], loss(vae, x, scale_f)
        # mean and standard error over the rows
        estimates = [f"{v.mean() - ENTROPY:.4f} ± {v.std() / num_rows**0.5:.4f}" for v in losses]
        print(f"{name:<28}{exact:>13.4f}{estimates[0]:>19}{estimates[1]:>19}")
        draw(ax, n_f, "$n_f$: data and encoder", "C0", "-")
        draw(ax, n_g, "$n_g$: prior and decoder", "C1", "--")
        ax.set(title=f"{name}\nKL = {exact:.4f} nats".replace("σ_f", r"$\sigma_f$"), xlabel="x")
    axes[0].set_ylabel("z")
    axes[1].legend(frameon=False, loc="lower left")
    print(f"H[p_data] = {ENTROPY:.4f}; both estimates are means over the {num_rows} rows of data.")
    save(figure, options, "coupling")


def joints(vae: VAE, scale_f: float) -> tuple[MultivariateNormal, MultivariateNormal]:
    """n_f and n_g as Normals of (x, z), from the lines z = a x + b and x = w z + m."""
    (a, b), (w, m) = ((p.head.weight.item(), p.head.bias.item()) for p in (vae.posterior, vae.likelihood))
    n_f = [[VARIANCE, a * VARIANCE], [a * VARIANCE, a**2 * VARIANCE + scale_f**2]]
    n_g = [[w**2 + SCALE_G**2, w], [w, 1.0]]
    return (
        MultivariateNormal(torch.tensor([MEAN, a * MEAN + b]), torch.tensor(n_f)),
        MultivariateNormal(torch.tensor([m, 0.0]), torch.tensor(n_g)),
    )


def loss(vae: VAE, x: Tensor, scale_f: float) -> Tensor:
    """The regularised autoencoder's loss of each row, with its constant."""
    code = vae.encode(x).mean
    reconstruction = vae.decode(code + scale_f * torch.randn_like(code)).mean
    constant = 0.5 * (scale_f**2 - 1 - log(scale_f**2)) + 0.5 * log(2 * pi * SCALE_G**2)
    return ((x - reconstruction) ** 2 / (2 * SCALE_G**2) + code**2 / 2 + constant).squeeze(-1)


def draw(ax: plt.Axes, joint: MultivariateNormal, label: str, colour: str, style: str) -> None:
    """The ellipses of one and two standard deviations."""
    angle = torch.linspace(0, 2 * pi, 200)
    circle = torch.stack([angle.cos(), angle.sin()])
    for radius, name in ((1, label), (2, None)):
        ax.plot(*(joint.mean[:, None] + radius * joint.scale_tril @ circle), style, color=colour, label=name)


if __name__ == "__main__":
    main()
