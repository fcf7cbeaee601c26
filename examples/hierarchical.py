r"""A hierarchical VAE: two levels of latent variables, as a plain Pyro pair.

    p(x, z₁, z₂) = p(z₂) p(z₁|z₂) p(x|z₁),      q(z₁, z₂|x) = q(z₂|x) q(z₁|x, z₂).

`fit` and `importance_sampling` ask only for a model and a guide with the data in a plate, so that a second level is two
more `pyro.sample` statements. If everything is linear and Gaussian, z₁|z₂ ~ N(A z₂ + a, s²I) and x|z₁ ~ N(B z₁ + b,
σ²I), the evidence is known,

    x ~ N(B a + b, B (A Aᵀ + s²I) Bᵀ + σ²I).

On digits, the second level makes p(z₁) = ∫ p(z₂) p(z₁|z₂) dz₂ a mixture of infinitely many Gaussians; with one level,
p(z₁) is the standard normal.

    python examples/hierarchical.py

Sønderby, Raiko, Maaløe, Sønderby & Winther (2016), *Ladder Variational Autoencoders*
"""

from __future__ import annotations

import argparse
from typing import Any

import pyro
import torch
from images import load_digits
from matplotlib import pyplot as plt
from script import parse_options, save
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from pyro_vae import VAE, fit, importance_sampling
from pyro_vae.distributions import (
    ConditionalBernoulli,
    ConditionalMultivariateNormal,
    ConditionalNormal,
    StandardNormal,
)
from pyro_vae.networks import MLP
from pyro_vae.plots import plot_images


class TwoLevels(nn.Module):
    """p(z₂), p(z₁|z₂), p(x|z₁), and q(z₂|x), q(z₁|x, z₂)."""

    def __init__(self, top: Any, middle: Any, likelihood: Any, q_top: Any, q_middle: Any) -> None:
        super().__init__()
        self.top, self.middle, self.likelihood = top, middle, likelihood
        self.q_top, self.q_middle = q_top, q_middle

    def model(self, x: Tensor) -> None:
        pyro.module("pair", self)
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", self.top())
            z1 = pyro.sample("z1", self.middle(z2))
            pyro.sample("x", self.likelihood(z1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", self.q_top(x))
            pyro.sample("z1", self.q_middle(x, z2))


def main() -> None:
    options = parse_options(__doc__)
    linear_gaussian(options)
    pyro.clear_param_store()  # another pair follows
    digits = load_digits()
    train, test = ((x.flatten(1) > 0.5).float() for x in (digits.train, digits.test))
    one = VAE(StandardNormal(8), ConditionalBernoulli(MLP(8, [128]), 64), ConditionalNormal(MLP(64, [128]), 8))
    two = TwoLevels(
        StandardNormal(2),
        ConditionalNormal(MLP(2, [64]), 8),
        ConditionalBernoulli(MLP(8, [128]), 64),
        ConditionalNormal(MLP(64, [128]), 2),
        ConditionalNormal(MLP(64, [128], context_size=2), 8),
    )
    epochs, particles = (3, 50) if options.quick else (150, 1000)
    print(f"\ndigits, binary: log p(x) of {len(test)} test images, nats per image")
    log_p = []
    for name, pair in {"one level": one, "two levels": two}.items():
        fit(pair.model, pair.guide, train, num_epochs=epochs, learning_rate=3e-3, seed=options.seed)
        evidence = importance_sampling(pair.model, pair.guide, test, num_particles=particles, progress=False)
        mean, points, draws = evidence.mean
        print(f"  {name:12} {mean:8.2f}   ± {points:.2f} (images) ± {draws:.2f} (particles)")
        log_p.append(evidence.log_evidence)
    gain = log_p[1] - log_p[0]
    print(f"  {'difference':12} {gain.mean():8.2f}   ± {gain.std() / len(gain) ** 0.5:.2f} (images, paired)")

    with torch.no_grad():
        z2 = torch.tensor([[-1.5, 0.0], [0.0, -1.5], [0.0, 0.0], [0.0, 1.5], [1.5, 0.0]])
        z1 = two.middle(z2).sample((10,)).transpose(0, 1)  # (rows, columns, 8)
        images = two.likelihood(z1).mean.unflatten(-1, (8, 8))
    figure, ax = plt.subplots(figsize=(8, 4))
    names = [f"$z_2 = ({a:g}, {b:g})$" for a, b in z2.tolist()]
    plot_images(images, row_labels=names, ax=ax)
    ax.set_title("E[x|z₁]: one z₂ for each row, ten draws of z₁ given it")
    save(figure, options, "hierarchical")


def linear_gaussian(options: argparse.Namespace) -> None:
    """Compares the evidence by importance sampling with its closed form, for the learned weights."""
    x = torch.randn(500, 2) @ torch.randn(2, 6) + 0.7 * torch.randn(500, 6)
    middle, likelihood = ConditionalNormal(MLP(2, []), 3, scale=0.5), ConditionalNormal(MLP(3, []), 6, scale=0.7)
    # linear encoders with a full covariance: the exact posterior is among them
    q_middle = ConditionalMultivariateNormal(MLP(6, [], context_size=2), 3)
    pair = TwoLevels(StandardNormal(2), middle, likelihood, ConditionalMultivariateNormal(MLP(6, []), 2), q_middle)
    epochs = 10 if options.quick else 150
    fit(pair.model, pair.guide, x, num_epochs=epochs, learning_rate=0.01, seed=options.seed)
    evidence = importance_sampling(pair.model, pair.guide, x, num_particles=1000, progress=False)

    a, upper = middle.head.bias.detach(), middle.head.weight.detach()
    b, lower = likelihood.head.bias.detach(), likelihood.head.weight.detach()
    covariance = lower @ (upper @ upper.T + 0.25 * torch.eye(3)) @ lower.T + 0.49 * torch.eye(6)
    exact = MultivariateNormal(lower @ a + b, covariance).log_prob(x)
    error = (evidence.log_evidence - exact) / evidence.standard_error
    print("linear Gaussian model: log p(x), nats per row")
    print(f"  importance sampling   {evidence.log_evidence.mean():.4f}")
    print(f"  closed form           {exact.mean():.4f}")
    print(f"  errors in standard errors: RMS {error.square().mean().sqrt():.2f} (1 if these are right)")


if __name__ == "__main__":
    main()
