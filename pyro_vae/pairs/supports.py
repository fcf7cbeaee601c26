"""Where a prior has mass: its support as the estimators take it, and draws outside of it.

A draw of a guide outside the support of the prior has p(z) = 0 and so the weight zero, whatever `log_prob` makes of it
when it is not asked to validate: a number (Exponential, Weibull), or NaN (Gamma, Beta, LogNormal).
"""

from __future__ import annotations

from itertools import takewhile
from math import inf, pi
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions import AffineTransform, Independent, MixtureSameFamily, TransformedDistribution, biject_to

__all__ = ["bijection", "inside_support", "support_of"]

CIRCULAR = (torch.distributions.VonMises, dist.SineBivariateVonMises)
# sums and norms of rounded numbers are not exactly one; torch allows 1e-6, which a float32 softmax may miss
TOLERANCE = 1e-3
INTERVALS = (
    *(constraints.interval, constraints.half_open_interval),
    *(constraints.greater_than, constraints.greater_than_eq, constraints.less_than),
)


def support_of(fn: Any) -> Any:
    """The support of a distribution; None where it does not say.

    Angles are in [−π, π], where Pyro draws them, and not on the real line that torch declares, on which a periodic
    density is not normalised. A mixture has the support of its components where all of them have the same, and a
    shifted or scaled distribution that of its base shifted and scaled, where torch has the real line again.
    """
    if isinstance(fn, Independent):
        base = support_of(fn.base_dist)
        return None if base is None else constraints.independent(base, fn.reinterpreted_batch_ndims)
    if isinstance(fn, (dist.MaskedDistribution, dist.SineSkewed)):
        return support_of(fn.base_dist)
    if isinstance(fn, CIRCULAR):
        angles = constraints.interval(-pi, pi)
        return constraints.independent(angles, 1) if len(fn.event_shape) else angles
    if isinstance(fn, MixtureSameFamily):
        support = _of_all_components(support_of(fn.component_distribution))
        if support is not None:
            return support
    if isinstance(fn, TransformedDistribution) and type(fn).support is TransformedDistribution.support:
        support = _affine_image(fn)
        if support is not None:
            return support
    try:
        return fn.support
    except (AttributeError, NotImplementedError):
        return None


def inside_support(fn: Any, value: Tensor) -> Tensor | None:
    """Whether values lie in the support, over batch dimensions; None where that is everywhere, or not known."""
    support = support_of(fn)
    if support is None:
        return None
    base, dims = support, 0
    while isinstance(base, constraints.independent):
        base, dims = base.base_constraint, dims + base.reinterpreted_batch_ndims
    if base is constraints.real or base is constraints.real_vector:
        return None
    if base is constraints.simplex:
        inside = (value >= 0).all(-1) & ((value.sum(-1) - 1).abs() < TOLERANCE)
    elif base is constraints.sphere:
        inside = (value.norm(dim=-1) - 1).abs() < TOLERANCE
    elif base is constraints.corr_cholesky:
        lower = (value.tril() == value).flatten(-2).all(-1) & (value.diagonal(dim1=-2, dim2=-1) > 0).all(-1)
        inside = lower & ((value.norm(dim=-1) - 1).abs() < TOLERANCE).all(-1)
    else:
        try:
            inside = base.check(value)
        except NotImplementedError:
            return None
    return inside.flatten(inside.dim() - dims).all(-1) if dims else inside


def bijection(name: str, fn: Any) -> Any:
    """A bijection from R^d to the support of the site's distribution.

    Raises:
        ValueError: there is none: a sphere, a mixture of components that have different supports, or a distribution
            that does not say what its support is.
    """
    support = support_of(fn)
    try:
        if support is None:
            raise NotImplementedError("it does not say what its support is")
        return biject_to(support)
    except NotImplementedError as error:
        got = "a support that is not known" if support is None else f"the support {support}"
        if isinstance(fn, MixtureSameFamily):
            got = "a mixture of components whose supports differ, or are not known to be the same"
        raise ValueError(
            f"site {name!r}: {type(fn).__name__} cannot be mapped to unconstrained coordinates: fitted Gaussians and "
            f"annealing expect a support that is the image of R^d under a bijection, got {got}. Try "
            "importance_sampling with its defaults, which needs none, or a latent in R^d of which this one is a "
            "function (for a sphere: poutine.reparam with pyro.infer.reparam.ProjectedNormalReparam)."
        ) from error


def _affine_image(fn: Any) -> Any:
    """The support of a distribution whose last transforms are affine maps of bounded numbers; None of others."""
    affine = list(takewhile(lambda t: isinstance(t, AffineTransform), reversed(fn.transforms)))
    before = fn.transforms[: len(fn.transforms) - len(affine)]
    base = before[-1].codomain if before else support_of(fn.base_dist)
    while isinstance(base, constraints.independent):
        base = base.base_constraint
    if not affine or not isinstance(base, INTERVALS):
        return None
    ends = getattr(base, "lower_bound", -inf), getattr(base, "upper_bound", inf)
    low, high = (torch.as_tensor(end) for end in ends)
    for t in reversed(affine):
        images = t.loc + t.scale * low, t.loc + t.scale * high
        low, high = torch.minimum(*images), torch.maximum(*images)
    if hasattr(base, "lower_bound") and hasattr(base, "upper_bound"):
        support = constraints.interval(low, high)
    elif low.isfinite().all():
        support = constraints.greater_than(low)
    elif high.isfinite().all():
        support = constraints.less_than(high)
    else:  # some rows are bounded below, others above
        return None
    return constraints.independent(support, len(fn.event_shape)) if fn.event_shape else support


def _of_all_components(support: Any, dim: int = -1) -> Any:
    """The support of a mixture whose components have this support along `dim`. None where they differ."""
    if isinstance(support, constraints.independent):
        base = _of_all_components(support.base_constraint, dim - support.reinterpreted_batch_ndims)
        return None if base is None else constraints.independent(base, support.reinterpreted_batch_ndims)
    values = {} if support is None else vars(support)
    bounds = {name: b for name, b in values.items() if isinstance(b, Tensor) and b.dim() >= -dim}
    if not bounds:
        return support
    if not isinstance(support, INTERVALS):
        return None
    first = {name: bound.select(dim, 0) for name, bound in bounds.items()}
    if any((bound != first[name].unsqueeze(dim)).any() for name, bound in bounds.items()):
        return None
    return type(support)(**{**values, **first})
