r"""The Normal truncated to an interval, to full precision also far out in its tails and on narrow intervals.

With y = (x − μ)/σ, a and b the standardised ends and Z = Φ(b) − Φ(a),

    log p(x) = −½ y² − ½ log 2π − log σ − log Z    for low ≤ x ≤ high.

In a tail, y² and log Z are large and nearly cancel. So the interval is mirrored to where a + b ≥ 0, both are taken
relative to the end that is nearer to the mean, c = max(a, 0), and R = Z exp(c²/2) is of the order of one over a:

    log p(x) = −½ (y − c)(y + c) − log R − ½ log 2π − log σ.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf, isinf, log, pi, sqrt
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor
from torch.distributions import biject_to, constraints, register_kl, transform_to
from torch.distributions.utils import broadcast_all

from pyro_vae.distributions.state import Copied

__all__ = ["TruncatedNormal", "check_ends"]

REACH = 50.0  # the fall of the log-density from its largest value, beyond which an integral sees nothing
NOWHERE = 40.0  # standard deviations below the mean, from where on an end is none
FAR = 10.0  # from here on, the series of erfcx is as good as float64
NEWTON = 4  # steps for a quantile in the tail, each of which doubles the number of right digits
FEW, MANY = np.polynomial.legendre.leggauss(8), np.polynomial.legendre.leggauss(80)


class _Interval(NamedTuple):
    """A standardised interval [a, a + width], mirrored so that its middle is not below zero.

    Attributes:
        sign: −1 where it is mirrored.
        a: its lower end.
        width: None where the upper end is infinite.
        end: the end of the given interval that became `a`.
    """

    sign: Tensor
    a: Tensor
    width: Tensor | None
    end: Tensor


class _AtMost(constraints.less_than):
    """x ≤ upper_bound."""

    def check(self, value: Tensor) -> Tensor:
        return value <= self.upper_bound


@biject_to.register(_AtMost)
@transform_to.register(_AtMost)
def _to_at_most(constraint: _AtMost) -> Any:
    return biject_to(constraints.less_than(constraint.upper_bound))


class TruncatedNormal(Copied, TorchDistribution):
    """N(μ, σ²) given low ≤ x ≤ high.

    Mean, variance, entropy and KL are integrals, taken by Gauss-Legendre quadrature with 80 nodes, to the precision of
    the dtype. Draws are made in float64 and carry their derivatives ∂x/∂μ and ∂x/∂σ at a fixed quantile, which are of
    first order: a gradient of a gradient is not that of the draw.

    Args:
        loc: μ, the mean before truncation, which may lie outside of the interval.
        scale: σ > 0.
        low: lower end, a number or a tensor of finite numbers; −∞ for none.
        high: upper end, a number or a tensor of finite numbers; ∞ for none.

    Example:
        >>> p = TruncatedNormal(torch.tensor(0.0), torch.tensor(1.0), low=30.0)
        >>> p.mean, p.log_prob(torch.tensor(30.0)).exp()  # both exceed the end by about 1/30
        (tensor(30.0333), tensor(30.0333))
    """

    arg_constraints: ClassVar[dict[str, Any]] = {"loc": constraints.real, "scale": constraints.positive}
    has_rsample = True

    def __init__(
        self,
        loc: Tensor | float,
        scale: Tensor | float,
        low: Tensor | float = -inf,
        high: Tensor | float = inf,
        validate_args: bool | None = None,
    ) -> None:
        loc, scale = broadcast_all(loc, scale)
        ends = [
            None if not isinstance(end, Tensor) and isinf(end) else torch.as_tensor(end).to(loc) for end in (low, high)
        ]
        shape = torch.broadcast_shapes(loc.shape, *(end.shape for end in ends if end is not None))
        self.loc, self.scale = loc.expand(shape), scale.expand(shape)
        self.low, self.high = ends  # as they are, so that the support is that of any number of rows
        super().__init__(shape, validate_args=validate_args)
        if self._validate_args:
            check_ends(type(self).__name__, self.low, self.high)

    def expand(self, batch_shape: Size, _instance: Any = None) -> TruncatedNormal:
        new = type(self).__new__(type(self)) if _instance is None else _instance
        new.loc, new.scale, new.low, new.high = (
            self.loc.expand(batch_shape),
            self.scale.expand(batch_shape),
            self.low,
            self.high,
        )
        TorchDistribution.__init__(new, Size(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new

    @constraints.dependent_property(is_discrete=False, event_dim=0)
    def support(self) -> Any:
        if self.low is None:
            return constraints.real if self.high is None else _AtMost(self.high)
        return constraints.greater_than_eq(self.low) if self.high is None else constraints.interval(self.low, self.high)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        sign, a, width, end = self._interval()
        y, gap = sign * (value - self.loc) / self.scale, sign * (value - end) / self.scale
        square = torch.where(a > 0, gap * (gap + 2 * a), y.square())
        result = -0.5 * square - _log_ratio(a, width) - 0.5 * log(2 * pi) - self.scale.log()
        for bound, side in ((self.low, 1), (self.high, -1)):
            result = result if bound is None else torch.where(side * (value - bound) < 0, -inf, result)
        return result

    def rsample(self, sample_shape: Size = Size()) -> Tensor:
        shape = self._extended_shape(sample_shape)
        u = torch.rand(shape, dtype=torch.float64, device=self.loc.device)
        return self.icdf(u.clamp(min=torch.finfo(u.dtype).eps / 2))  # 1 − u is below one

    def icdf(self, value: Tensor) -> Tensor:
        """The x with P(X ≤ x) = u, with its first derivatives to μ and σ."""
        with torch.no_grad():
            double = self._mapped(lambda t: t.double())
            sign, a, width, end = double._interval()
            u, sign, a = torch.broadcast_tensors(value.double(), sign, a)
            u = torch.where(sign > 0, u, 1 - u)
            gap = _quantile(a, width, u)
            near, far = _slopes(a, width, gap, u)  # of y to both ends
            upper = 0.0 if width is None else far * (a + width)
            to_loc, to_scale = 1 - near - far, sign * (gap + a * (1 - near) - upper)
            x = torch.where(a > -1, end + sign * double.scale * gap, double.loc + sign * double.scale * (a + gap))
            slopes = (torch.where(x.isfinite(), t, 0.0) for t in (to_loc, to_scale))  # none where u is that of ±∞
            x, to_loc, to_scale = (t.to(self.loc.dtype) for t in (x, *slopes))
        x = x + to_loc * (self.loc - self.loc.detach()) + to_scale * (self.scale - self.scale.detach())
        return x if self.low is None and self.high is None else x.clamp(self.low, self.high)

    @property
    def mean(self) -> Tensor:
        weight, gap, start, _ = self._nodes()
        return start + self._interval().sign * self.scale * (weight * gap).sum(-1)

    @property
    def variance(self) -> Tensor:
        weight, gap, _, _ = self._nodes()
        gap = gap - (weight * gap).sum(-1, keepdim=True)
        return self.scale.square() * (weight * gap.square()).sum(-1)

    def entropy(self) -> Tensor:
        """log σ + ½ log 2π + log R + ½ E (y − c)(y + c), nats."""
        weight, _, _, square = self._nodes()
        _, a, width, _ = self._interval()
        return self.scale.log() + 0.5 * log(2 * pi) + _log_ratio(a, width) + 0.5 * (weight * square).sum(-1)

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> TruncatedNormal:
        """The distribution with other tensors."""
        low, high = (None if end is None else change(end) for end in (self.low, self.high))
        return TruncatedNormal(
            change(self.loc), change(self.scale), -inf if low is None else low, inf if high is None else high, False
        )

    def _interval(self) -> _Interval:
        one, width = torch.ones_like(self.loc), None
        if self.low is None and self.high is None:
            return _Interval(one, -NOWHERE * one, None, self.loc)
        if self.low is not None and self.high is not None:
            sign = torch.where(self.low - self.loc < self.loc - self.high, -one, one)
            end, width = torch.where(sign < 0, self.high, self.low), (self.high - self.low) / self.scale
        else:
            sign, end = (-one, self.high) if self.low is None else (one, self.low)
        return _Interval(sign, sign * (end - self.loc) / self.scale, width, end)

    def _nodes(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weights and places of nodes for expectations, (*batch, nodes).

        Returns:
            The weights, y − start, the start as an x, and (y − c)(y + c).
        """
        sign, a, width, end = self._interval()
        c, start = a.clamp(min=0), a.clamp(min=-sqrt(2 * REACH))
        length = 2 * REACH / (c + (c.square() + 2 * REACH).sqrt()) + (c - start)
        length = length if width is None else torch.minimum(length, width + (a - start))
        place, weight = _legendre(MANY, a)
        gap = length.unsqueeze(-1) * place
        above = gap - (c - start).unsqueeze(-1)
        square = above * (above + 2 * c.unsqueeze(-1))
        first = torch.where(a >= start, end, self.loc + sign * self.scale * start)
        return (weight.log() - 0.5 * square).softmax(-1), gap, first, square


