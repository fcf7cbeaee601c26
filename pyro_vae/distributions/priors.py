r"""Priors p(z): the standard Normal, the Gaussian mixture, and the mixture of posteriors (VampPrior).

    p(z) = N(z; 0, I),    p(z) = Σ_k π_k N(z; μ_k, diag σ_k²),    p(z) = 1/K Σ_k q(z|u_k).

Any distribution, or any module that returns one when called, can also be a prior: a family without a network
(`ConditionalNormal(None, 8)`), a flow (`ConditionalFlow(StandardNormal(8), …)`) or a flow of Zuko.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae.arguments import check_dense, checked
from pyro_vae.distributions.conditional import positive
from pyro_vae.distributions.state import Copied
from pyro_vae.distributions.structure import check_conditional, condition, event_shape_of

__all__ = ["GaussianMixture", "StandardNormal", "VampPrior"]


class StandardNormal(nn.Module):
    """The prior p(z) = N(0, I), on the device and in the dtype of the module. It ignores its inputs.

    Args:
        event_shape: shape of one z.

    Example:
        >>> StandardNormal(8)().event_shape
        torch.Size([8])
    """

    @checked
    def __init__(self, event_shape: int | Sequence[int]) -> None:
        super().__init__()
        self.event_shape = event_shape_of(event_shape)
        self.register_buffer("loc", torch.zeros(self.event_shape), persistent=False)
        self.register_buffer("scale", torch.ones(self.event_shape), persistent=False)

    def forward(self, *_: Tensor) -> Any:
        return dist.Normal(self.loc, self.scale).to_event(len(self.event_shape))


class GaussianMixture(nn.Module):
    r"""The prior p(z) = Σ_k π_k N(z; μ_k, diag σ_k²), in which all parameters are learned.

    Args:
        num_components: number of components, K.
        event_shape: shape of one z.
        spread: the μ_k start as draws from N(0, spread²).

    Example:
        >>> GaussianMixture(10, 2)().sample((5,)).shape
        torch.Size([5, 2])
    """

    @checked
    def __init__(self, num_components: int, event_shape: int | Sequence[int], *, spread: float = 1.0) -> None:
        super().__init__()
        shape = event_shape_of(event_shape)
        self.logits = nn.Parameter(torch.zeros(num_components))
        self.loc = nn.Parameter(spread * torch.randn(num_components, *shape))
        self.raw_scale = nn.Parameter(torch.zeros(num_components, *shape))

    def forward(self) -> Any:
        components = dist.Normal(self.loc, positive(self.raw_scale)).to_event(self.loc.dim() - 1)
        return _Mixture(dist.Categorical(logits=self.logits), components)


class VampPrior(nn.Module):
    r"""The variational mixture of posteriors, p(z) = 1/K Σ_k q(z|u_k), with learned pseudo-inputs u_k.

    The mixture of q(z|x_n) over the data is the prior that maximises the ELBO; K pseudo-inputs stand in for the data.
    The posterior is shared with the VAE, which trains it, and is not part of this module's `state_dict`. A VAE with
    another posterior needs another VampPrior.

    Args:
        posterior: the q(z|x) of the same VAE.
        pseudo_inputs: initial values of the u_k, (K, *event of x), such as rows of the data.
        limits: smallest and largest value of a pseudo-input; default: no limits.

    References:
        Tomczak & Welling (2018), VAE with a VampPrior, equation 9.

    Example:
        >>> from pyro_vae.distributions import ConditionalNormal
        >>> from pyro_vae.networks import MLP
        >>> posterior = ConditionalNormal(MLP(64, [32]), 2)
        >>> VampPrior(posterior, torch.rand(20, 64))().event_shape
        torch.Size([2])
    """

    @checked
    def __init__(self, posterior: Any, pseudo_inputs: Tensor, *, limits: tuple[float, float] | None = None) -> None:
        super().__init__()
        check_dense("VampPrior: pseudo_inputs", pseudo_inputs)
        if not pseudo_inputs.dim() or not len(pseudo_inputs) or not pseudo_inputs.isfinite().all():
            raise ValueError(
                f"VampPrior: expected finite pseudo_inputs, (K, *event), got shape {tuple(pseudo_inputs.shape)}"
                f"{'' if pseudo_inputs.isfinite().all() else ' with NaN or infinity'}. Try rows of the data, x[:100]."
            )
        self._shared = (check_conditional("VampPrior", posterior),)  # not a submodule: its weights are the posterior's
        self.pseudo_inputs = nn.Parameter(pseudo_inputs.detach().clone())
        self.limits = limits

    def forward(self) -> Any:
        u = self.pseudo_inputs if self.limits is None else self.pseudo_inputs.clamp(*self.limits)
        q = condition(self._shared[0], u, event_dims=[u.dim() - 1], role="posterior")  # batch shape (K,)
        return _Mixture(dist.Categorical(logits=u.new_zeros(len(u))), q)


class _Mixture(Copied, dist.MixtureSameFamily):
    """A mixture with the support of its components, in a form that can be mapped to the reals."""

    @property
    def support(self) -> Any:
        return self._component_distribution.support
