"""Models whose log p(x) is known: in closed form, by quadrature, by enumeration."""

import math

import pyro
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


class LinearGaussian:
    """z ~ N(0, I), x ~ N(W z + b, s² I): log p(x) = log N(x; b, W Wᵀ + s² I), and a Gaussian posterior."""

    def __init__(self, latent: int, size: int, *, noise: float = 0.7, device="cpu", dtype=torch.float32):
        generator = torch.Generator().manual_seed(1)
        self.weight = torch.randn(size, latent, generator=generator, dtype=torch.float64).to(device, dtype)
        self.bias = torch.randn(size, generator=generator, dtype=torch.float64).to(device, dtype)
        self.noise, self.latent, self.device, self.dtype = noise, latent, device, dtype
        precision = self.weight.double().T @ self.weight.double() / noise**2 + torch.eye(latent).to(
            device, torch.float64
        )
        self.covariance = torch.linalg.inv(precision)

    def sample(self, n: int) -> Tensor:
        z = torch.randn(n, self.latent, device=self.device, dtype=self.dtype)
        mean = z @ self.weight.T + self.bias
        return mean + self.noise * torch.randn_like(mean)

    def log_evidence(self, x: Tensor) -> Tensor:
        weight = self.weight.double()
        covariance = weight @ weight.T + self.noise**2 * torch.eye(len(weight)).to(weight)
        return dist.MultivariateNormal(self.bias.double(), covariance).log_prob(x.double())

    def posterior(self, x: Tensor, widen: float = 1.0) -> dist.MultivariateNormal:
        loc = ((x.double() - self.bias) @ self.weight.double() / self.noise**2) @ self.covariance
        tril = torch.linalg.cholesky(self.covariance) * widen
        return dist.MultivariateNormal(loc.to(self.dtype), scale_tril=tril.to(self.dtype))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(self.weight[0]), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.weight.T + self.bias, self.noise).to_event(1), obs=x)

    def guide(self, x: Tensor, widen: float = 1.0) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.posterior(x, widen))


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


def quadrature(vae: VAE, x: Tensor, *, points: int = 401, limit: float = 7.0) -> Tensor:
    """log ∫ p(x|z) N(z; 0, I) dz over a grid of two latent dimensions, in float64."""
    axis = torch.linspace(-limit, limit, points, dtype=torch.float64)
    z = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        log_joint = vae.likelihood.double()(z).expand((len(x), len(z))).log_prob(x.double().unsqueeze(1))
        vae.likelihood.float()
    log_joint = log_joint - 0.5 * z.square().sum(-1) - math.log(2 * math.pi)
    return log_joint.logsumexp(1) + 2 * math.log(2 * limit / (points - 1))
