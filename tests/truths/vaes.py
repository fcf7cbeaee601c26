"""VAEs whose log p(x) is known: linear ones in closed form, those with two latents by quadrature."""

import math

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae import VAE
from pyro_vae.distributions import (
    ConditionalBernoulli,
    ConditionalMultivariateNormal,
    ConditionalNormal,
    LearnedScale,
    StandardNormal,
)
from pyro_vae.networks import MLP


def linear_vae(latent: int, size: int, *, full: bool = True, scale: float = 0.3, name: str = "vae") -> VAE:
    posterior = ConditionalMultivariateNormal if full else ConditionalNormal
    return VAE(
        StandardNormal(latent),
        ConditionalNormal(MLP(latent, []), size, scale=LearnedScale(init=scale)),
        posterior(MLP(size, []), latent),
        name=name,
    )


def linear_vae_log_evidence(vae: VAE, x: Tensor) -> Tensor:
    weight, bias = vae.likelihood.head.weight.detach().double(), vae.likelihood.head.bias.detach().double()
    covariance = weight @ weight.T + vae.likelihood.scale().detach().double() ** 2 * torch.eye(len(bias)).to(bias)
    return dist.MultivariateNormal(bias, covariance).log_prob(x.double())


def small_vae(latent: int = 2, shape: tuple[int, ...] = (4, 4), *, full: bool = True, name: str = "vae") -> VAE:
    posterior = ConditionalMultivariateNormal if full else ConditionalNormal
    return VAE(
        StandardNormal(latent),
        ConditionalBernoulli(MLP(latent, [16], activation=nn.Tanh), shape),
        posterior(MLP(shape, [16]), latent),
        name=name,
    )


def quadrature(vae: VAE, x: Tensor, *, points: int = 201, limit: float = 7.0) -> Tensor:
    """log ∫ p(x|z) N(z; 0, I) dz over a grid of two latent dimensions, in float64."""
    axis = torch.linspace(-limit, limit, points, dtype=torch.float64)
    z = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        log_joint = vae.likelihood.double()(z).expand((len(x), len(z))).log_prob(x.double().unsqueeze(1))
        vae.likelihood.float()
    log_joint = log_joint - 0.5 * z.square().sum(-1) - math.log(2 * math.pi)
    return log_joint.logsumexp(1) + 2 * math.log(2 * limit / (points - 1))


def inverse_positive(scale):
    """The raw parameter that makes this scale."""
    return torch.log(torch.expm1(scale - 1e-5)) - math.log(math.expm1(1 - 1e-5))


@torch.no_grad()
def set_linear(part, weight, bias, tril=None):
    """y = weight · inputs + bias for a conditional Normal without hidden layers, with a triangle or fixed scale."""
    raw = [bias]
    if tril is not None:
        d, scale = len(tril), tril.diagonal()
        raw.append(inverse_positive(scale))
        if isinstance(part, ConditionalMultivariateNormal):
            row, column = torch.tril_indices(d, d, -1)
            raw.append((tril / scale[:, None])[row, column] * math.sqrt(d))
    part.head.weight.zero_()
    part.head.weight[: len(weight)] = weight
    part.head.bias.copy_(torch.cat(raw))


def exact_vae(truth, *, contexts=0, slope=None, widen=1.0):
    """The VAE with this model, x ~ N(W z + slope · c + b, s²), and its exact posterior, or one wider than it."""
    size, k = truth.weight.shape
    vae = VAE(
        StandardNormal(k),
        ConditionalNormal(MLP(k, [], context_size=contexts), size, scale=truth.noise),
        ConditionalMultivariateNormal(MLP(size, [], context_size=contexts), k),
    )
    slope = torch.zeros(size, 0) if slope is None else slope
    covariance = truth.covariance.float()
    gain = covariance @ truth.weight.T / truth.noise**2
    set_linear(vae.likelihood, torch.cat([truth.weight, slope], 1), truth.bias)
    set_linear(
        vae.posterior,
        torch.cat([gain, -gain @ slope], 1),
        -gain @ truth.bias,
        widen * torch.linalg.cholesky(covariance),
    )
    return vae


def coupled(scale_f, scale_g, *, latent, size, hidden=()):
    return VAE(
        StandardNormal(latent),
        ConditionalNormal(MLP(latent, hidden, activation=nn.Tanh), size, scale=scale_g),
        ConditionalNormal(MLP(size, hidden, activation=nn.Tanh), latent, scale=scale_f),
    )
