"""Pairs with discrete states of time steps, which are summed out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoNormal

from pyro_examples.example import Example, Namespace, load

__all__ = ["EXAMPLES"]


def _no_latents(*args: object, **kwargs: object) -> None:
    """A guide of a model whose latents are all summed out."""


def _hmm(checkout: Path, number: int, guide: type = AutoNormal) -> Example:
    model = load(checkout, "hmm.py").models[str(number)]
    lengths = torch.tensor([4, 3, 4, 2])
    sequences = (torch.rand(4, 4, 3) < 0.4).float() * (torch.arange(4) < lengths[:, None])[..., None]
    sizes = {"hidden_dim": 4 if number in (3, 4) else 2, "nn_dim": 6, "nn_channels": 2}
    args = Namespace(**sizes, jit=False, raftery_parameterization=False)
    nesting = 1 if number in (0, 7) else 2
    shared = number != 6  # which has parameters in place of priors
    own = guide(poutine.block(model, expose_fn=lambda m: m["name"].startswith("probs_"))) if shared else _no_latents
    elbo = TraceEnum_ELBO(max_plate_nesting=nesting, strict_enumeration_warning=False)
    common = {"plate": "sequences", "joint": shared, "summed": nesting, "steps": 60, "elbo": elbo}
    return Example(model, own, (sequences, lengths, args), **common)


def _mixed_hmm(checkout: Path, group: str | None, individual: str | None) -> Example:
    module, shape = load(checkout, "mixed_hmm/model.py"), (3, 2, 3)
    missing = 1e-6
    step = torch.where(torch.rand(shape) < 0.2, missing, torch.rand(shape) + 0.5)
    observations = {"step": step, "angle": torch.rand(shape) * 2 - 1, "omega": torch.rand(shape) * 0.9 + 0.05}
    there = torch.ones(3, 2, dtype=torch.bool)
    there[2, 1] = False
    times = there[..., None].repeat(1, 1, 3)
    times[0, 0, 2] = False
    config = {
        "MISSING": missing,
        "sizes": {"state": 2, "random": 2, "group": 2, "individual": 3, "timesteps": 3},
        "group": {"random": group, "fixed": None},
        "individual": {"random": individual, "fixed": None, "mask": there},
        "timestep": {"random": None, "fixed": None, "mask": times},
        "observations": observations,
    }
    model, guide = partial(module.model_generic, config), partial(module.guide_generic, config)
    elbo = TraceEnum_ELBO(max_plate_nesting=2, strict_enumeration_warning=False)
    return Example(model, guide, plate="group", summed=2, elbo=elbo, steps=60)


def _capture(checkout: Path, number: int) -> Example:
    model = load(checkout, "capture_recapture/cjs.py").models[str(number)]
    alive = torch.rand(10, 5).lt(0.8).float().cumprod(1)
    history = alive * torch.rand(10, 5).lt(0.7).float()
    history[torch.arange(10), torch.arange(10) % 4] = 1.0
    guide = AutoDiagonalNormal(poutine.block(model, expose_fn=lambda m: m["name"][:3] in ("phi", "rho")))
    common = {"plate": "animals", "joint": True, "summed": 1, "steps": 100}
    args = (history, (torch.arange(10) % 2).float())
    return Example(model, guide, args, elbo=TraceEnum_ELBO(max_plate_nesting=1), **common)


EFFECTS = [(None, None), ("discrete", "discrete"), ("continuous", "continuous"), ("continuous", "discrete")]
EXAMPLES: dict[str, Callable[[Path], Example]] = {
    **{f"hmm {i}, AutoNormal": partial(_hmm, number=i) for i in (0, 1, 2, 3, 4, 5, 7)},
    "hmm 6, all summed out": partial(_hmm, number=6),
    "hmm 1, AutoDelta": partial(_hmm, number=1, guide=AutoDelta),
    **{f"mixed_hmm, effects {g} and {i}": partial(_mixed_hmm, group=g, individual=i) for g, i in EFFECTS},
    **{f"capture_recapture {i}": partial(_capture, number=i) for i in (1, 3, 5)},
}
