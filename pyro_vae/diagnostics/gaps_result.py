"""What `inference_gaps` finds: two gaps for each data point, with their errors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyro_vae.evidence.evidence import Evidence

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["InferenceGaps"]


@dataclass(frozen=True, repr=False)
class InferenceGaps:
    """Gaps between log p(x) and the ELBO of a guide for N data points, in nats; `print` gives a table of means.

    Attributes:
        evidence: `Evidence`, of log p(x).
        best: ELBO[q*], of the best Gaussian of each row, (N,), float64.
        best_error: its standard error, (N,).
        elbo: ELBO[q_φ], of the guide, (N,), float64.
        elbo_error: its standard error, (N,).
        family: of q*: "diagonal" or "full".
        is_gaussian: whether the guide's q(u|x) is a Gaussian in the unconstrained coordinates u, (N,), bool. Where it
            is not, it may be better than the best Gaussian, and the amortization gap below zero.
    """

    evidence: Evidence
    best: Tensor
    best_error: Tensor
    elbo: Tensor
    elbo_error: Tensor
    family: str
    is_gaussian: Tensor

    @property
    def approximation(self) -> Tensor:
        """log p(x) − ELBO[q*], (N,)."""
        return self.evidence.log_evidence - self.best

    @property
    def approximation_error(self) -> Tensor:
        """Standard error of `approximation`, (N,)."""
        return torch.hypot(self.evidence.standard_error, self.best_error)

    @property
    def amortization(self) -> Tensor:
        """ELBO[q*] − ELBO[q_φ], (N,)."""
        return self.best - self.elbo

    @property
    def amortization_error(self) -> Tensor:
        """Standard error of `amortization`, (N,)."""
        return torch.hypot(self.best_error, self.elbo_error)

    @property
    def inference(self) -> Tensor:
        """log p(x) − ELBO[q_φ], (N,)."""
        return self.evidence.log_evidence - self.elbo

    def __repr__(self) -> str:
        rows = {
            "log p(x)": (self.evidence.log_evidence, self.evidence.standard_error),
            "ELBO of the best q": (self.best, self.best_error),
            "ELBO of the guide": (self.elbo, self.elbo_error),
            "approximation gap": (self.approximation, self.approximation_error),
            "amortization gap": (self.amortization, self.amortization_error),
        }
        n, doubtful, others = len(self.best), int(self.evidence.doubtful.sum()), int((~self.is_gaussian).sum())
        lines = [f"Inference gaps of {n} data point{'s' * (n != 1)}, best {self.family} Gaussian for each (nats)"]
        for name, (value, error) in rows.items():
            known = value.isfinite()
            mean, of_mean = value[known].mean(), error[known].square().sum().sqrt() / max(int(known.sum()), 1)
            lines.append(f"  {name:20s} mean {mean:9.3f} ± {of_mean:.3f}, median {value.nanmedian():9.3f}")
        if doubtful:
            lines.append(f"  log p(x) of {doubtful} of {n} points is not to trust: their first gap is too small")
        if others:
            better = int((~self.is_gaussian & (self.amortization < -2 * self.amortization_error)).sum())
            lines.append(f"  the guide is no Gaussian at {others} points, and better than the best one at {better}")
        return "\n".join(lines)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draws both gaps of each data point, one on top of the other, the largest sum first.

        Args:
            ax: where to draw; default: a new figure.

        Returns:
            The axes.
        """
        if ax is None:
            from matplotlib import pyplot

            ax = pyplot.subplots(layout="constrained")[1]
        order = self.inference.argsort(descending=True).cpu()
        gaps = [gap.cpu()[order].clamp(min=0.0).numpy() for gap in (self.approximation, self.amortization)]
        labels = f"approximation (best {self.family} Gaussian)", "amortization (network)"
        ax.stackplot(range(len(order)), *gaps, labels=labels, colors=("tab:blue", "tab:orange"), step="mid")
        ax.set(xlabel="data point, sorted", ylabel="gap (nats)")
        ax.legend(frameon=False)
        ax.spines[["top", "right"]].set_visible(False)
        return ax
