"""Statistics of HMC and NUTS for each draw. Pyro keeps divergences and running means alone."""

from __future__ import annotations

import copy
from typing import Any

from pyro.infer import HMC, NUTS
from torch import Tensor

__all__ = ["with_statistics"]


def with_statistics(kernel: HMC) -> HMC:
    """A kernel that samples as this one does, and keeps statistics of each draw for `from_pyro`.

    They come back from parallel chains too, and are what ArviZ asks of NUTS (energy, tree depth, …):
    `energy`, the Hamiltonian H = U(θ) + ½ rᵀr of each draw with the momentum it was reached with; `acceptance_rate`,
    the mean of min(1, exp(H₀ − H)) over a trajectory; `step_size`; `n_steps`, leapfrog steps; of NUTS `tree_depth`,
    doublings that were completed, and `reached_max_treedepth`.

    Args:
        kernel: a `pyro.infer.NUTS` or `pyro.infer.HMC` that has not run.

    Returns:
        A kernel of the same class, with the same settings, for `pyro.infer.MCMC`. Random numbers are the same.

    Raises:
        TypeError: another kernel.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> from pyro.infer import MCMC, NUTS
        >>> from pyro_vae import from_pyro
        >>> kernel = with_statistics(NUTS(lambda: pyro.sample("z", dist.Normal(0.0, 1.0))))
        >>> mcmc = MCMC(kernel, num_samples=20, warmup_steps=20, disable_progbar=True)
        >>> mcmc.run()
        >>> sorted(from_pyro(mcmc)["sample_stats"].data_vars)
        ['acceptance_rate', 'diverging', 'energy', 'lp', 'n_steps', 'reached_max_treedepth', 'step_size', 'tree_depth']
    """
    keeping = {HMC: _KeepingHMC, NUTS: _KeepingNUTS}.get(type(kernel))
    if keeping is None:
        raise TypeError(f"with_statistics: expected a pyro.infer.NUTS or HMC, got {type(kernel).__name__}.")
    kept = copy.copy(kernel)
    kept.__class__ = keeping
    kept._reset()
    return kept


class _KeepingHMC(HMC):
    """HMC that keeps statistics of each draw after the warm-up."""

    def _reset(self) -> None:
        super()._reset()
        self.statistics: dict[str, list] = {}
        self._kinetic: list[float] = []  # of the start, and of the states that follow

    def _kinetic_energy(self, r_unscaled: dict) -> Tensor:
        value = super()._kinetic_energy(r_unscaled)
        self._kinetic.append(float(value))
        return value

    def sample(self, params: dict) -> dict:
        mean, before = self._mean_accept_prob, self._z_last
        self._kinetic = []
        found = super().sample(params)
        draw = self._t - self._warmup_steps
        if draw > 0 and self._kinetic:
            accepted = draw * self._mean_accept_prob - (draw - 1) * (mean if draw > 1 else 0.0)
            self._keep(acceptance_rate=min(max(accepted, 0.0), 1.0), step_size=float(self.step_size))
            self._keep_trajectory(self._z_last is not before)
        return found

    def _keep_trajectory(self, moved: bool) -> None:
        kinetic = self._kinetic[-1] if moved else self._kinetic[0]
        self._keep(energy=float(self._potential_energy_last) + kinetic, n_steps=self.num_steps)

    def _keep(self, **values: Any) -> None:
        for name, value in values.items():
            self.statistics.setdefault(name, []).append(value)

    def diagnostics(self) -> dict:
        return {**super().diagnostics(), "statistics": self.statistics}


class _KeepingNUTS(_KeepingHMC, NUTS):
    """NUTS that keeps statistics of each draw after the warm-up."""

    def _reset(self) -> None:
        super()._reset()
        self._leaves: list[tuple[dict, float]] = []  # states of the trajectory, and their kinetic energies
        self._depth = self._nested = 0

    def sample(self, params: dict) -> dict:
        self._leaves, self._depth = [], 0
        return super().sample(params)

    def _build_basetree(self, *args: Any) -> Any:
        info = super()._build_basetree(*args)
        self._leaves.append((info.z_proposal, self._kinetic[-1]))
        return info

    def _build_tree(self, *args: Any) -> Any:
        self._nested += 1
        info = super()._build_tree(*args)
        self._nested -= 1
        if not self._nested:
            self._depth += not (info.turning or info.diverging)
        return info

    def _keep_trajectory(self, moved: bool) -> None:
        kinetic = next((k for z, k in self._leaves if z is self._z_last), self._kinetic[0])
        self._keep(energy=float(self._potential_energy_last) + kinetic, n_steps=len(self._leaves))
        self._keep(tree_depth=self._depth, reached_max_treedepth=self._depth >= self._max_tree_depth)
