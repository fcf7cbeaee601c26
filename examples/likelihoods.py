r"""Choose the likelihood for the data: held-out log p(x) of a VAE with the right one and with a wrong one.

Likelihoods can be compared by log p(x) of the same held-out data if each is a density (or a probability) over the same
values. Every data set is simulated from a known model with one latent variable, z ~ N(0, 1) and η = w z + b:

    outliers    x = η + 0.3 t, Student-t noise with 3 degrees of freedom
    counts      x ~ NegativeBinomial with logits log(m / 1.5), m = softplus(3 η) + 1, r = 1.5: variance above the mean
    fractions   x ~ Beta(8 p, 8 (1 − p)), p = sigmoid(η)
    grey        x ~ ContinuousBernoulli(logits 3 η), from 0 to 1

The truth is log p(x) under the simulating model itself, by quadrature over z. On average over rows of that model, a VAE
falls short of the truth by KL(p_true‖p_VAE). Binary cross-entropy of grey values, x log p + (1 − x) log(1 − p), is not
a log-density: its exponential integrates over [0, 1] to less than one, by a factor that depends on p. Its "log p(x)"
cannot be compared with the truth.

    python examples/likelihoods.py

Loaiza-Ganem & Cunningham (2019), *The continuous Bernoulli*.
"""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from matplotlib import pyplot as plt
from script import parse_options, save
from torch import Tensor
from torch.nn.functional import softplus

from pyro_vae import VAE, fit, importance_sampling
from pyro_vae import distributions as families
from pyro_vae.distributions import LearnedScale
from pyro_vae.networks import MLP

D = 6  # number of columns of every data set


class UncheckedBernoulli(dist.Bernoulli):
    """The formula of the Bernoulli for values from 0 to 1, over which it is not a density."""

    support = dist.constraints.unit_interval


class CrossEntropy(families.ConditionalBernoulli):
    def distribution(self, logits: Tensor) -> Any:
        return UncheckedBernoulli(logits=logits, validate_args=False).to_event(1)


# the true p(x|η), and functions that make the likelihoods from a network, the right one first
PROBLEMS: dict[str, tuple[Any, dict[str, Any]]] = {
    "outliers": (
        lambda eta: dist.StudentT(3.0, eta, 0.3),
        {
            "Student-t": lambda h: families.ConditionalStudentT(h, D, df=LearnedScale(init=5.0), scale=LearnedScale()),
            "Normal": lambda h: families.ConditionalNormal(h, D, scale=LearnedScale()),
        },
    ),
    "counts": (
        lambda eta: dist.NegativeBinomial(1.5, logits=((softplus(3 * eta) + 1) / 1.5).log()),
        {
            "negative binomial": lambda h: families.ConditionalNegativeBinomial(h, D, total_count=LearnedScale()),
            "Poisson": lambda h: families.ConditionalPoisson(h, D),
        },
    ),
    "fractions": (
        lambda eta: dist.Beta(8 * eta.sigmoid(), 8 * (-eta).sigmoid()),
        {
            "Beta": lambda h: families.ConditionalBeta(h, D),
            "continuous Bernoulli": lambda h: families.ConditionalContinuousBernoulli(h, D),
        },
    ),
    "grey": (
        lambda eta: dist.ContinuousBernoulli(logits=3 * eta),
        {
            "continuous Bernoulli": lambda h: families.ConditionalContinuousBernoulli(h, D),
            "cross-entropy (no density)": lambda h: CrossEntropy(h, D),
        },
    ),
}


def main() -> None:
    options = parse_options(__doc__)
    num_epochs, num_rows, num_particles = (2, 500, 20) if options.quick else (30, 2000, 200)
    weight, bias = torch.randn(1, D).sign() * (0.7 + 0.6 * torch.rand(1, D)), 0.5 * torch.randn(D)
    grid = torch.linspace(-6, 6, 401)[:, None]
    log_prior = dist.Normal(0.0, 1.0).log_prob(grid) + (grid[1] - grid[0]).log()
    figure, ax = plt.subplots(figsize=(8, 3.8))
    labels = []
    print("log p(x) of 500 held-out rows, nats per row; short of the truth by, ± standard error over the rows")
    for data, (simulator, candidates) in PROBLEMS.items():
        x = simulator(torch.randn(num_rows + 500, 1) @ weight + bias).sample()
        if data == "fractions":
            x = x.clamp(1e-6, 1 - 1e-6)  # values that were rounded to 0 or 1 lie outside the support
        train, test = x[:num_rows], x[num_rows:]
        exact = (simulator(grid[:, None] @ weight + bias).log_prob(test).sum(-1) + log_prior).logsumexp(0)
        print(f"{data:<10} {'truth':<27}{exact.mean():9.3f}")
        for (name, make), colour in zip(candidates.items(), ("C0", "C3"), strict=True):
            torch.manual_seed(options.seed)
            posterior = families.ConditionalNormal(MLP(D, [32]), 1)
            vae = VAE(families.StandardNormal(1), make(MLP(1, [16])), posterior, name=f"{data}, {name}")
            fit(vae.model, vae.guide, train, num_epochs=num_epochs, learning_rate=5e-3, seed=options.seed)
            settings = {"num_particles": num_particles, "compile": False, "progress": False}
            log_p = importance_sampling(vae.model, vae.guide, test, **settings).log_evidence
            gap, error = (exact - log_p).mean().item(), (exact - log_p).std().item() / len(test) ** 0.5
            print(f"{'':<10} {name:<27}{log_p.mean():9.3f}{gap:10.3f} ± {error:.3f}")
            ax.errorbar(gap, len(labels), xerr=2 * error, fmt="o", color=colour)
            labels.append(f"{data}: {name}")
    ax.axvline(0.0, color="0.6", linewidth=1, zorder=0)
    ax.set_yticks(range(len(labels)), labels)
    ax.invert_yaxis()
    ax.set(xlabel="short of the true log p(x) (nats per row, ± 2 standard errors)")
    ax.set_title("right likelihood (blue) and wrong one (red)")
    ax.spines[["top", "right"]].set_visible(False)
    save(figure, options, "likelihoods")


if __name__ == "__main__":
    main()
