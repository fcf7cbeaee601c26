"""Every estimator of log p(x) against models whose log p(x) is known: closed forms, quadrature, enumeration.

    python benchmarks/evidence_truths.py

Each model has a guide that is off on purpose: displaced, or a plain regression, and too wide. Of each 8 data points are
simulated, and each is estimated with 200 seeds. The table says, over the estimates that `Evidence` does not call
doubtful: the mean error with its standard error, the largest error in standard errors, and how often the 95 % interval
covers the truth; upper bounds start at the exact draw that the data were simulated from. It goes to
benchmark_output/evidence_truths.md, too.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from torch import Tensor

from pyro_vae import (
    Evidence,
    adaptive_importance_sampling,
    annealed_importance_sampling,
    importance_sampling,
    prior_sampling,
    simulate,
)


class Truth(NamedTuple):
    """A pair, the shape of one of its data points, and log p(x) of rows of these."""

    model: Callable
    guide: Callable
    shape: tuple[int, ...]
    log_evidence: Callable[[Tensor], Tensor]


def linear_gaussian(latent: int, size: int, *, noise: float = 0.7, displace: float = 0.3, widen: float = 1.2) -> Truth:
    """z ~ N(0, I), x ~ N(W z, s² I): log N(x; 0, W Wᵀ + s² I)."""
    weight = torch.randn(size, latent, generator=torch.Generator().manual_seed(1))
    covariance = torch.linalg.inv(weight.T @ weight / noise**2 + torch.eye(latent))
    tril = torch.linalg.cholesky(covariance)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(latent), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ weight.T, noise).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        loc = x @ weight @ covariance / noise**2 + displace / math.sqrt(latent) * tril.sum(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=widen * tril))

    def log_evidence(x: Tensor) -> Tensor:
        total = weight.double() @ weight.double().T + noise**2 * torch.eye(size, dtype=torch.float64)
        return dist.MultivariateNormal(torch.zeros(size, dtype=torch.float64), total).log_prob(x.double())

    return Truth(model, guide, (size,), log_evidence)


def by_quadrature(likelihood: Callable[[Tensor], Any], size: int, latent: int) -> Truth:
    """z ~ N(0, I) in one or two dimensions, x ~ likelihood(z); the guide is a regression of z on x."""
    grid, cell = _grid(latent)

    def log_joint(x: Tensor) -> Tensor:  # (N, points)
        log_prior = dist.Normal(0.0, 1.0).log_prob(grid).sum(-1)
        return likelihood(grid).log_prob(x.double().unsqueeze(-2)) + log_prior

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(latent), 1.0).to_event(1))
            pyro.sample("x", likelihood(z), obs=x)

    regression = _Regression(model, ["z"], (size,))

    def guide(x: Tensor) -> None:
        loc, scale = regression(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    return Truth(model, guide, (size,), lambda x: log_joint(x).logsumexp(-1) + cell)


def two_levels(size: int = 4) -> Truth:
    """z2 ~ N(0, 1), z1 ~ N(tanh 2 z2, ½²), x ~ N(w z1, 0.7²): two sites, the second guide given the first."""
    grid, cell = _grid(2)
    weight = torch.linspace(-1, 1.5, size)

    def log_joint(x: Tensor) -> Tensor:
        z2, z1 = grid.unbind(-1)
        log_prior = dist.Normal(0.0, 1.0).log_prob(z2) + dist.Normal(torch.tanh(2 * z2), 0.5).log_prob(z1)
        return log_prior + dist.Normal(z1[:, None] * weight, 0.7).to_event(1).log_prob(x.double().unsqueeze(-2))

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(0.0, 1.0))
            z1 = pyro.sample("z1", dist.Normal(torch.tanh(2 * z2), 0.5))
            pyro.sample("x", dist.Normal(z1.unsqueeze(-1) * weight, 0.7).to_event(1), obs=x)

    regression = _Regression(model, ["z2", "z1"], (size,))

    def guide(x: Tensor) -> None:
        loc, scale = regression(x)
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(loc[:, 0], scale[0]))
            pyro.sample("z1", dist.Normal(loc[:, 1] + 0.2 * (z2 - loc[:, 0]), scale[1]))

    return Truth(model, guide, (size,), lambda x: log_joint(x).logsumexp(-1) + cell)


def bernoulli_mixture(size: int = 20, num_components: int = 5, *, enumerate_guide: bool = False) -> Truth:
    """y ~ Categorical, x ~ Bernoulli(p_y): log Σ_y p(y) p(x|y); the guide has the posterior's square root."""
    logits = torch.randn(num_components, size, generator=torch.Generator().manual_seed(2))

    def log_joint(x: Tensor) -> Tensor:
        return dist.Bernoulli(logits=logits).to_event(1).log_prob(x.unsqueeze(-2)) - math.log(num_components)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(logits=torch.zeros(num_components)))
            pyro.sample("x", dist.Bernoulli(logits=logits[y]).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=log_joint(x) / 2))

    guide = config_enumerate(guide) if enumerate_guide else guide
    return Truth(model, guide, (size,), lambda x: log_joint(x).double().logsumexp(-1))


