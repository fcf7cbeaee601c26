r"""Annealed importance sampling, forwards (a lower bound of log p(x)) and backwards (an upper bound).

The densities f_b(u) = q₀(u)^{1−b} p(x, u)^b lead from a start q₀(u) to the joint density. With temperatures
0 = b₀ < b₁ < … < b_T = 1, a chain starts at u₁ ~ q₀ and moves u_t → u_{t+1} by a Hamiltonian transition that leaves
f_{b_t} invariant,

    log w = Σ_t (b_t − b_{t−1}) U(u_t),    U(u) = log p(x, u) − log q₀(u),    E w = p(x)

(Neal 2001, *Annealed importance sampling*). It follows that E log w ≤ log p(x), for any T and however badly the chain
mixes. The transitions must be exactly invariant, so that their step sizes and temperatures must not depend on the
chain. A pilot run with separate chains tunes both for each data point; then they are frozen.

Backwards, the chain starts at u_T, an exact draw from the posterior, and b falls from b_T. Exact draws are known for
data that are simulated from the model. Then E 1/w = 1/p(x), and −log 1/K Σ 1/w_k is an upper bound in expectation
(Grosse, Ghahramani & Adams 2015, *Sandwiching the marginal likelihood using bidirectional Monte Carlo*).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import inf, pi
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_vae.arguments import check_choice, checked
from pyro_vae.evidence.adaptive import FIRST_DRAWS, fit_gaussians
from pyro_vae.evidence.collect import collect
from pyro_vae.evidence.density import LatentDensity
from pyro_vae.evidence.evidence import UPPER_BOUND, Evidence
from pyro_vae.evidence.portions import Portions
from pyro_vae.evidence.proposals import Gaussians, Proposal, defined, from_guide, from_prior
from pyro_vae.pairs.seeds import seeded
from pyro_vae.pairs.threads import one_thread
from pyro_vae.particles.sampler import ParticleSampler

__all__ = ["annealed_draws", "annealed_importance_sampling"]

ACCEPTANCE = 0.8  # the rate of acceptance that the pilot run aims at
LEAPFROG_TENSORS = 4.0  # a gradient needs about this many times the tensors of a log-weight


@one_thread
@checked
@seeded
def annealed_importance_sampling(
    model: Callable,
    guide: Callable,
    *args: Any,
    num_particles: int = 32,
    num_temperatures: int = 200,
    num_leapfrog: int = 5,
    start: str = "guide",
    schedule: str = "sigmoid",
    plate: str | None = "data",
    exact_draw: Mapping[str, Tensor] | None = None,
    chunk_size: int | None = None,
    parallel: bool | str = "auto",
    seed: int | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = True,
    **kwargs: Any,
) -> Evidence:
    """Estimates log p(x) of each data point by annealed importance sampling with Hamiltonian Monte Carlo.

    For each point, K chains make T − 1 transitions of L gradients each. Before that, a pilot run with half of the
    chains and a quarter of the temperatures tunes the step sizes. The cost is K × T × L gradients, which is worth it if
    the weights of importance sampling are too heavy. The estimate is too low if T is too small for the distance from
    q₀ to the posterior; to check, compare starts, or T with 4 T. k-hat is unknown for K < 21, and crude for few chains.

    References:
        Neal (2001), Annealed importance sampling, Statistics and Computing 11, equations 9–11.
        Wu, Burda, Salakhutdinov & Grosse (2017), On the quantitative analysis of decoder-based generative models.
        Grosse, Ghahramani & Adams (2015), Sandwiching the marginal likelihood.

    Args:
        model: as in `importance_sampling`.
        guide: its guide.
        *args: what both are called with, as in `importance_sampling`.
        num_particles: K ≥ 1, number of chains for each point.
        num_temperatures: T ≥ 1, number of values of b above 0.
        num_leapfrog: L ≥ 1, number of gradients in a transition.
        start: q₀. "guide"; "prior"; or "adapted", the Gaussian that `adaptive_importance_sampling` fits. "adapted"
            needs the fewest temperatures, and also works for a guide whose density is not known.
        schedule: how the temperatures are spaced. "linear"; "sigmoid", slow at both ends; or "adaptive", with equal
            steps of ∫ √Var_b(U) db for each point, as estimated by the pilot run (Gelman & Meng 1998, section 4.2).
        plate: name of the plate of data points; None for the joint evidence of all data.
        exact_draw: {site: (N, *inner plates, *event)}, exact draws from the posterior, which are known only for
            simulated data. All chains run backwards from them, and the estimate is an upper bound.
        chunk_size: chains × rows in one pass.
        parallel: whether many particles run at once: True; False, one at a time; or "auto", at once where the pair
            allows it, and otherwise one at a time with a warning.
        seed: of the draws; None draws on from torch's generator.
        checkpoint: as in `importance_sampling`.
        progress: show a progress bar, if on a terminal.
        **kwargs: what both are called with.

    Returns:
        `Evidence`; log_evidence (N,) in nats is a lower bound in expectation. With `exact_draw` it is an upper bound,
        and its standard error leaves out the variance of the exact draw. The spread of the gap over many points
        shows that variance.

    Raises:
        ValueError: as in `importance_sampling`; an option is out of its range; a discrete latent is not marked for
            enumeration.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 0.1), obs=x)
        >>> def guide(x):  # far too wide
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
        >>> pyro.set_rng_seed(0)
        >>> evidence = annealed_importance_sampling(model, guide, torch.tensor([0.0, 2.0]), num_temperatures=50)
        >>> exact = dist.Normal(0.0, 1.01**0.5).log_prob(torch.tensor([0.0, 2.0]))
        >>> bool(((evidence.log_evidence - exact).abs() < 4 * evidence.standard_error).all())
        True
    """
    for name, value, known in (("start", start, STARTS), ("schedule", schedule, ("linear", "sigmoid", "adaptive"))):
        check_choice(name, value, known)
    portions = Portions(model, guide, args, kwargs, plate, exact_draw, checkpoint)
    sampler = ParticleSampler(model, guide, portions.args, portions.kwargs, plate=plate, parallel=parallel)

    def prepare(rows: slice) -> Callable[[int], Tensor]:
        density = LatentDensity(sampler, rows)
        path = STARTS[start](density, num_leapfrog)
        path = path.tuned(max(8, num_particles // 2), num_temperatures, schedule)
        exact = density.exact(exact_draw)
        if exact is None:
            return lambda count: path.forwards(count)[0]
        return lambda count: -path.backwards(exact.expand(count, -1, -1))

    evidence = collect(
        sampler,
        prepare,
        num_particles,
        method="annealed_importance_sampling",
        chunk_size=chunk_size,
        tensors=LEAPFROG_TENSORS,
        progress=progress,
        portions=portions,
        checkpoint=checkpoint,
        options={
            "seed": None if seed is None else int(seed),
            "plate": plate,
            "num_temperatures": num_temperatures,
            "num_leapfrog": num_leapfrog,
            "start": start,
            "schedule": schedule,
        },
    )
    if exact_draw is None:
        return evidence
    return replace(evidence, log_evidence=-evidence.log_evidence, bound=UPPER_BOUND)


def annealed_draws(density: LatentDensity, num_chains: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    """A function: count -> log-weights (count, N) and u (count, N, D) of new chains, with the defaults of
    `annealed_importance_sampling`."""
    path = STARTS["guide" if density.knows_guide else "adapted"](density, 5)
    path = path.tuned(min(64, max(8, num_chains // 2)), 200, "sigmoid")
    return lambda count: path.forwards(count)[:2]


class _State(NamedTuple):
    """K chains at N points: u (K, N, D), both log-densities (K, N), and their gradients in coordinates v (K, N, D)."""

    u: Tensor
    log_start: Tensor
    log_joint: Tensor
    gradient_start: Tensor
    gradient_joint: Tensor

    @property
    def difference(self) -> Tensor:
        """U(u), (K, N)."""
        return self.log_joint - self.log_start

    def log_density(self, b: Tensor) -> Tensor:
        return self.log_start + b * self.difference

    def gradient(self, b: Tensor) -> Tensor:
        b = b.unsqueeze(-1)
        return (1 - b) * self.gradient_start + b * self.gradient_joint


@dataclass(frozen=True)
class _Path:
    """The path from q₀ to p(x, u) for N points, in coordinates v in which q₀ has about unit covariance."""

    density: LatentDensity
    start: Proposal
    shape: Gaussians  # u = loc + scale_tril v
    num_leapfrog: int
    temperatures: Tensor | None = None  # b, (T + 1, N)
    step_sizes: Tensor | None = None  # of the transition at each temperature, (T + 1, N)

    def forwards(self, num_chains: int, *, tune: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """log w, (K, N); u, (K, N, D); step sizes, which adapt along the way if `tune`; variances of U; the last two
        (T + 1, N)."""
        u, outside = defined(self.start.draw(num_chains))
        state = self._evaluate(u)
        log_weight, steps = torch.zeros_like(state.log_start), self.step_sizes.clone()
        variances = [state.difference.var(0, correction=0)]
        for t in range(1, len(steps)):
            b = self.temperatures[t]
            log_weight = log_weight + (b - self.temperatures[t - 1]) * state.difference
            if t + 1 == len(steps) and not tune:
                break  # the last transition changes no weight
            for _ in range(10 if tune and t == 1 else 1):
                state, acceptance = self._transition(state, b, steps[t])
                if tune:
                    steps[t:] = (steps[t] * (0.7 * (acceptance - ACCEPTANCE)).exp()).clamp(1e-4, self._longest)
            variances.append(state.difference.var(0, correction=0))
        return log_weight.masked_fill(outside, -inf), state.u, steps, torch.stack(variances)

    def backwards(self, u: Tensor) -> Tensor:
        """log w, (K, N), of chains that run backwards from exact posterior draws u."""
        state = self._evaluate(u)
        log_weight = torch.zeros_like(state.log_start)
        for t in range(len(self.step_sizes) - 1, 0, -1):
            b = self.temperatures[t - 1]
            log_weight = log_weight + (self.temperatures[t] - b) * state.difference
            if t > 1:
                state, _ = self._transition(state, b, self.step_sizes[t - 1])
        return log_weight

    def tuned(self, num_chains: int, num_temperatures: int, schedule: str) -> _Path:
        """The same path, with temperatures and step sizes from a pilot run of separate chains, which adapt freely."""
        pilot = _schedule(max(min(10, num_temperatures), num_temperatures // 4), schedule).to(self.shape.loc)
        pilot = pilot.unsqueeze(-1).expand(-1, len(self.shape.loc))
        steps = torch.full_like(pilot, self._longest / 2)
        _, _, steps, variances = replace(self, temperatures=pilot, step_sizes=steps).forwards(num_chains, tune=True)
        uniform = torch.linspace(0, 1, num_temperatures + 1).to(pilot).unsqueeze(-1).expand(-1, pilot.shape[1])
        if schedule == "adaptive":
            speed = variances.sqrt().nan_to_num(0.0, posinf=0.0)
            speed = speed + 0.05 * speed.mean(0) + torch.finfo(speed.dtype).tiny
            length = ((speed[1:] + speed[:-1]) / 2 * pilot.diff(dim=0)).cumsum(0)
            length = torch.cat([torch.zeros_like(length[:1]), length / length[-1]])
            temperatures = _interpolate(uniform, length, pilot)
        else:
            temperatures = _schedule(num_temperatures, schedule).to(pilot).unsqueeze(-1).expand_as(uniform)
        step_sizes = _interpolate(temperatures, pilot, steps.log()).exp()
        return replace(self, temperatures=temperatures, step_sizes=step_sizes)

    # -- Hamiltonian Monte Carlo --------------------------------------------------------------------------------------

    @property
    def _longest(self) -> float:
        """The step size for which a trajectory covers a quarter of a unit Gaussian's period, where it forgets most."""
        return pi / 2 / self.num_leapfrog

    def _transition(self, state: _State, b: Tensor, step_size: Tensor) -> tuple[_State, Tensor]:
        """A transition that leaves f_b invariant, and its mean acceptance, (N,). Never accepts what is not finite."""
        # step sizes vary from one transition to the next, so that trajectories do not close on themselves
        step = (step_size * (0.6 + 0.4 * torch.rand_like(state.log_start))).unsqueeze(-1)
        momentum = torch.randn_like(state.u)
        energy = state.log_density(b) - 0.5 * momentum.square().sum(-1)
        new = state
        for _ in range(self.num_leapfrog):
            momentum = momentum + 0.5 * step * new.gradient(b)
            new = self._evaluate(new.u + torch.einsum("nij,knj->kni", self.shape.scale_tril, step * momentum))
            momentum = momentum + 0.5 * step * new.gradient(b)
        log_ratio = new.log_density(b) - 0.5 * momentum.square().sum(-1) - energy
        accept = torch.rand_like(log_ratio).log() < log_ratio
        chosen = (
            torch.where(accept.view(accept.shape + (1,) * (n.dim() - 2)), n, s) for n, s in zip(new, state, strict=True)
        )
        return _State(*chosen), log_ratio.exp().clamp(max=1.0).nan_to_num(0.0).mean(0)

    def _evaluate(self, u: Tensor) -> _State:
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            terms = self.density.log_all(u) if self.start.needs_guide else self.density.log_joint(u)
            log_start, log_joint = self.start.log_prob(u, terms), terms[0] + terms[1]
            gradients = [torch.autograd.grad(f.sum(), u, retain_graph=True)[0] for f in (log_start, log_joint)]
        gradients = [torch.einsum("nij,kni->knj", self.shape.scale_tril, g) for g in gradients]
        return _State(u.detach(), log_start.detach(), log_joint.detach(), *gradients)