@register_kl(TruncatedNormal, TruncatedNormal)
def _kl_truncated_normals(p: TruncatedNormal, q: TruncatedNormal) -> Tensor:
    """E_p (log p − log q) by the quadrature of p; ∞ where q has no mass and p has."""
    weight, gap, start, _ = p._nodes()
    x = start.unsqueeze(-1) + (p._interval().sign * p.scale).unsqueeze(-1) * gap
    low, high = (None if end is None else end.unsqueeze(-1) for end in (p.low, p.high))
    x = x if low is None and high is None else x.clamp(low, high)
    other = q._mapped(lambda t: t.unsqueeze(-1))
    result = -p.entropy() - (weight * other.log_prob(x)).sum(-1)
    for mine, its, side in ((p.low, q.low, 1), (p.high, q.high, -1)):
        if its is not None:
            result = inf + result if mine is None else torch.where(side * (its - mine) > 0, inf, result)
    return result


def _log_ratio(a: Tensor, width: Tensor | None) -> Tensor:
    """log R = log Z + ½ max(a, 0)² of a mirrored interval. Each branch gets only values that it can take."""
    tail_a, central_a = torch.where(a > 0, a, 1.0), a.clamp(max=0)
    tail = 0.5 * _erfcx(tail_a / sqrt(2))
    if width is None:
        return torch.where(a > 0, tail, 0.5 * torch.special.erfc(central_a / sqrt(2))).log()
    narrow = width * (1 + a + width / 2) <= 1
    w = torch.where(narrow, 1.0, width)
    tail = tail - 0.5 * torch.exp(-0.5 * w * (2 * tail_a + w)) * _erfcx((tail_a + w) / sqrt(2))
    central = 0.5 * (torch.special.erf((central_a + w) / sqrt(2)) - torch.special.erf(central_a / sqrt(2)))
    place, weight = _legendre(FEW, a)
    w = torch.where(narrow, width, 0.0)
    above = central_a.unsqueeze(-1) + w.unsqueeze(-1) * place
    integral = (weight * torch.exp(-0.5 * above * (above + 2 * a.clamp(min=0).unsqueeze(-1)))).sum(-1)
    return torch.where(narrow, w * integral / sqrt(2 * pi), torch.where(a > 0, tail, central)).log()


