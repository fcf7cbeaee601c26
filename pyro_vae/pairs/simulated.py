"""Data simulated from a model, in the place of the arguments that it observes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_vae.pairs.sites import site_log_prob, site_mask

__all__ = ["check_generates", "observed_arguments", "with_simulated"]

Key = int | str  # of an argument: its position, or its name


def observed_arguments(
    observed: Mapping[str, dict], drawn: Mapping[str, dict], args: tuple, kwargs: Mapping[str, Any]
) -> dict[str, list[Key]]:
    """The arguments that a model observes as they are, or reshaped, {site: positions and names}.

    Args:
        observed: the observed sites of a trace of the model with these arguments.
        drawn: the sites of a trace of the same model, unconditioned.
        args: of the model.
        kwargs: of the model.

    Raises:
        ValueError: an observed value that is none of the arguments, or of another size than a draw of its site.
    """
    arguments: list[tuple[Key, Any]] = [*enumerate(args), *kwargs.items()]
    inputs = {key: a for key, a in arguments if isinstance(a, Tensor)}
    found = {}
    for name, site in observed.items():
        value = site["value"]
        keys = [key for key, a in inputs.items() if _is_reshaped(a, value)]
        if not keys:
            raise ValueError(
                f"site {name!r}: its observed value is none of the arguments, so that it is not known where to put a "
                "simulated one. Try a model that observes an argument as it is, or simulate by hand and pass "
                "exact_draw={site: draws} to an estimator."
            )
        if drawn[name]["value"].numel() != value.numel():
            raise ValueError(
                f"site {name!r}: its distribution draws values of shape {tuple(drawn[name]['value'].shape)}, expected "
                f"{tuple(value.shape)}, that of its observed value, to simulate one. Try to expand its parameters."
            )
        found[name] = keys
    return found


def with_simulated(
    args: tuple, kwargs: Mapping[str, Any], keys: Mapping[str, list[Key]], drawn: Mapping[str, dict]
) -> tuple[tuple, dict[str, Any]]:
    """Arguments with draws in the place of what is observed; what is masked stays as it is.

    Args:
        args: of the model.
        kwargs: of the model.
        keys: of `observed_arguments`.
        drawn: the sites of a trace of the model, unconditioned.
    """
    replaced: dict[Key, Tensor] = {}
    for name, places in keys.items():
        value, mask = drawn[name]["value"], site_mask(drawn[name])
        for key in places:
            given = args[key] if isinstance(key, int) else kwargs[key]
            new = value
            if mask is not None:  # where nothing is observed, the guide expects what stands there in data
                event = (1,) * len(drawn[name]["fn"].event_shape)
                new = torch.where(mask.reshape(mask.shape + event), value, given.reshape(value.shape).to(value))
            replaced[key] = new.reshape(given.shape).to(given.dtype)
    return (
        tuple(replaced.get(i, a) for i, a in enumerate(args)),
        {name: replaced.get(name, a) for name, a in kwargs.items()},
    )


def check_generates(drawn: Mapping[str, dict], sites: Mapping[str, dict]) -> None:
    """Raises ValueError where a model reads what it observes: data drawn in its place are no draw from the model.

    Args:
        drawn: the sites of a trace of the model, unconditioned.
        sites: those of a trace of the model with the simulated arguments and the same latents.
    """
    for name in sites.keys() & drawn.keys():
        before, after = (site_log_prob({**s, "value": drawn[name]["value"]}) for s in (drawn[name], sites[name]))
        before, after = torch.broadcast_tensors(before, after)
        if not torch.allclose(before, after, rtol=1e-3, atol=1e-3, equal_nan=True):
            raise ValueError(
                f"site {name!r}: its distribution depends on an argument that the model observes, so that data drawn "
                "in its place are no draw from the model. Try to pass what the model reads (a mean of x, its "
                "last step) as an argument of its own, or to simulate by hand."
            )


def _is_reshaped(argument: Tensor, value: Tensor) -> bool:
    """Whether a value is an argument itself, or a view of all its elements in their order."""
    if argument.data_ptr() != value.data_ptr() or argument.numel() != value.numel():
        return False
    steps = [[(n, step) for n, step in zip(t.shape, t.stride(), strict=True) if n > 1] for t in (argument, value)]
    return steps[0] == steps[1] or (argument.is_contiguous() and value.is_contiguous())
