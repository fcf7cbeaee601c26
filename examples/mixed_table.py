r"""A table with columns of several kinds: one latent variable, and a product of likelihoods.

Given z the columns are independent, each from the family that suits it,

    p(x) = ∫ p(z) Π_columns p(x_column|z) dz,

and what they have in common goes through z. The table is simulated from a known two-dimensional z: three measurements
(Normal), two yes-or-no answers (Bernoulli), a choice among three (Categorical) and two counts (Poisson). Compared are
the VAE, columns fitted independently of each other, and the truth: log p(x) of the simulating model, by quadrature over
z. Columns on their own can have the right means and shares; only through z do they know of each other.

    python examples/mixed_table.py

Nazábal, Olmos, Ghahramani & Valera (2020), *Handling Incomplete Heterogeneous Data using VAEs*.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import pyro.distributions as dist
import torch
from matplotlib import pyplot as plt
from script import parse_options, save
from torch import Tensor

from pyro_vae import VAE, fit, importance_sampling
from pyro_vae.distributions import (
    ConditionalBernoulli,
    ConditionalCategorical,
    ConditionalNormal,
    ConditionalPoisson,
    ConditionalProduct,
    LearnedScale,
    StandardNormal,
)
from pyro_vae.networks import MLP

COLUMNS = ("Normal 1", "Normal 2", "Normal 3", "Bernoulli 1", "Bernoulli 2", "Categorical", "Poisson 1", "Poisson 2")


def families(network: MLP | None) -> list[Any]:
    """The kinds of columns, in their order; without a network each column has free parameters of its own."""
    return [
        ConditionalNormal(network, 3, scale=LearnedScale((3,))),
        ConditionalBernoulli(network, 2),
        ConditionalCategorical(network, 1, num_categories=3),
        ConditionalPoisson(network, 2),
    ]


class Truth:
    """The simulating model: every parameter is a function of W z + b, z ~ N(0, I_2)."""

    def __init__(self) -> None:
        self.weight, self.bias = 1.2 * torch.randn(2, 10), 0.5 * torch.randn(10)

    def parts(self, z: Tensor) -> list[Any]:
        eta = z @ self.weight + self.bias
        return [
            dist.Normal(eta[..., :3], 0.5).to_event(1),
            dist.Bernoulli(logits=2 * eta[..., 3:5]).to_event(1),
            dist.Categorical(logits=2 * eta[..., None, 5:8]).to_event(1),
            dist.Poisson(torch.nn.functional.softplus(2 * eta[..., 8:]) + 0.2).to_event(1),
        ]

    def simulate(self, n: int) -> Tensor:
        return torch.cat([part.sample().float() for part in self.parts(torch.randn(n, 2))], -1)

    def log_evidence(self, x: Tensor) -> Tensor:
        """log ∫ p(x|z) N(z; 0, I) dz on a grid of z."""
        steps = torch.linspace(-5, 5, 81)
        z = torch.cartesian_prod(steps, steps)[:, None]
        log_prior = dist.Normal(0.0, 1.0).log_prob(z).sum(-1) + 2 * (steps[1] - steps[0]).log()
        columns = zip(self.parts(z), x.split([3, 2, 1, 2], -1), strict=True)
        return torch.logsumexp(log_prior + sum(part.log_prob(values) for part, values in columns), 0)


def main() -> None:
    options = parse_options(__doc__)
    truth = Truth()
    num_rows, num_epochs, num_particles = (500, 3, 20) if options.quick else (2000, 50, 200)
    train, test = truth.simulate(num_rows), truth.simulate(500)

    vae = VAE(
        StandardNormal(2),
        ConditionalProduct(*families(MLP(2, [32]))),  # the parts share one network, and have a linear head each
        ConditionalNormal(MLP(8, [64]), 2),
    )
    fit(vae.model, vae.guide, train, num_epochs=num_epochs, learning_rate=5e-3, seed=options.seed)
    settings = {"num_particles": num_particles, "compile": False, "progress": False}
    evidence = importance_sampling(vae.model, vae.guide, test, **settings)

    independent = ConditionalProduct(*families(None))  # maximum likelihood of each column alone
    optimizer = torch.optim.LBFGS(independent.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = -independent().log_prob(train).mean()
        value.backward()
        return value

    optimizer.step(loss)
    with torch.no_grad():
        alone = independent().log_prob(test).mean()
        generated = {"VAE": vae.generate(num_rows), "independent columns": independent().sample((num_rows,))}
    exact = truth.log_evidence(test).mean()
    print("held-out log p(x), nats per row, and mean |error| of the correlations in generated rows")
    numeric = [0, 1, 2, 3, 4, 6, 7]  # the code of a category has no correlation
    correlations = torch.corrcoef(train[:, numeric].T)
    rows, columns = torch.triu_indices(7, 7, 1)
    for name, log_p in (("independent columns", alone), ("VAE", torch.tensor(evidence.mean[0]))):
        error = (torch.corrcoef(generated[name][:, numeric].T) - correlations)[rows, columns].abs().mean()
        print(f"{name:<20} {log_p:8.3f} {error:8.3f}")
    print(f"{'truth':<20} {exact:8.3f}")
    draw_figure(train, generated["VAE"], options)


def draw_figure(data: Tensor, generated: Tensor, options: Namespace) -> None:
    """Each column of the data (bars) and of rows that the VAE generated (line or points)."""
    figure, axes = plt.subplots(2, 4, figsize=(12, 5))
    for column, ax in enumerate(axes.flat):
        x, y = data[:, column], generated[:, column]
        if column < 3:
            edges = torch.linspace(x.min().item(), x.max().item(), 31).numpy()
            ax.hist(x.numpy(), edges, density=True, color="0.8", label="data")
            ax.hist(y.numpy(), edges, density=True, histtype="step", color="C0", label="generated")
        else:
            values = range(int(x.max().clamp(max=15)) + 1)
            ax.bar(values, [(x == v).float().mean().item() for v in values], color="0.8", label="data")
            ax.plot(values, [(y == v).float().mean().item() for v in values], "o", color="C0", label="generated")
            ax.set_xticks(values[:: 1 if len(values) < 5 else 5])
        ax.set_title(COLUMNS[column])
        ax.spines[["top", "right"]].set_visible(False)
    axes[1, 3].legend(frameon=False)
    save(figure, options, "mixed_table")


if __name__ == "__main__":
    main()
