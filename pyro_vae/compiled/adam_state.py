r"""What a step of Adam is made of: its update of one parameter, and what of an optimizer has to be as it was.

A graph of the step takes the numbers of a group (rates, decay, ε) as inputs. It does not take which parameters there
are, where their moments lie, and how torch's own step is dressed up.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import optimizer as optimizers

__all__ = ["has_moments", "is_decoupled", "is_plain", "objects", "update", "values"]

EXTRAS = ("amsgrad", "maximize", "differentiable")  # what the graph has no operations for


def update(p: Tensor, m: Tensor, v: Tensor, g: Tensor, row: Tensor, decoupled: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The new parameter and moments. As in torch, numbers of half precision are computed with in single precision."""
    dtype = torch.promote_types(p.dtype, torch.float32)
    p, m, v, g = (t.to(dtype) for t in (p, m, v, g))
    rate1, beta2, rate2, size, root, eps, shrink = row.to(dtype).unbind()  # another parameter may have a wider one
    if decoupled:
        p = p * shrink
    else:
        g = g + shrink * p
    m, v = torch.lerp(m, g, rate1), v * beta2 + rate2 * g * g
    return p - size * m / (v.sqrt() * root + eps), m, v


def is_plain(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step is what the class of the optimizer says: no extras, no hooks, no other function in its place."""
    step = vars(optimizer).get("step")  # a scheduler wraps that of the class, to know that it was called
    return (
        not optimizer._optimizer_step_pre_hooks
        and not optimizer._optimizer_step_post_hooks
        and not optimizers._global_optimizer_pre_hooks
        and not optimizers._global_optimizer_post_hooks
        and (step is None or getattr(step, "__wrapped__", None) is type(optimizer).step)
        and not any(group.get(name) for group in optimizer.param_groups for name in EXTRAS)
    )


def is_decoupled(group: dict[str, Any]) -> bool:
    return bool(group.get("decoupled_weight_decay"))


def has_moments(p: Tensor, state: dict[str, Any]) -> bool:
    """Whether a parameter has taken a step of Adam that the graph can go on from."""
    moments = [state.get("exp_avg"), state.get("exp_avg_sq")]
    like = all(isinstance(t, Tensor) and (t.shape, t.dtype, t.device) == (p.shape, p.dtype, p.device) for t in moments)
    return like and isinstance(state.get("step"), Tensor) and not p.is_complex()


def objects(optimizer: torch.optim.Optimizer) -> list[Any]:
    """What an optimizer consists of, apart from the numbers of its groups, in an order that tells which is where."""
    found: list[Any] = []
    for group in optimizer.param_groups:
        found.append(is_decoupled(group))
        found.extend(group["params"])
    for state in optimizer.state.values():
        found.extend(state.values())
    return found


def values(counts: list[Tensor]) -> list[int]:
    """The values of step counts, with one wait if they are on a GPU."""
    return [int(n) for n in torch.stack([c.to(counts[0].device) for c in counts]).tolist()] if counts else []
