r"""A table with columns of several kinds: one latent variable, and a product of likelihoods.

Given z, the columns are independent, and each has the family that suits it,

    p(x) = ∫ p(z) Π_columns p(x_column|z) dz,

All dependence between columns goes through z. The table is simulated from a known model with a two-dimensional z. It
has three measurements (Normal), two yes-or-no answers (Bernoulli), a choice among three (Categorical) and two counts
(Poisson). The script compares the VAE, columns that are fitted independently of each other, and the truth: log p(x) of
the simulating model, by quadrature over z. Independent columns can have the right means and shares. Only z makes them
depend on each other, as the correlations of generated rows show.

    python examples/mixed_table.py

Nazábal, Olmos, Ghahramani & Valera (2020), *Handling Incomplete Heterogeneous Data using VAEs*.
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

NUMERIC = [0, 1, 2, 3, 4, 6, 7]  # the code of a category, column 5, has no correlation
LABELS = ["Normal", "Normal", "Normal", "Bernoulli", "Bernoulli", "Poisson", "Poisson"]


def likelihoods(network: MLP | None) -> ConditionalProduct:
    """The families of the columns. They share one network, with a head each; without it, their parameters are free."""
    return ConditionalProduct(
        ConditionalNormal(network, 3, scale=LearnedScale((3,))),
        ConditionalBernoulli(network, 2),
        ConditionalCategorical(network, 1, num_categories=3),
        ConditionalPoisson(network, 2),
    )


def truth(eta: Tensor) -> list[Any]:
    """The simulating model. All its parameters are functions of η = z W + b, (…, 10)."""
    return [
        dist.Normal(eta[..., :3], 0.5).to_event(1),
        dist.Bernoulli(logits=2 * eta[..., 3:5]).to_event(1),
        dist.Categorical(logits=2 * eta[..., None, 5:8]).to_event(1),
        dist.Poisson(softplus(2 * eta[..., 8:]) + 0.2).to_event(1),
    ]


def main() -> None:
    options = parse_options(__doc__)
    num_rows, num_epochs, num_particles = (500, 3, 20) if options.quick else (2000, 50, 200)
    weight, bias = 1.2 * torch.randn(2, 10), 0.5 * torch.randn(10)

    def simulate(n: int) -> Tensor:
        return torch.cat([part.sample().float() for part in truth(torch.randn(n, 2) @ weight + bias)], -1)

    train, test, many = simulate(num_rows), simulate(500), simulate(100_000)

    vae = VAE(StandardNormal(2), likelihoods(MLP(2, [32])), ConditionalNormal(MLP(8, [64]), 2))
    fit(vae.model, vae.guide, train, num_epochs=num_epochs, learning_rate=5e-3, seed=options.seed)
    settings = {"num_particles": num_particles, "compile": False, "progress": False}
    log_p = {"VAE": importance_sampling(vae.model, vae.guide, test, **settings).log_evidence}

    independent = likelihoods(None)  # maximum likelihood of each column alone
    optimizer = torch.optim.Adam(independent.parameters(), lr=0.05)
    for _ in range(20 if options.quick else 500):
        optimizer.zero_grad()
        (-independent().log_prob(train).mean()).backward()
        optimizer.step()
    with torch.no_grad():
        log_p["independent columns"] = independent().log_prob(test)
        generated = {"VAE": vae.generate(len(many)), "independent columns": independent().sample((len(many),))}

    steps = torch.linspace(-5, 5, 81)
    z = torch.cartesian_prod(steps, steps)[:, None]
    log_prior = dist.Normal(0.0, 1.0).log_prob(z).sum(-1) + 2 * (steps[1] - steps[0]).log()
    columns = zip(truth(z @ weight + bias), test.split([3, 2, 1, 2], -1), strict=True)
    exact = torch.logsumexp(log_prior + sum(part.log_prob(values) for part, values in columns), 0)

    correlations = {"truth": torch.corrcoef(many[:, NUMERIC].T)}
    rows, columns = torch.triu_indices(7, 7, 1)
    print(
        f"{'500 held-out rows, nats per row':<33}{'log p(x)':>9}{'below the truth':>18}{'|error| of correlations':>25}"
    )
    print(f"{'truth':<33}{exact.mean():>9.3f}")
    for name, values in log_p.items():
        gap = exact - values
        below = f"{gap.mean():.3f} ± {gap.std() / len(gap) ** 0.5:.3f}"
        correlations[name] = torch.corrcoef(generated[name][:, NUMERIC].T)
        wrong = (correlations[name] - correlations["truth"])[rows, columns].abs().mean()
        print(f"{name:<33}{values.mean():>9.3f}{below:>18}{wrong:>25.3f}")
    print(f"±: standard error over the rows. Correlations: mean over {len(rows)} pairs, of {len(many)} simulated rows.")

    figure, axes = plt.subplots(1, 3, figsize=(11, 4), sharey=True)
    for ax, (name, matrix) in zip(axes, correlations.items(), strict=True):
        image = ax.imshow(matrix.numpy(), cmap="RdBu_r", vmin=-1, vmax=1)
        ax.set_title(name)
        ax.set_xticks(range(7), LABELS, rotation=90)
    axes[0].set_yticks(range(7), LABELS)
    figure.colorbar(image, ax=axes, label="correlation", shrink=0.8)
    save(figure, options, "mixed_table")


if __name__ == "__main__":
    main()