def mixture_with_latents(size: int = 8, num_components: int = 3) -> Truth:
    """y ~ Categorical, z ~ N(m_y, 1), x ~ Bernoulli(w z + b_y): y is summed out, of the guide there is but z."""
    generator = torch.Generator().manual_seed(3)
    weight, bias = torch.randn(size, generator=generator), torch.randn(num_components, size, generator=generator)
    mean = torch.tensor([-2.0, 0.0, 2.0])
    grid, cell = _grid(1)

    def log_joint(x: Tensor) -> Tensor:
        log_prior = dist.Normal(mean, 1.0).log_prob(grid) - math.log(num_components)  # (points, components)
        logits = grid.unsqueeze(-1) * weight + bias
        log_likelihood = dist.Bernoulli(logits=logits).to_event(1).log_prob(x.double()[..., None, None, :])
        return (log_prior + log_likelihood).logsumexp(-1)

    @config_enumerate
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(logits=torch.zeros(num_components)))
            z = pyro.sample("z", dist.Normal(mean[y], 1.0))
            pyro.sample("x", dist.Bernoulli(logits=z.unsqueeze(-1) * weight + bias[y]).to_event(1), obs=x)

    regression = _Regression(model, ["z"], (size,))

    def guide(x: Tensor) -> None:
        loc, scale = regression(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc[:, 0], scale[0]))

    return Truth(model, guide, (size,), lambda x: log_joint(x).logsumexp(-1) + cell)


class _Regression:
    """A guide's location and scale: least squares of latents on functions of x in simulations, 1.2 times too wide."""

    def __init__(self, model: Callable, names: list[str], shape: tuple[int, ...]) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            trace = poutine.trace(poutine.uncondition(model)).get_trace(torch.zeros(20_000, *shape))
        value = {name: trace.nodes[name]["value"].reshape(20_000, -1) for name in [*names, "x"]}
        z, features = torch.cat([value[name] for name in names], -1), self.features(value["x"])
        self.weight = torch.linalg.lstsq(features, z).solution
        self.scale = 1.2 * (z - features @ self.weight).std(0)

    @staticmethod
    def features(x: Tensor) -> Tensor:
        bounded = torch.tanh(x / 2)
        return torch.cat([torch.ones(len(x), 1), x.clamp(-5, 5), bounded, bounded[:, :1] * bounded], -1)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.features(x) @ self.weight, self.scale


def _grid(latent: int) -> tuple[Tensor, float]:
    """Points (M, latent) on [−8, 8]^latent, float64, and the log of a cell's volume."""
    axis = torch.linspace(-8, 8, 1001 if latent == 1 else 161, dtype=torch.float64)
    return torch.cartesian_prod(*[axis] * latent).reshape(-1, latent), latent * math.log(axis[1] - axis[0])


def _affine(z: Tensor, size: int, seed: int) -> Tensor:
    weight = torch.randn(z.shape[-1], size, generator=torch.Generator().manual_seed(seed))
    return z @ weight.to(z)


