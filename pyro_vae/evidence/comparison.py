r"""Model comparison by held-out log p(x): which fit gives the data more probability, and how certain that is.

For two fits and the same N data points, the difference of the means and its two errors are

    Δ = 1/N Σ_n d_n,   d_n = log p̂₁(x_n) − log p̂₂(x_n),    sd(d)/√N (points),    √(Σ_n se₁² + se₂²) / N (particles).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import hypot, nan, sqrt

import torch
from torch import Tensor

from pyro_vae.evidence.evidence import Evidence

__all__ = ["Comparison", "compare"]


@dataclass(frozen=True)
class Difference:
    """The difference in mean log p(x) between two fits, nats per data point.

    Attributes:
        mean: the mean difference over the points at which both fits are finite.
        standard_error: standard error of the mean from the finite number of points, paired: sd(difference)/√N.
        monte_carlo_error: standard error of the mean from the finite number of particles: √(Σ se₁² + se₂²)/N. It is too
            small if points are doubtful.
        trusted_mean: the mean difference over the points that are doubtful in neither fit; NaN if there are none.
        num_points: N, the number of points at which both fits are finite.
        num_doubtful: how many of all points are doubtful in at least one of the fits.
    """

    mean: float
    standard_error: float
    monte_carlo_error: float
    trusted_mean: float
    num_points: int
    num_doubtful: int

    @property
    def total_error(self) -> float:
        """Both errors, added in quadrature."""
        return hypot(self.standard_error, self.monte_carlo_error)


@dataclass(frozen=True, repr=False)
class Comparison:
    """Fits in order of their mean log p(x), the best first; `print` gives a table.

    Attributes:
        evidence: {name: Evidence}.
        differences: {name: Difference} of each fit from the best one; the best one itself is left out.
    """

    evidence: dict[str, Evidence]
    differences: dict[str, Difference]

    def __repr__(self) -> str:
        n = len(next(iter(self.evidence.values())).log_evidence)
        width = max(len(name) for name in self.evidence) + 2
        titles = ("mean log p(x)", "difference", "± points", "± particles", "without doubtful", "doubtful")
        lines = [
            f"Comparison of {len(self.evidence)} fits on the same {n} data points (nats per point)",
            "  " + " " * width + "  ".join(f"{title:>13}" for title in titles),
        ]
        for name, evidence in self.evidence.items():
            row = [f"{evidence.mean[0]:.3f}"]
            d = self.differences.get(name)
            if d is None:
                row += ["", "", "", "", f"{int(evidence.doubtful.sum())}"]
            else:
                row += [f"{v:.3f}" for v in (d.mean, d.standard_error, d.monte_carlo_error, d.trusted_mean)]
                row.append(f"{d.num_doubtful}")
            cells = (f"{c:>{max(13, len(t))}}" for c, t in zip(row, titles, strict=True))
            lines.append(f"  {name:<{width}}" + "  ".join(cells))
        bad = sum(n - d.num_points for d in self.differences.values())
        if bad:
            lines.append(f"  {bad} pairs are not finite and left out")
        if any(evidence.doubtful.any() for evidence in self.evidence.values()):
            lines.append("  doubtful: points with a k-hat above its threshold, or unknown, in either fit of a pair")
        return "\n".join(lines)


def compare(evidence: Mapping[str, Evidence]) -> Comparison:
    """Compares fits by the mean of log p(x) over the same held-out data points.

    Differences are paired point by point, so that what makes a point hard for every model cancels. Each difference has
    two errors: one from the finite number of points, and one from the finite number of particles.

    References:
        Vehtari & Lampinen (2002), Bayesian model assessment and comparison using cross-validation predictive densities.

    Args:
        evidence: {name: Evidence} of two or more fits, for the same points in the same order.

    Returns:
        `Comparison`.

    Raises:
        ValueError: there are fewer than two fits, or they have different numbers of points.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_vae import importance_sampling
        >>> def pair(noise):
        ...     def model(x):
        ...         with pyro.plate("data", len(x)):
        ...             z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...             pyro.sample("x", dist.Normal(z, noise), obs=x)
        ...     def guide(x):
        ...         with pyro.plate("data", len(x)):
        ...             pyro.sample("z", dist.Normal(x / 2, 1.0))
        ...     return model, guide
        >>> x = torch.randn(200) * 2**0.5
        >>> fits = {f"noise {s}": importance_sampling(*pair(s), x, num_particles=1000) for s in (1.0, 3.0)}
        >>> list(compare(fits).evidence)
        ['noise 1.0', 'noise 3.0']
    """
    if not isinstance(evidence, Mapping) or not all(isinstance(e, Evidence) for e in evidence.values()):
        raise TypeError(
            f"compare: expected {{name: Evidence}}, got {type(evidence).__name__}. Try {{'a': first, 'b': second}}."
        )
    if len(evidence) < 2:
        raise ValueError(f"compare: expected at least two fits, got {list(evidence)}. Try {{'a': first, 'b': second}}.")
    sizes = {name: len(e.log_evidence) for name, e in evidence.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(
            f"compare: expected the same data points in all, got {sizes}. Try to evaluate on one test set."
        )
    finite = torch.stack([torch.isfinite(e.log_evidence) for e in evidence.values()]).all(0)

    def mean(e: Evidence) -> float:
        return e.log_evidence[finite].mean().nan_to_num(-torch.inf).item()

    ordered = dict(sorted(evidence.items(), key=lambda item: mean(item[1]), reverse=True))
    (_, best), *others = ordered.items()
    differences = {name: _difference(e, best) for name, e in others}
    return Comparison(ordered, differences)


def _difference(first: Evidence, second: Evidence) -> Difference:
    difference = first.log_evidence - second.log_evidence
    variance = first.standard_error.square() + second.standard_error.square()
    finite, doubtful = torch.isfinite(difference), first.doubtful | second.doubtful
    x, n = difference[finite], int(finite.sum())
    return Difference(
        mean=_mean(x),
        standard_error=x.std().item() / sqrt(n) if n > 1 else nan,
        monte_carlo_error=variance[finite].sum().sqrt().item() / max(n, 1),
        trusted_mean=_mean(difference[finite & ~doubtful]),
        num_points=n,
        num_doubtful=int(doubtful.sum()),
    )


def _mean(x: Tensor) -> float:
    return x.mean().item() if len(x) else nan
