r"""The sample statements of a VAE, in the plates that are open where they are called.

    z ~ p(z),   x ~ p(x|z, c)        z ~ q(z|x, c)

`VAE.model` and `VAE.guide` call them in a plate of their own; `VAE.sample_model` and `VAE.sample_guide` in the plates
of a larger model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from torch import Size, Tensor, nn

from pyro_vae.arguments import check_dense, check_name
from pyro_vae.distributions.structure import condition
from pyro_vae.models.inputs import check_event, check_likelihood, check_posterior, event_dims_of_rows
from pyro_vae.models.registration import Declared, declare
from pyro_vae.pairs.names import store_name

__all__ = ["declared", "explained", "latent_shape", "likelihood_at", "model_sites", "posterior_of"]


def model_sites(
    vae: Any,
    x: Tensor | None,
    context: tuple[Tensor, ...],
    dims: list[int],
    prior: TorchDistribution | None = None,
    prefix: str = "",
) -> tuple[Tensor, Tensor]:
    """z ~ prior, x ~ p(x|z, c) in the plates that are open: (z, x). `dims`: event dimensions of x and contexts."""
    check_name("sample_model: prefix", prefix)
    if prior is None:
        p_z = declared(vae, "prior")()
    elif isinstance(prior, nn.Module) or not hasattr(prior, "event_shape"):
        raise TypeError(
            f"sample_model: prior: expected a distribution, got {type(prior).__name__}. Try "
            "dist.Normal(loc, scale).to_event(1), or prior() for a module."
        )
    else:
        p_z = condition(prior, role="prior")
        check_event("prior", p_z, latent_shape(vae), "the VAE's prior, which the likelihood is made for")
    likelihood = declared(vae, "likelihood")
    z = pyro.sample(f"{prefix}z", p_z)
    event = None if x is None else x.shape[x.dim() - dims[0] :]
    p_x = likelihood(z, *context, event_dims=[p_z.event_dim, *dims[x is not None :]])
    if x is not None:
        check_likelihood(p_x, x, event)
    return z, pyro.sample(f"{prefix}x", p_x, obs=x)


def posterior_of(vae: Any, x: Tensor, context: tuple[Tensor, ...], dims: list[int]) -> Any:
    """q(z|x, c), checked; `dims` are the event dimensions of x and the contexts."""
    with explained(x):
        q_z = declared(vae, "posterior")(x, *context, event_dims=dims)
    check_posterior(q_z, latent_shape(vae), x.shape[: x.dim() - dims[0]])
    return q_z


def likelihood_at(vae: Any, likelihood: Any, z: Tensor, context: tuple[Tensor, ...]) -> Any:
    """p(x|z, c) for z of any batch shape."""
    check_dense("VAE", z)
    with explained(z, "likelihood"):
        return likelihood(z, *context, event_dims=[len(latent_shape(vae)), *event_dims_of_rows(*context)])


@contextmanager
def explained(x: Tensor, role: str = "posterior") -> Iterator[None]:
    """Says of an error in q(z|x), or p(x|z), that it is due to rows which are not finite, where there are such."""
    try:
        yield
    except ValueError as error:
        if x.isfinite().all():
            raise
        if not x.isnan().any():
            raise ValueError(f"{role}: expected finite rows, got infinite ones. Try to drop or scale them.") from error
        raise ValueError(
            f"{role}: expected complete rows, got NaN: its network cannot take rows with missing values (NaN). Try "
            "MaskedInput(network), with a network for inputs of twice the width, which sees which elements are missing."
        ) from error


def latent_shape(vae: Any) -> Size:
    """The event shape of z, from the prior."""
    shape = getattr(vae.prior, "event_shape", None)
    if shape is not None:
        return Size(shape)
    if vae._shape_of is None or vae._shape_of[0] is not vae.prior:
        with poutine.block(), torch.no_grad():
            vae._shape_of = vae.prior, Declared(vae.prior, "prior")().event_shape
    return vae._shape_of[1]


def declared(vae: Any, role: str) -> Declared:
    """The conditional distribution in this role, with its weights registered with Pyro."""
    parts = {"prior": vae.prior, "likelihood": vae.likelihood, "posterior": vae.posterior}
    name = store_name(parts, role, vae._registered, vae.name, what="VAE")
    if name != vae._registered:
        vae._registered = name
    return declare(parts, role, name)