def _from_draws(density: LatentDensity, start: Proposal, num_leapfrog: int) -> _Path:
    return _Path(density, start, Gaussians.around(start.draw(FIRST_DRAWS)), num_leapfrog)


def _from_fit(density: LatentDensity, num_leapfrog: int) -> _Path:
    shape = fit_gaussians(density)
    return _Path(density, shape.proposal(), shape, num_leapfrog)


STARTS: dict[str, Callable[[LatentDensity, int], _Path]] = {
    "guide": lambda density, num_leapfrog: _from_draws(density, from_guide(density), num_leapfrog),
    "prior": lambda density, num_leapfrog: _from_draws(density, from_prior(density), num_leapfrog),
    "adapted": _from_fit,
}


def _schedule(num_temperatures: int, schedule: str) -> Tensor:
    """b₀ = 0, …, b_T = 1: rescaled sigmoid(4 (2t/T − 1)), or linear, as in the pilot run of the adaptive schedule."""
    t = torch.linspace(-4, 4, num_temperatures + 1, dtype=torch.float64)
    b = t.sigmoid() if schedule == "sigmoid" else t
    return (b - b[0]) / (b[-1] - b[0])


def _interpolate(x: Tensor, known_x: Tensor, known_y: Tensor) -> Tensor:
    """Piecewise linear y(x) for each column: x is (m, N); known_x, which increases, and known_y are (l, N)."""
    right = torch.searchsorted(known_x.T.contiguous(), x.T.contiguous()).T.clamp(1, len(known_x) - 1)
    x0, x1, y0, y1 = (known.gather(0, i) for known in (known_x, known_y) for i in (right - 1, right))
    share = ((x - x0) / (x1 - x0).clamp(min=torch.finfo(x.dtype).tiny)).clamp(0, 1)
    return y0 + share * (y1 - y0)
