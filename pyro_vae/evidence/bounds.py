r"""Both sides of log p(x) at once, on data simulated from the model.

If (z*, x) ~ p(z) p(x|z) is simulated, z* is an exact draw from the posterior p(z|x). Without this draw, an estimator is
a lower bound; with it, the estimator is an upper bound, so that in expectation

    E log p̂_lower(x) ≤ E log p(x) ≤ E log p̂_upper(x).

In expectation, the gap is at least as large as the bias of either side. It therefore shows how far the estimator can be
trusted on data that the model generates. Real data may differ from these, and an amortized guide may be better or
worse there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import nan, sqrt
from typing import Any

import torch
from torch import Tensor

from pyro_vae.arguments import checked
from pyro_vae.evidence.annealed import annealed_importance_sampling
from pyro_vae.evidence.evidence import Evidence
from pyro_vae.pairs.seeds import seeded
from pyro_vae.pairs.threads import one_thread
from pyro_vae.particles.simulation import simulate

__all__ = ["Sandwich", "sandwich"]


@dataclass(frozen=True, repr=False)
class Sandwich:
    """A lower and an upper bound of log p(x), in expectation, for N simulated data points.

    Attributes:
        lower: `Evidence` of the data, a lower bound.
        upper: `Evidence` of the same data by the same method, an upper bound.
    """

    lower: Evidence
    upper: Evidence

    @property
    def gap(self) -> Tensor:
        """upper − lower, (N,), nats. The gap of a single point may be negative."""
        return self.upper.log_evidence - self.lower.log_evidence

    @property
    def mean(self) -> tuple[float, float]:
        """Mean gap over the points where it is finite, and the standard error of this mean (NaN for one point)."""
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


@one_thread
@checked
@seeded
def sandwich(
    model: Callable,
    guide: Callable,
    *args: Any,
    estimator: Callable[..., Evidence] = annealed_importance_sampling,
    plate: str | None = "data",
    parallel: bool | str = "auto",
    seed: int | None = None,
    **options: Any,
) -> Sandwich:
    """Simulates data from the model and bounds their log p(x) from both sides; `print` shows the gap.

    References:
        Grosse, Ghahramani & Adams (2015), Sandwiching the marginal likelihood using bidirectional Monte Carlo.
        Sobolev & Vetrov (2019), Importance Weighted Hierarchical Variational Inference.

    Args:
        model: as in `simulate`.
        guide: its guide.
        *args: what both are called with. They determine how many data points are simulated, and their context.
        estimator: `annealed_importance_sampling`, `adaptive_importance_sampling` or `importance_sampling`.
        plate: name of the plate of data points.
        parallel: whether many particles run at once: True; False, one at a time; or "auto", at once where the pair
            allows it, and otherwise one at a time with a warning.
        seed: of the draws; None draws on from torch's generator.
        **options: options of the estimator. Tensors among them are arguments of the model and guide.

    Returns:
        `Sandwich`.

    Raises:
        ValueError: as in `simulate` and in the estimator.

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
    inputs: dict[str, Any] = {name: value for name, value in options.items() if isinstance(value, Tensor)}
    options = {name: value for name, value in options.items() if name not in inputs}
    simulation = simulate(model, guide, *args, plate=plate, parallel=parallel, **inputs)
    options = {"plate": plate, "parallel": parallel, **simulation.kwargs, **options}
    lower = estimator(model, guide, *simulation.args, **options)
    return Sandwich(lower, estimator(model, guide, *simulation.args, exact_draw=simulation.latents, **options))
