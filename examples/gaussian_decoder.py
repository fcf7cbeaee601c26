r"""A Gaussian decoder with a learned σ(z): what it recovers, and how it collapses.

    python examples/gaussian_decoder.py

Points on a helix with noise that grows along it,

    z ~ N(0, 1),    x | z ~ N(m(z), σ(z)² I),    m(z) = (2 z, cos 2z, sin 2z),    σ(z) = 0.05 + 0.25 Φ(z),

are fitted by decoders with a fixed σ, a learned σ that is shared by all z, and a σ(z) from the network. Only the last
of these contains the truth.

A learned σ has a danger. If the decoder hits the data exactly, log p(x|z) = −½ ((x − μ)/σ)² − log σ + const grows
without bound as σ → 0. A feature that is constant, or rounded to a single value, is enough. `fit` warns of a collapsed
scale. A lower bound on the scale, at the precision of the data, prevents the collapse.

Rybkin, Daniilidis & Levine (2021), *Simple and Effective VAE Training with Calibrated Decoders*.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from textwrap import fill
from typing import Any

import numpy as np
import pyro
import torch
from matplotlib import pyplot as plt
from script import parse_options, save
from torch import Tensor, nn

from pyro_vae import VAE, fit, importance_sampling
from pyro_vae.distributions import ConditionalNormal, LearnedScale, StandardNormal
from pyro_vae.networks import MLP

PRECISION = 0.01  # of the feature that does not vary


def true_mean(z: Tensor) -> Tensor:
    return torch.stack([2 * z, (2 * z).cos(), (2 * z).sin()], -1)


def true_scale(z: Tensor) -> Tensor:
    return 0.05 + 0.25 * torch.special.ndtr(z)


def simulate(size: int) -> Tensor:
    z = torch.randn(size)
    return true_mean(z) + true_scale(z)[:, None] * torch.randn(size, 3)


def main() -> None:
    options = parse_options(__doc__)
    x, test = simulate(2000), simulate(500)
    num_epochs, num_particles = (2, 50) if options.quick else (140, 300)
    decoders = {
        "fixed at 0.1": {"scale": 0.1},
        "one, learned": {"scale": LearnedScale()},
        "σ(z)": {"smallest": PRECISION},
    }
    truth = exact_log_evidence(test).mean().item()
    print(f"mean log p(x) of {len(test)} test points under the truth: {truth:.3f} nats\n")
    print(f"{'σ of the decoder':<18}{'test log p(x) ± particles':>27}{'truth − model':>15}{'σ at the data':>15}")
    figure, axes = plt.subplots(1, 2, figsize=(10.5, 4.4))
    z = torch.linspace(-2, 2, 200)
    position = true_mean(z)  # on the curve: σ is compared by position, because a model may have −z for z
    for name, how in decoders.items():
        vae = build(name, x.shape[1], options.seed, **how)
        fit(
            vae.model,
            vae.guide,
            x,
            num_epochs=num_epochs,
            batch_size=100,
            learning_rate=5e-3,
            scheduler=lambda optim: torch.optim.lr_scheduler.CosineAnnealingLR(optim, num_epochs),
            seed=options.seed,
        )
        evidence = importance_sampling(vae.model, vae.guide, test, num_particles=num_particles, progress=False)
        log_p, _, error = evidence.mean
        sigma = vae.decode(vae.encode(position).mean).stddev.mean(-1)
        spread = f"{sigma.min():.2f}" if sigma.max() - sigma.min() < 1e-4 else f"{sigma.min():.2f} to {sigma.max():.2f}"
        print(f"{name:<18}{f'{log_p:.3f} ± {error:.3f}':>27}{truth - log_p:>15.3f}{spread:>15}")
        axes[0].plot(z, sigma, label=name)
    axes[0].plot(z, true_scale(z), "k--", label="truth")
    axes[0].set(xlabel="position z on the curve", ylabel="σ", title="Scale of the decoder along the curve")
    axes[0].legend(frameon=False)
    new = vae.generate(1000)
    axes[1].scatter(*x[:1000, :2].T, s=5, alpha=0.5, label="data")
    axes[1].scatter(*new[:, :2].T, s=5, alpha=0.5, label="generated with σ(z)")
    axes[1].set(xlabel="$x_1$", ylabel="$x_2$", title="Data, and draws of the model with σ(z)")
    axes[1].legend(frameon=False)
    print_collapse(x, 3 if options.quick else 2500, options.seed)
    save(figure, options, "gaussian_decoder")


def print_collapse(x: Tensor, num_steps: int, seed: int) -> None:
    """Fits the same data with a fourth, constant feature, which a linear decoder can hit exactly."""
    x = torch.cat([x[:600], torch.ones(600, 1)], 1)
    print("\nwith a fourth feature that is constant, and one learned σ for each feature:")
    for smallest in (1e-5, PRECISION):
        vae = build("constant", 4, seed, hidden_sizes=[], scale=LearnedScale((4,), smallest=smallest))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = fit(vae.model, vae.guide, x, num_epochs=num_steps, batch_size=600, learning_rate=3e-2, seed=seed)
        sigma = ", ".join(f"{s:.5f}" for s in vae.likelihood.scale().tolist())
        print(f"  smallest = {smallest:g}: ELBO {-result.loss[-1]:.2f}, σ = {sigma}")
        for warning in caught:
            print(fill(str(warning.message), 110, initial_indent="    ", subsequent_indent="    "))


def build(name: str, num_features: int, seed: int, hidden_sizes: Sequence[int] = (64, 64), **how: Any) -> VAE:
    pyro.set_rng_seed(seed)
    decoder, encoder = (MLP(size, hidden_sizes, activation=nn.Tanh) for size in (1, num_features))
    return VAE(
        StandardNormal(1),
        ConditionalNormal(decoder, num_features, **how),
        ConditionalNormal(encoder, 1),
        name=name,
    )


def exact_log_evidence(x: Tensor) -> Tensor:
    """log p(x) under the truth, by quadrature over z, (N,)."""
    z = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    p_x = torch.distributions.Normal(true_mean(z), true_scale(z)[:, None])
    log_joint = p_x.log_prob(x.double()[:, None]).sum(-1) + torch.distributions.Normal(0.0, 1.0).log_prob(z)
    return log_joint.logsumexp(-1) + np.log(16 / 4000)


if __name__ == "__main__":
    main()
