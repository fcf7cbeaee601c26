r"""Both sides of log p(x) at once, on data simulated from the model.

A simulation (z*, x) ~ p(z) p(x|z) comes with an exact draw z* from the posterior p(z|x) of its data. With that draw the
estimators of `pyro_vae` are upper bounds, without it lower ones, and log p(x) lies between them, in expectation. The
gap bounds what is left of the bias of either, and so says how far an estimator can be trusted on data like the model's
own. Real data may lie elsewhere, where an amortized guide was trained better, or worse.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import nan, sqrt
from typing import Any

import torch
from torch import Tensor

from pyro_vae.evidence.annealed import annealed_importance_sampling
from pyro_vae.evidence.evidence import Evidence
from pyro_vae.particles.simulation import simulate

__all__ = ["Sandwich", "sandwich"]


@dataclass(frozen=True, repr=False)
class Sandwich:
    """A lower and an upper bound of log p(x), in expectation, for N simulated data points.

    Attributes:
        lower, upper: `Evidence` of the same data by the same method.
    """

    lower: Evidence
    upper: Evidence

    @property
    def gap(self) -> Tensor:
        """upper − lower, (N,), nats; single ones may be negative."""
        return self.upper.log_evidence - self.lower.log_evidence

    @property
    def mean(self) -> tuple[float, float]:
        """Mean gap over the finite points, and its standard error over these (NaN for one)."""
        gap = self.gap[torch.isfinite(self.gap)]
        return gap.mean().item(), gap.std().item() / sqrt(len(gap)) if len(gap) > 1 else nan

    def __repr__(self) -> str:
        (lower, spread, _), (upper, _, _), (gap, error) = self.lower.mean, self.upper.mean, self.mean
        return "\n".join(
            [
                f"Sandwich of {len(self.gap)} simulated data points by {self.lower.method}, "
                f"{self.lower.num_particles} particles each (nats)",
                f"  mean log p(x)          from {lower:.3f} to {upper:.3f}, ± {spread:.3f} (points)",
                f"  gap                    mean {gap:.3f} ± {error:.3f}, median {self.gap.nanmedian():.3f}, "
                f"largest {self.gap.nan_to_num(0).max():.3f}",
            ]
        )


def sandwich(
    model: Callable,
    guide: Callable,
    *args: Any,
    estimator: Callable[..., Evidence] = annealed_importance_sampling,
    plate: str | None = "data",
    **options: Any,
) -> Sandwich:
    """Simulates data from the model and bounds their log p(x) from both sides; `print` shows the gap.

    References:
        Grosse, Ghahramani & Adams (2015), Sandwiching the marginal likelihood using bidirectional Monte Carlo.
        Sobolev & Vetrov (2019), Importance Weighted Hierarchical Variational Inference.

    Args:
        model: as in `simulate`.
        guide: its guide.
        *args: what both are called with; how many data points are simulated, and with what context, is taken from here.
        estimator: `annealed_importance_sampling`, `adaptive_importance_sampling` or `importance_sampling`.
        plate: name of the plate of data points.
        **options: for the estimator; tensors among them are arguments of model and guide.

    Returns:
        `Sandwich`.

    Raises:
        ValueError: as `simulate` and the estimator.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 0.1), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x, 0.2))
        >>> pyro.set_rng_seed(0)
        >>> abs(sandwich(model, guide, torch.zeros(100), num_temperatures=50).mean[0]) < 0.05
        True
    """
    inputs = {name: value for name, value in options.items() if isinstance(value, Tensor)}
    options = {name: value for name, value in options.items() if name not in inputs}
    simulation = simulate(model, guide, *args, plate=plate, **inputs)
    options = {"plate": plate, **simulation.kwargs, **options}
    lower = estimator(model, guide, *simulation.args, **options)
    return Sandwich(lower, estimator(model, guide, *simulation.args, exact_draw=simulation.latents, **options))