TRUTHS: dict[str, Callable[[], Truth]] = {
    "linear Gaussian, 1 latent": lambda: linear_gaussian(1, 3),
    "linear Gaussian, 5 latents": lambda: linear_gaussian(5, 10),
    "linear Gaussian, 20 latents": lambda: linear_gaussian(20, 30, displace=0.2, widen=1.1),
    "sine curve, 1 latent": lambda: by_quadrature(
        lambda z: dist.Normal(torch.sin(_affine(z, 3, 4)) + 0.5 * _affine(z, 3, 5), 0.5).to_event(1), 3, 1
    ),
    "Bernoulli network, 2 latents": lambda: by_quadrature(
        lambda z: dist.Bernoulli(logits=2 * _affine(torch.tanh(_affine(z, 6, 6)), 12, 7)).to_event(1), 12, 2
    ),
    "Poisson, 2 latents": lambda: by_quadrature(
        lambda z: dist.Poisson(torch.exp(0.7 * _affine(z, 5, 8) + 0.5)).to_event(1), 5, 2
    ),
    "Student-t, 2 latents": lambda: by_quadrature(
        lambda z: dist.StudentT(3.0, _affine(z, 4, 9), 0.5).to_event(1), 4, 2
    ),
    "two levels": two_levels,
    "Bernoulli mixture": bernoulli_mixture,
    "Bernoulli mixture, enumerated": lambda: bernoulli_mixture(enumerate_guide=True),
    "mixture with latents, enumerated": mixture_with_latents,
}

ESTIMATORS: dict[str, Callable[..., Evidence]] = {
    "prior": lambda *a, **k: prior_sampling(*a, num_particles=1000, **k),
    "importance": lambda *a, **k: importance_sampling(*a, num_particles=1000, **k),
    "importance, smoothed": lambda *a, **k: importance_sampling(*a, num_particles=1000, smooth=True, **k),
    "importance, defensive": lambda *a, **k: importance_sampling(*a, num_particles=1000, defensive=0.2, **k),
    "importance, delta": lambda *a, **k: importance_sampling(*a, num_particles=1000, correction="delta", **k),
    "importance, jackknife": lambda *a, **k: importance_sampling(*a, num_particles=1000, correction="jackknife", **k),
    "adaptive": lambda *a, **k: adaptive_importance_sampling(*a, **k),
    "annealed": lambda *a, **k: annealed_importance_sampling(*a, num_particles=100, num_temperatures=50, **k),
}
UPPER = ("importance", "adaptive", "annealed")
CONTINUOUS = ("importance, defensive", "adaptive", "annealed")  # not for models of discrete latents alone


@dataclass
class Cell:
    """What one estimator gave on one truth, over seeds and data points."""

    error: Tensor  # estimate − truth, (estimates,)
    evidence: Evidence

    @property
    def trusted(self) -> Tensor:
        return ~self.evidence.doubtful

    @property
    def bias(self) -> tuple[float, float]:
        """Mean error and its standard error."""
        return self.error.mean().item(), self.error.std().item() / math.sqrt(len(self.error))

    @property
    def largest(self) -> float:
        """Largest |error| in standard errors; weights that are all equal have an error of rounding."""
        return (self.error.abs() / (self.evidence.standard_error + 1e-5))[self.trusted].max().item()

    @property
    def coverage(self) -> float:
        inside = self.error.abs() <= 1.96 * self.evidence.standard_error + 1e-5
        return inside[self.trusted].double().mean().item()


