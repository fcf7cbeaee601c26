"""What `doubtful_rows` finds: reasons to doubt each row, the worst first."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vae.evidence.evidence import Evidence

__all__ = ["DoubtfulRows"]

SHOWN = 10  # rows of the table that is printed


@dataclass(frozen=True, repr=False)
class DoubtfulRows:
    """Reasons to doubt the posterior of each of N data points; `print` shows the worst ten.

    Attributes:
        evidence: `Evidence` by the guide's draws, with k-hat and effective sample size.
        variance: of the log-weights, (N,), float64; infinite where a weight is zero.
        p_evidence: p-value of log p̂(x) among simulated rows, two-sided, (N,); NaN without simulations.
        p_variance: p-value of `variance` among them, small where it is large, (N,).
        p_value: of both together, (N,): the rank of the smaller one among those of simulated rows.
        level: of `p_value`, below which a row is called out of distribution.
        num_simulated: M.
    """

    evidence: Evidence
    variance: Tensor
    p_evidence: Tensor
    p_variance: Tensor
    p_value: Tensor
    level: float
    num_simulated: int

    @property
    def untrusted(self) -> Tensor:
        """Whether k-hat is too large or unknown, or log p̂(x) not finite, (N,), bool."""
        return self.evidence.doubtful

    @property
    def out_of_distribution(self) -> Tensor:
        """Whether `p_value` is at most `level`, (N,), bool: so are level × N rows of data that the model made."""
        return self.p_value <= self.level

    @property
    def order(self) -> Tensor:
        """Indices of the rows, the most doubtful first, (N,), int64: by the number of the two reasons above, then by
        k-hat, unknown ones first."""
        khat = self.evidence.pareto_khat.nan_to_num(torch.inf).masked_fill(
            ~self.evidence.log_evidence.isfinite(), torch.inf
        )
        by_khat = khat.argsort(descending=True, stable=True)
        reasons = self.untrusted.long() + self.out_of_distribution.long()
        return by_khat[reasons[by_khat].argsort(descending=True, stable=True)]

    def __repr__(self) -> str:
        n, found = len(self.variance), self.evidence
        lines = [
            f"Doubtful rows of {n}, by {found.num_particles} draws of the guide each and {self.num_simulated} rows of "
            "simulated data",
            f"  {int(self.untrusted.sum())} not to trust (k-hat above {found.threshold:.2f}), "
            f"{int(self.out_of_distribution.sum())} out of distribution (p ≤ {self.level:g}; "
            f"{self.level * n:.0f} expected of data from the model)",
            "     row  k-hat     ESS    log p(x)  sd log w  p-value  reasons",
        ]
        for i in self.order[:SHOWN].tolist():
            reasons = [
                name
                for name, which in (("weights", self.untrusted), ("unlike the model", self.out_of_distribution))
                if which[i]
            ]
            lines.append(
                f"{i:8d} {found.pareto_khat[i]:6.2f} {found.effective_sample_size[i]:7.1f} "
                f"{found.log_evidence[i]:11.3f} {self.variance[i].sqrt():9.2f} {self.p_value[i]:8.4f}  "
                + ", ".join(reasons)
            )
        return "\n".join(lines)
