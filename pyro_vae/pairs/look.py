"""One quiet run of a model and guide, to see what they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_vae.pairs.handlers import SetSubsample, SetValues
from pyro_vae.pairs.modes import evaluation_mode, fork_random_state
from pyro_vae.pairs.sites import plate_frames, sample_sites, site_log_prob
from pyro_vae.pairs.untouched import Untouched

__all__ = ["Look", "look"]


class Look(NamedTuple):
    """Traces of a guide and of the model replayed against it.

    Attributes:
        guide: trace of the guide.
        model: trace of the model.
        set_up: whether the run set something up, as first runs do.
        log_probs: {site: log-probability} of both; None where it failed, no entry where it is not known (a flow without
            an inverse).
    """

    guide: poutine.Trace
    model: poutine.Trace
    set_up: bool
    log_probs: tuple[dict[str, Tensor | None], dict[str, Tensor | None]]

    def frame(self, plate: str | None) -> Any:
        """The plate of this name as one of its sites saw it, or None."""
        return next((f for f in plate_frames(self.guide, self.model) if f.name == plate), None)

    def size(self, plate: str | None) -> int | None:
        """Rows in a plate; one that was declared without a size has that of its sites. None: there is no such plate."""
        frame = self.frame(plate)
        if frame is None or frame.size > 0:
            return frame and frame.size
        sites = [site for trace in (self.guide, self.model) for site in sample_sites(trace).values()]
        shapes = [site["fn"].batch_shape for site in sites if frame in site["cond_indep_stack"]]
        return max((shape[frame.dim] for shape in shapes if len(shape) >= -frame.dim), default=1)

    def subsamples(self) -> dict[str, Tensor]:
        """The indices that plates drew, {plate: indices}."""
        nodes = [node for trace in (self.model, self.guide) for node in trace.nodes.values()]
        drawn = {n["name"]: n["value"] for n in nodes if n["type"] == "sample" and site_is_subsample(n)}
        return {name: value for name, value in drawn.items() if isinstance(value, Tensor)}


def look(
    model: Callable,
    guide: Callable,
    args: tuple,
    kwargs: Mapping[str, Any],
    *,
    values: Mapping[str, Tensor] | None = None,
    subsamples: Mapping[str, Tensor] | None = None,
    keep: bool = False,
) -> Look:
    """Runs a guide and its model once, without gradients and in evaluation mode, and changes nothing.

    Random states, modes of modules, attributes of the pair's objects, Pyro's parameter store and its validation setting
    are afterwards what they were before.

    Args:
        model: the model.
        guide: its guide.
        args: what both are called with.
        kwargs: what both are called with.
        values: set latent sites to these.
        subsamples: set the indices of plates to these.
        keep: leave what the run set up in place, as any first call of the pair does; random states are restored still.
    """
    given, drawn = SetValues(dict(values or {})), SetSubsample(dict(subsamples or {}))
    with (
        fork_random_state(),
        torch.no_grad(),
        poutine.block(),
        pyro.validation_enabled(False),
        Untouched(model, guide, keep=keep) as state,
        evaluation_mode(model, guide),
    ):
        guide_trace = poutine.trace(drawn(given(guide))).get_trace(*args, **kwargs)
        replayed = poutine.replay(drawn(given(model)), guide_trace)
        model_trace = poutine.trace(replayed).get_trace(*args, **kwargs)
        log_probs = _log_probs(guide_trace), _log_probs(model_trace)  # here, as they may run modules too
    return Look(guide_trace, model_trace, state.set_up, log_probs)


def _log_probs(trace: poutine.Trace) -> dict[str, Tensor | None]:
    found: dict[str, Tensor | None] = {}
    for name, site in sample_sites(trace).items():
        try:
            found[name] = site_log_prob(site)
        except (NotImplementedError, KeyError):  # a flow without an inverse scores nothing but its own draws
            continue
        except Exception:  # wrong shapes, which the tools speak about
            found[name] = None
    return found