def _quantile(a: Tensor, width: Tensor | None, u: Tensor) -> Tensor:
    """y − a for the y below which lies the share u of the mass, in float64.

    In the tail, a > 0, it is the t with −log P(Y > a + t) = ½ t² + a t + log(erfcx(a/√2) / erfcx((a + t)/√2)) = L.
    """
    tail_a, central_a = torch.where(a > 0, a, 1.0), a.clamp(max=0)
    first = _erfcx(tail_a / sqrt(2)).log()

    def fall(t: Tensor) -> Tensor:
        return 0.5 * t.square() + tail_a * t + first - _erfcx((tail_a + t) / sqrt(2)).log()

    whole = u if width is None else -u * torch.expm1(-fall(width))
    target = -torch.log1p(-whole)
    t = 2 * target / (tail_a + (tail_a.square() + 2 * target).sqrt())
    for _ in range(NEWTON):  # the derivative is the hazard φ/(1 − Φ)
        t = (t - (fall(t) - target) * sqrt(pi / 2) * _erfcx((tail_a + t) / sqrt(2))).clamp(min=0)
    below, above = torch.special.ndtr(-central_a), 0.0 if width is None else torch.special.ndtr(-(central_a + width))
    central = -torch.special.ndtri((1 - u) * below + u * above) - central_a
    gap = torch.where(a > 0, torch.where(target.isinf(), inf, t), central.clamp(min=0))
    return gap if width is None else torch.minimum(gap, width)


def _slopes(a: Tensor, width: Tensor | None, gap: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """∂y/∂a = (1 − u) φ(a)/φ(y) and ∂y/∂b = u φ(b)/φ(y) at y = a + gap, where 1 − u is the ratio of two masses."""
    y = a + gap
    rest = None if width is None else width - gap
    squares = 0.5 * (y.clamp(max=0).square() - a.clamp(max=0).square())
    near = torch.exp(squares + _log_ratio(y, rest) - _log_ratio(a, width))
    return near, torch.zeros_like(u) if rest is None else u * torch.exp(-0.5 * rest * (2 * y + rest))


def _erfcx(x: Tensor) -> Tensor:
    """exp(x²) erfc(x) for x > 0; its gradient keeps its digits for large x, where torch's is a small difference."""
    s = torch.where(x > FAR, x, FAR)
    v = 0.5 / s.square()
    series = torch.ones_like(s)
    for k in range(12, 0, -1):
        series = 1 - (2 * k - 1) * v * series
    return torch.where(x > FAR, series / (s * sqrt(pi)), torch.special.erfcx(x.clamp(max=FAR)))


def _legendre(rule: tuple, like: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes and weights on [0, 1]."""
    place, weight = (torch.as_tensor(r, dtype=like.dtype, device=like.device) for r in rule)
    return 0.5 * (place + 1), 0.5 * weight


def check_ends(where: str, low: Tensor | None, high: Tensor | None) -> None:
    """Raises ValueError unless ends are finite, and the lower one is below the upper one."""
    finite = all(bool(end.isfinite().all()) for end in (low, high) if end is not None)
    if not finite or (low is not None and high is not None and not bool((low < high).all())):
        raise ValueError(
            f"{where}: expected low < high, each a number or a tensor of finite numbers, got low={low} and "
            f"high={high}. Try to swap them, or to leave out one that is infinite."
        )
