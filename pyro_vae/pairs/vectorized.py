"""A check that many particles at once give what each of them gives alone.

Particles take a dimension of their own, left of those of the pair's plates. Code that counts dimensions from the right
does not see it; `softmax(z, 1)` or `z[:, 0]` then mean another dimension than they did, and may go on without an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_vae.pairs.handlers import SetSubsample, SetValues
from pyro_vae.pairs.modes import evaluation_mode, fork_random_state
from pyro_vae.pairs.sites import site_log_prob
from pyro_vae.pairs.supports import bijection
from pyro_vae.pairs.untouched import Untouched

__all__ = ["PARTICLE_PLATE", "check_vectorized"]

TOGETHER = 6  # particles: two and their mirror images, and two far out, so that branches go to both of their sides
FAR = 4.0  # how far out, in unconstrained coordinates

PARTICLE_PLATE = "num_particles_vectorized"  # as Pyro's own vectorized ELBOs call it
ADVICE = (
    "Many particles run at once, in a dimension left of the plates, as under Trace_ELBO(vectorize_particles=True). Try "
    "to count dimensions from the right (z[..., 0], softmax(-1)), and to expand what is concatenated with a latent "
    "value to its batch shape."
)


def check_vectorized(
    pair: tuple[Callable, Callable],
    args: tuple,
    kwargs: dict,
    looks: Sequence[poutine.Trace],
    width: int,
    subsamples: dict[str, Tensor],
    *,
    computed: bool = False,
) -> None:
    """Runs a pair for some particles together, and again for each of them alone, and compares.

    Args:
        pair: the guide and the model.
        args: what both are called with; some rows will do.
        kwargs: the same.
        looks: traces of both, for whatever rows, without particles.
        width: batch dimensions under the plate of particles.
        subsamples: {plate: indices} of plates that draw some, the same in both runs.
        computed: compare the values of `pyro.deterministic` sites too.

    Raises:
        ValueError: the pair does not run for several, or one of its sites has another log-probability then.
    """
    values: dict[str, Tensor] = {}
    with (
        fork_random_state(),
        torch.no_grad(),
        evaluation_mode(*pair),
        pyro.validation_enabled(False),
        poutine.block(),
        SetSubsample(subsamples),
        Untouched(*pair),
    ):
        for role, function, look in zip(("guide", "model"), pair, looks, strict=True):
            plate = pyro.plate(PARTICLE_PLATE, TOGETHER, dim=-width)
            try:
                together = _sites(plate(function), values, args, kwargs)
            except Exception as error:
                reason = str(error).strip().partition("\n")[0]
                raise ValueError(f"the {role} does not run for two particles at once: {reason}. {ADVICE}") from error
            drawn = {name: site for name, site in together.items() if not site["is_observed"]}
            new = {name: _mirrored(site, width) for name, site in drawn.items() if name not in values}
            if new:
                values |= new
                together = _sites(plate(function), values, args, kwargs)
            events = {name: len(site["fn"].event_shape) for name, site in drawn.items()}
            for k in range(TOGETHER):
                own = {}
                for name, event in events.items():
                    one = _one(values[name], width + event, k)
                    dims = look.nodes[name]["value"].dim() if name in look.nodes else one.dim()
                    if one.numel() != one.shape[one.dim() - dims :].numel():
                        raise ValueError(
                            f"site {name!r} of the {role} has the shape {tuple(values[name].shape)} for {TOGETHER} "
                            f"particles, and {tuple(look.nodes[name]['value'].shape)} for one. {ADVICE}"
                        )
                    own[name] = one.reshape(one.shape[one.dim() - dims :])  # what is left of them has size one
                alone = _sites(function, own, args, kwargs)
                different = [
                    name
                    for name in together.keys() & alone.keys()
                    if _differs(together[name], alone[name], width, k, computed)
                ]
                for name in different:
                    if _same(alone[name], _sites(function, own, args, kwargs)[name]):
                        what = "value" if _is_computed(alone[name]) else "log-probability"
                        raise ValueError(
                            f"site {name!r} of the {role} has another {what} for one particle alone than for the same "
                            f"particle beside others. {ADVICE}"
                        )
                    # chance makes the difference: each particle needs its own, as it has alone
                    alike = {n: _repeated(v, width + events[n], k) for n, v in values.items() if n in events}
                    site = _sites(plate(function), {**values, **alike}, args, kwargs)[name]
                    value = site["value"] if _is_computed(site) else _log_prob(site)
                    if value is None or all(
                        torch.equal(_one(value, width, i), _one(value, width, 0)) for i in (1, 2, 3)
                    ):
                        raise ValueError(
                            f"site {name!r} of the {role} has chance in it that is no sample site, the same for all "
                            "particles. Try a sample site for what is drawn, or one draw for each particle, as in "
                            "torch.randn_like(z)."
                        )


def _differs(together: dict, alone: dict, width: int, k: int, computed: bool) -> bool:
    """Whether a site is another one for particle k beside others than alone."""
    if _is_computed(alone):
        return computed and not _is_one_of(together["value"], alone["value"], k)
    expected, got = _log_prob(alone), _log_prob(together)
    if expected is None or got is None:
        return False
    got = _one(got, width, k)
    if not torch.isfinite(got).all():  # far out
        return bool(torch.isfinite(expected).all())
    if not torch.isfinite(expected).all():
        return True
    return bool((got.sum() - expected.sum()).abs() > 1e-3 * (1 + expected.abs().sum()))


def _is_one_of(together: Tensor, alone: Tensor, k: int) -> bool:
    """Whether the value of one particle is the k-th of all, or that of all."""
    left = together.dim() - alone.dim()
    if left < 0:
        return False
    one = together if left == 0 else together.flatten(0, left - 1)
    if left and len(one) not in (1, TOGETHER):
        return False
    one = one if left == 0 else one[k if len(one) > 1 else 0]
    return one.shape == alone.shape and torch.allclose(one, alone, rtol=1e-3, atol=1e-4, equal_nan=True)


def _same(first: dict, second: dict) -> bool:
    if _is_computed(first):
        return torch.equal(first["value"], second["value"])
    return torch.equal(_log_prob(first), _log_prob(second))


def _is_computed(site: dict) -> bool:
    return bool(site["infer"].get("_deterministic"))


def _sites(function: Callable, values: dict[str, Tensor], args: tuple, kwargs: dict) -> dict[str, dict]:
    with SetValues(values):
        trace = poutine.trace(function).get_trace(*args, **kwargs)
    return {n: s for n, s in trace.nodes.items() if s["type"] == "sample" and not site_is_subsample(s)}


def _mirrored(site: dict, width: int) -> Tensor:
    """Values of four particles, of which every second is the one before it, mirrored at the middle of the support, and
    of two far out: a branch on a sign or a size that particles may reach goes to both of its sides."""
    value, fn = site["value"], site["fn"]
    axis = value.dim() - width - len(fn.event_shape)
    try:
        transform = bijection(site["name"], fn)
        if axis != 0 or len(value) != TOGETHER or not value.is_floating_point():
            return value
        u = transform.inv(value)
        far = FAR * (1 + u[:1].abs())
        new = transform(torch.cat([u[:1], -u[:1], u[2:3], -u[2:3], far, -far]))
    except Exception:  # discrete, or without a bijection, or one that depends on the particle
        return value
    return torch.where(new.isfinite(), new, value) if new.shape == value.shape else value


def _repeated(value: Tensor, width: int, k: int) -> Tensor:
    """The values of one particle for all of them."""
    if value.dim() < width or value.shape[-width] == 1:
        return value
    return value.select(-width, k).unsqueeze(-width).expand_as(value)


def _one(value: Tensor, width: int, k: int) -> Tensor:
    """Of one particle; particles are the dimension that is `width` from the right, if it is there."""
    return value.select(-width, k) if value.dim() >= width and value.shape[-width] > 1 else value


def _log_prob(site: dict) -> Tensor | None:
    """log p of a site; None where it has none that could be compared."""
    if isinstance(site["fn"], dist.Delta):
        return None
    try:
        value = site_log_prob(site)
    except Exception:  # flows that cannot be inverted; wrong shapes, which the tools speak about
        return None
    return value
