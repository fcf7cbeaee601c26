r"""The likelihood belongs to the data: held-out log p(x) of a VAE with the right one and with a wrong one.

log p(x) of the same held-out data compares likelihoods, as long as each is a density (or a probability) over the same
values. Every data set is simulated from a known model with one latent variable, z ~ N(0, 1) and η = W z + b:

    outliers    x = η + 0.3 t, Student-t noise with 3 degrees of freedom
    counts      x ~ NegativeBinomial(mean softplus(η) + 1, r = 1.5): variance larger than the mean
    fractions   x ~ Beta, inside (0, 1), with mean sigmoid(η)
    grey        x ~ ContinuousBernoulli(logits 3 η), from 0 to 1
    categories  x in {0, 1, 2}, with probabilities softmax(η)

The truth is log p(x) under the simulating model itself, by quadrature over z. Binary cross-entropy of grey values,
x log p + (1 − x) log(1 − p), is no log-density: exp of it integrates over [0, 1] to less than one, by a factor that
depends on p. Its "log p(x)" stands in no relation to the truth.

    python examples/likelihoods.py

Loaiza-Ganem & Cunningham (2019), *The continuous Bernoulli*.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from matplotlib import pyplot as plt
from script import parse_options, save
from torch import Tensor

from pyro_vae import VAE, fit, importance_sampling
from pyro_vae import distributions as families
from pyro_vae.networks import MLP

D = 6  # columns of every data set


def simulators() -> dict[str, Callable[[Tensor], Any]]:
    """The true p(x|z) of each data set, for z (…, 1)."""
    weight, bias = torch.randn(1, D).sign() * (0.7 + 0.6 * torch.rand(1, D)), 0.5 * torch.randn(D)
    category_weight, category_bias = 2 * torch.randn(D, 3), 0.5 * torch.randn(D, 3)

    def counts(z: Tensor) -> Any:
        mean = torch.nn.functional.softplus(3 * (z @ weight + bias)) + 1
        return dist.NegativeBinomial(1.5, logits=(mean / 1.5).log()).to_event(1)

    def fractions(z: Tensor) -> Any:
        mean = torch.sigmoid(z @ weight + bias)
        return dist.Beta(8 * mean, 8 * (1 - mean)).to_event(1)

    return {
        "outliers": lambda z: dist.StudentT(3.0, z @ weight + bias, 0.3).to_event(1),
        "counts": counts,
        "fractions": fractions,
        "grey": lambda z: dist.ContinuousBernoulli(logits=3 * (z @ weight + bias)).to_event(1),
        "categories": lambda z: dist.Categorical(logits=z[..., None] * category_weight + category_bias).to_event(1),
    }


def exact_log_evidence(likelihood: Callable[[Tensor], Any], x: Tensor) -> Tensor:
    """log ∫ p(x|z) N(z; 0, 1) dz on a grid of z."""
    z = torch.linspace(-6, 6, 401)[:, None, None]
    log_prior = dist.Normal(0.0, 1.0).log_prob(z[:, 0, 0]) + torch.tensor(12 / 400).log()
    return torch.logsumexp(likelihood(z.expand(-1, len(x), 1)).log_prob(x) + log_prior[:, None], 0)


class CrossEntropy(families.ConditionalBernoulli):
    """The Bernoulli's formula for values from 0 to 1, which it has no density over."""

    def distribution(self, logits: Tensor) -> Any:
        return UncheckedBernoulli(logits=logits, validate_args=False).to_event(1)


class UncheckedBernoulli(dist.Bernoulli):
    """Takes what lies between 0 and 1."""

    support = dist.constraints.unit_interval


def main() -> None:
    options = parse_options(__doc__)
    scale = families.LearnedScale
    candidates: dict[str, dict[str, Callable[[MLP], Any]]] = {
        "outliers": {
            "Student-t": lambda h: families.ConditionalStudentT(h, D, df=scale(init=5.0), scale=scale((D,))),
            "Normal": lambda h: families.ConditionalNormal(h, D, scale=scale((D,))),
        },
        "counts": {
            "negative binomial": lambda h: families.ConditionalNegativeBinomial(h, D, total_count=scale((D,))),
            "Poisson": lambda h: families.ConditionalPoisson(h, D),
        },
        "fractions": {
            "Beta": lambda h: families.ConditionalBeta(h, D),
            "Normal": lambda h: families.ConditionalNormal(h, D),
            "continuous Bernoulli": lambda h: families.ConditionalContinuousBernoulli(h, D),
        },
        "grey": {
            "continuous Bernoulli": lambda h: families.ConditionalContinuousBernoulli(h, D),
            "cross-entropy (no density)": lambda h: CrossEntropy(h, D),
        },
        "categories": {
            "categorical": lambda h: families.ConditionalCategorical(h, D, num_categories=3),
            "Poisson": lambda h: families.ConditionalPoisson(h, D),
        },
    }
    num_epochs, num_points, num_particles = (2, 500, 20) if options.quick else (30, 2000, 200)
    samples: dict[str, Tensor] = {}
    print("held-out log p(x), nats per row; cross-entropy: what is taken for it")
    for data, likelihood in simulators().items():
        x = likelihood(torch.randn(num_points + 500, 1)).sample().float()
        if data == "fractions":
            x = x.clamp(1e-4, 1 - 1e-4)  # rounding to 0 or 1 would be outside the support
        train, test = x[:num_points], x[num_points:]
        print(f"{data:<11} {'truth':<27} {exact_log_evidence(likelihood, test).mean():9.3f}")
        samples[data] = x
        for name, make in candidates[data].items():
            torch.manual_seed(options.seed)
            vae = build_vae(make, f"{data}, {name}")
            fit(vae.model, vae.guide, train, num_epochs=num_epochs, learning_rate=5e-3, seed=options.seed)
            settings = {"num_particles": num_particles, "compile": False, "progress": False}
            log_p = importance_sampling(vae.model, vae.guide, test, **settings).mean[0]
            print(f"{'':<11} {name:<27} {log_p:9.3f}")
            if data == "counts":
                samples[name] = vae.generate(num_points)
    draw_figure(samples, options)


def build_vae(make_likelihood: Callable[[MLP], Any], name: str) -> VAE:
    posterior = families.ConditionalNormal(MLP(D, [32], activation=Signed), 1)
    return VAE(families.StandardNormal(1), make_likelihood(MLP(1, [16])), posterior, name=name)


class Signed(torch.nn.Module):
    """asinh: linear near zero, logarithmic for the large values of counts and outliers."""

    def forward(self, x: Tensor) -> Tensor:
        return x.asinh()


def draw_figure(samples: dict[str, Tensor], options: Namespace) -> None:
    """Variance against mean of each column, and the distribution of the first column, of counts."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    for name, marker in (("counts", "o"), ("negative binomial", "s"), ("Poisson", "^")):
        x, label = samples[name], "data" if name == "counts" else name
        left.scatter(x.mean(0), x.var(0), marker=marker, label=label)
        values, counts = x[:, 0].unique(return_counts=True)
        right.plot(values[values <= 40], (counts / len(x))[values <= 40], marker=marker, markersize=4, label=label)
    left.set(xlabel="mean of a column", ylabel="its variance", yscale="log", title="six columns of counts")
    right.set(xlabel="count", ylabel="share of the rows", yscale="log", title="first column")
    for ax in (left, right):
        ax.legend(frameon=False)
        ax.spines[["top", "right"]].set_visible(False)
    save(figure, options, "likelihoods")


if __name__ == "__main__":
    main()