def run(
    truth: Truth, estimator: Callable[..., Evidence], *, num_points: int, num_seeds: int, upper: bool = False
) -> Cell:
    """Estimates on `num_points` simulated data points, each repeated `num_seeds` times with draws of its own."""
    pyro.set_rng_seed(0)
    repeats = 1 if upper else num_seeds  # an upper bound needs a new exact draw, so new data, each time
    simulation = simulate(truth.model, truth.guide, torch.zeros(num_points * num_seeds // repeats, *truth.shape))
    x = simulation.args[0].repeat_interleave(repeats, 0)
    options: dict[str, Any] = {"exact_draw": simulation.latents} if upper else {}
    evidence = estimator(truth.model, truth.guide, x, progress=False, **options)
    exact = truth.log_evidence(simulation.args[0]).repeat_interleave(repeats, 0)
    return Cell(evidence.log_evidence - exact, evidence)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num-points", type=int, default=8)
    parser.add_argument("--num-seeds", type=int, default=200)
    parser.add_argument("--truth", default="", help="only those whose name contains this")
    parser.add_argument("--output", type=Path, default=Path("benchmark_output"))
    options = parser.parse_args()
    table = [
        "| truth | estimator | mean error (nats) | largest error (SE) | 95 % covers | trusted |",
        "|---|---|---|---|---|---|",
    ]
    cells: dict[str, list[Cell]] = {}
    for name, make in TRUTHS.items():
        discrete = name.startswith("Bernoulli mixture")
        for estimator, upper in [(e, False) for e in ESTIMATORS] + [(e, True) for e in UPPER]:
            if options.truth not in name or (discrete and (estimator in CONTINUOUS or upper)):
                continue
            sizes = {"num_points": options.num_points, "num_seeds": options.num_seeds}
            cell = run(make(), ESTIMATORS[estimator], upper=upper, **sizes)
            label = estimator + ", upper bound" * upper
            cells.setdefault(label, []).append(cell)
            table.append(f"| {name} | {label} | {_row(cell, upper)} |")
            print(table[-1], flush=True)
    lines = [*summary(cells), "", *three_guides(), "", "Each truth:", "", *table]
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "evidence_truths.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines[: -len(table) - 2]))


def _row(cell: Cell, upper: bool) -> str:
    mean, error = cell.bias
    share = cell.trusted.double().mean()
    claims = f"{cell.largest:.1f} | {cell.coverage:.1%}" if share > 0 and not upper else " | "
    return f"{mean:+.4f} ± {error:.4f} | {claims} | {share:.0%}"


def summary(cells: dict[str, list[Cell]]) -> list[str]:
    """Over all truths; an estimator claims nothing where it calls all estimates doubtful."""
    lines = [
        "| estimator | truths | largest error (SE) | 95 % covers at least | mean error furthest beyond bound (nats) |",
        "|---|---|---|---|---|",
    ]
    for label, row in cells.items():
        upper = label.endswith("upper bound")
        claims = [c for c in row if c.trusted.any() and not upper]
        worst = max(row, key=lambda c: (-1 if upper else 1) * c.bias[0] / (c.bias[1] + 1e-6))
        largest = f"{max(c.largest for c in claims):.1f}" if claims else ""
        cover = f"{min(c.coverage for c in claims):.1%}" if claims else ""
        lines.append(f"| {label} | {len(row)} | {largest} | {cover} | {worst.bias[0]:+.4f} ± {worst.bias[1]:.4f} |")
    return lines


def three_guides() -> list[str]:
    """The exact posterior, one twice as wide and one 0.4 times as wide, on 100 points of a linear-Gaussian model."""
    lines = [
        "| guide | mean error (nats) | median standard error | median ESS of 5000 | median k-hat | not to trust |",
        "|---|---|---|---|---|---|",
    ]
    for name, widen in (("exact", 1.0), ("twice as wide", 2.0), ("0.4 times as wide", 0.4)):
        truth = linear_gaussian(3, 5, displace=0.0, widen=widen)
        pyro.set_rng_seed(0)
        x = simulate(truth.model, truth.guide, torch.zeros(100, 5)).args[0]
        e = importance_sampling(truth.model, truth.guide, x, num_particles=5000, progress=False)
        error = (e.log_evidence - truth.log_evidence(x)).mean()
        medians = [v.median().item() for v in (e.standard_error, e.effective_sample_size, e.pareto_khat)]
        lines.append(
            f"| {name} | {error:+.4f} | {medians[0]:.4f} | {medians[1]:.0f} | {medians[2]:.2f} "
            f"| {int(e.doubtful.sum())} of {len(x)} |"
        )
    return lines


if __name__ == "__main__":
    main()
