r"""The denoising objective: the guide sees a corrupted x̃ ~ C(x̃|x), and the model has to explain the clean x,

    E_{C(x̃|x)} E_{q(z|x̃)} [log p(x|z) + log p(z) − log q(z|x̃)]  ≤  log p(x).

If the posterior is a point, this is the denoising autoencoder of Vincent et al. (2010), *Stacked Denoising
Autoencoders*. With any other posterior it is the denoising VAE of Im et al. (2017), *Denoising Criterion for
Variational Auto-Encoding Framework*. The mixture of q(z|x̃) over x̃ is itself a guide, so the objective is a lower bound
of log p(x) like any ELBO.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from pyro.infer import ELBO, Trace_ELBO
from torch import Tensor

from pyro_vae.arguments import check_number, checked
from pyro_vae.pairs.threads import one_thread

__all__ = ["DenoisingELBO", "gaussian_noise", "masking_noise", "salt_and_pepper_noise"]

Corruption = Callable[[Tensor], Tensor]


class DenoisingELBO(ELBO):
    """Any `pyro.infer.ELBO` whose guide sees a corrupted first argument, while the model sees the clean one.

    `loss`, which evaluates, corrupts as well: it reports the bound with the corrupted guide. All other tools use the
    guide itself.

    Args:
        corruption: a random function, Tensor → Tensor of the same shape. It may be set later as well. What training
            moves from step to step is better its strength, `elbo.corruption.scale = 0.5`, which compiled runs read
            in every step.
        elbo: the objective; default `Trace_ELBO()`.

    Raises:
        TypeError: the corruption is no function.

    Example:
        >>> from pyro_vae import VAE, fit
        >>> from pyro_vae.distributions import ConditionalNormal, StandardNormal
        >>> from pyro_vae.networks import MLP
        >>> vae = VAE(StandardNormal(1), ConditionalNormal(MLP(1, []), 3, scale=1.0), ConditionalNormal(MLP(3, []), 1))
        >>> x = torch.randn(100, 3)
        >>> result = fit(vae.model, vae.guide, x, num_epochs=2, loss=DenoisingELBO(masking_noise(0.3)), seed=0)
    """

    @checked
    def __init__(self, corruption: Corruption, elbo: ELBO | None = None) -> None:
        self.elbo = Trace_ELBO() if elbo is None else elbo
        self.corruption = corruption
        self._guides: tuple[Callable, Callable] | None = None  # the last guide, and its corrupted version

    @property
    def corruption(self) -> Any:
        """The corruption, Tensor → Tensor."""
        return self._corruption

    @corruption.setter
    def corruption(self, corruption: Corruption) -> None:
        if not callable(corruption) or isinstance(corruption, Tensor):
            raise TypeError(
                f"DenoisingELBO: expected a function Tensor → Tensor as corruption, got {corruption!r}. Try "
                "gaussian_noise(0.5), or elbo.corruption.scale = 0.5 for a new strength."
            )
        self._corruption = corruption

    def __copy__(self) -> DenoisingELBO:
        return DenoisingELBO(self.corruption, copy.copy(self.elbo))

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_guides": None}

    def __getattr__(self, name: str) -> Any:
        if name == "elbo":  # before __init__, as in unpickling
            raise AttributeError(name)
        return getattr(self.elbo, name)  # num_particles and the like

    @one_thread
    def loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """−bound, nats."""
        return self.elbo.loss(model, self._corrupted(guide), *args, **kwargs)

    @one_thread
    def loss_and_grads(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """−bound, nats. Adds its gradient to those of the parameters."""
        return self.elbo.loss_and_grads(model, self._corrupted(guide), *args, **kwargs)

    @one_thread
    def differentiable_loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Tensor:
        """−bound, nats, as a tensor whose gradient is that of the estimator, if the ELBO has such a loss."""
        return self.elbo.differentiable_loss(model, self._corrupted(guide), *args, **kwargs)

    def _get_trace(self, model: Callable, guide: Callable, args: tuple, kwargs: dict) -> tuple:
        return self.elbo._get_trace(model, self._corrupted(guide), args, kwargs)

    def _corrupted(self, guide: Callable) -> Callable:
        """The corrupted guide: the same function each time, as objectives remember the pairs that they looked at."""
        if self._guides is None or self._guides[0] != guide:

            def corrupted(x: Tensor, *args: Any, **kwargs: Any) -> Any:
                return guide(self.corruption(x), *args, **kwargs)

            self._guides = guide, corrupted
        return self._guides[1]


class _Noise:
    """A corruption with a strength that may change while it is in use.

    The strength is a tensor, which is changed in place: compiled runs have it as an input, as they have parameters.
    """

    def __init__(self, strength: float) -> None:
        self._strength = torch.zeros((), dtype=torch.float64)
        self._fill(strength)

    def _fill(self, strength: float) -> None:
        self._check(strength)
        self._strength.fill_(float(strength))

    def _check(self, strength: float) -> None:
        raise NotImplementedError


class _Gaussian(_Noise):
    def _check(self, strength: float) -> None:
        check_number("gaussian_noise", strength, low=0.0, ends="[)", what="a finite scale >= 0")

    @property
    def scale(self) -> float:
        """The standard deviation."""
        return self._strength.item()

    @scale.setter
    def scale(self, scale: float) -> None:
        self._fill(scale)

    def __call__(self, x: Tensor) -> Tensor:
        return x + self._strength * torch.randn_like(x)


class _Elementwise(_Noise):
    name = ""

    def _check(self, strength: float) -> None:
        check_number(f"{self.name}: probability", strength, low=0.0, high=1.0, ends="[]", what="a probability")

    @property
    def probability(self) -> float:
        """With which an element is corrupted."""
        return self._strength.item()

    @probability.setter
    def probability(self, probability: float) -> None:
        self._fill(probability)


class _Masking(_Elementwise):
    name = "masking_noise"

    def __init__(self, probability: float, value: float) -> None:
        super().__init__(probability)
        self.value = value

    def __call__(self, x: Tensor) -> Tensor:
        return torch.where(torch.rand(x.shape, device=x.device) < self._strength, self.value, x)


class _SaltAndPepper(_Elementwise):
    name = "salt_and_pepper_noise"

    def __init__(self, probability: float, values: tuple[float, float]) -> None:
        super().__init__(probability)
        self.values = values

    def __call__(self, x: Tensor) -> Tensor:
        low, high = self.values
        u = torch.rand_like(x)  # one draw decides both
        return torch.where(u < self._strength / 2, low, torch.where(u < self._strength, high, x))


def gaussian_noise(scale: float) -> Corruption:
    """x̃ = x + scale · ε, ε ~ N(0, I). Its attribute `scale` may be set later.

    Example:
        >>> gaussian_noise(0.5)(torch.zeros(10000)).std().round(decimals=1)
        tensor(0.5000)
    """
    return _Gaussian(scale)


@checked
def masking_noise(probability: float, value: float = 0.0) -> Corruption:
    """Sets each element to `value` with this probability. Its attribute `probability` may be set later.

    Example:
        >>> masking_noise(0.3)(torch.ones(10000)).mean().round(decimals=1)
        tensor(0.7000)
    """
    return _Masking(probability, check_number("masking_noise: value", value))


@checked
def salt_and_pepper_noise(probability: float, values: tuple[float, float] = (0.0, 1.0)) -> Corruption:
    """Sets each element with this probability to one of two values, which are equally likely. Its attribute
    `probability` may be set later.

    Example:
        >>> salt_and_pepper_noise(1.0)(torch.full((3, 4), 0.5)).unique()
        tensor([0., 1.])
    """
    return _SaltAndPepper(probability, values)
