r"""A weighted sum of objectives, L = Σ_i w_i L_i, whose weights may follow the training steps.

With an ELBO and the forward KL divergence on simulated data (`ForwardKL`) it is wake-sleep with one loss: the model
learns from the data by the ELBO alone; the guide learns from both, the data at hand and what the model makes of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro.infer import ELBO
from torch import Tensor

from pyro_vae.objectives.protocol import annealed, has_differentiable_loss
from pyro_vae.objectives.schedules import Schedule, value_at
from pyro_vae.pairs.threads import one_thread

__all__ = ["CombinedELBO"]


class CombinedELBO(ELBO):
    r"""A weighted sum of objectives, as a loss in nats, summed over the data.

    Each part draws for itself. The sum is a bound of log p(x) where its parts are and their weights sum to one, and
    not otherwise: judge the model by `importance_sampling`. Parts that follow the steps, such as `BetaELBO`, are moved
    along.

    Args:
        parts: pairs of an objective and its weight ≥ 0: a number, or a function of the step (0 for the first one) such
            as `linear(…)`. `loss`, which evaluates, has the weights of the last step.

    Raises:
        TypeError: a part that is no `pyro.infer.ELBO`, is compiled by itself, or has no loss that can be differentiated
            (`TraceGraph_ELBO`, `RenyiELBO`, `ReweightedWakeSleep`).
        ValueError: no parts; a weight that is negative or not finite.

    References:
        Hinton, Dayan, Frey & Neal (1995), The "wake-sleep" algorithm for unsupervised neural networks.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer import Trace_ELBO
        >>> from pyro_vae.objectives import ForwardKL, linear
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
        >>> loss = CombinedELBO([(Trace_ELBO(), 1.0), (ForwardKL(), linear(1000, 1.0, 0.0))])
        >>> loss.weights, loss.loss(model, guide, torch.zeros(1000)) / 1000 > 1.2655 + 1.0  # −log p(0) + entropy of q
        ([1.0, 1.0], True)
    """

    def __init__(self, parts: Sequence[tuple[ELBO, float | Schedule]]) -> None:
        super().__init__()
        if not isinstance(parts, (list, tuple)):
            raise TypeError(
                f"CombinedELBO: expected pairs of an objective and its weight, got {parts!r}. Try "
                "CombinedELBO([(Trace_ELBO(), 1.0), (ForwardKL(), 0.5)])."
            )
        parts = [_checked(part) for part in parts]
        if not parts:
            raise ValueError(
                "CombinedELBO: expected pairs of an objective and its weight, got none. Try [(Trace_ELBO(), 1.0)]."
            )
        self.elbos = [elbo for elbo, _ in parts]
        self.schedules = [schedule for _, schedule in parts]
        # tensors, so that a compiled loss has them as inputs
        self._weights = [torch.tensor(self._weight_at(i, 0), dtype=torch.float64) for i in range(len(parts))]
        self._calls = torch.tensor(-1)
        self._driven = False

    def __copy__(self) -> CombinedELBO:
        new = type(self).__new__(type(self))
        new.__dict__.update(self.__dict__, _calls=self._calls.clone())
        new.elbos = [copy.copy(elbo) for elbo in self.elbos]
        new._weights = [weight.clone() for weight in self._weights]
        return new

    @property
    def weights(self) -> list[float]:
        """w of the last step."""
        return [weight.item() for weight in self._weights]

    def set_step(self, step: int) -> None:
        """Sets the weights, and the parts that follow the steps, to those of a step.

        `fit` and `CompiledELBO` call this. If nobody does, `loss_and_grads` counts its own calls as steps.
        """
        self._driven = True
        self._set(step)

    def not_a_bound(self) -> str | None:
        """What parts that follow the steps say of themselves; None where they end as bounds of log p(x)."""
        reasons = [part.not_a_bound() for part in map(annealed, self.elbos) if part is not None]
        return ", ".join(reason for reason in reasons if reason is not None) or None

    def _set(self, step: int) -> None:
        for i, (elbo, weight) in enumerate(zip(self.elbos, self._weights, strict=True)):
            weight.fill_(self._weight_at(i, step))
            part = annealed(elbo)
            if part is not None:
                part.set_step(step)

    def _weight_at(self, index: int, step: int) -> float:
        name = f"weight of {type(self.elbos[index]).__name__}"
        return value_at("CombinedELBO", name, self.schedules[index], step)

    @one_thread
    def loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """The weighted sum of the parts' `loss`, nats."""
        return sum(
            w * elbo.loss(model, guide, *args, **kwargs) for w, elbo in zip(self.weights, self.elbos, strict=True)
        )

    @one_thread
    def loss_and_grads(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """The weighted sum of the step, nats. Adds its gradient to those of the parameters."""
        if not self._driven:
            self._calls += 1
            self._set(int(self._calls))
        loss = self._loss(model, guide, args, kwargs)
        if loss.requires_grad:
            loss.backward()
        return loss.item()

    @one_thread
    def differentiable_loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Tensor:
        """The weighted sum of the last step, nats, as a tensor with a gradient."""
        return self._loss(model, guide, args, kwargs)

    def _loss(self, model: Callable, guide: Callable, args: tuple, kwargs: dict) -> Tensor:
        parts: list[Any] = self.elbos  # each is `Differentiable`
        terms = [torch.as_tensor(elbo.differentiable_loss(model, guide, *args, **kwargs)) for elbo in parts]
        weighted = [weight.to(term) * term for weight, term in zip(self._weights, terms, strict=True)]
        return sum(weighted[1:], weighted[0])

    def _get_trace(self, model: Callable, guide: Callable, args: tuple, kwargs: dict) -> tuple:
        raise NotImplementedError  # an abstract method of Pyro's; each part traces for itself


def _checked(part: Any) -> tuple[ELBO, float | Schedule]:
    """A pair of an objective and its weight."""
    try:
        elbo, weight = part
    except (TypeError, ValueError):
        elbo, weight = part, None
    if not isinstance(elbo, ELBO) or not (callable(weight) or isinstance(weight, (int, float))):
        raise TypeError(
            f"CombinedELBO: expected pairs (pyro.infer.ELBO, weight), got {part!r}. Try "
            "CombinedELBO([(Trace_ELBO(), 1.0), (ForwardKL(), 0.5)])."
        )
    if not has_differentiable_loss(elbo):
        raise TypeError(
            f"CombinedELBO: {type(elbo).__name__} has no loss that can be differentiated, and so none that can be "
            "weighted. Try ImportanceWeightedELBO in place of RenyiELBO, and Trace_ELBO or TraceEnum_ELBO in place of "
            "TraceGraph_ELBO."
        )
    if hasattr(elbo, "plans"):  # of a CompiledELBO
        raise TypeError(
            "CombinedELBO: expected objectives that are not compiled yet, got a CompiledELBO. Try "
            "CompiledELBO(CombinedELBO([…]))."
        )
    return elbo, weight
