"""The linear-Gaussian model, whose evidence and posterior are known in closed form."""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor


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
