"""Hierarchical Gaussian models, whose joint evidence and posterior are known in closed form."""

import math

import pyro
import pyro.distributions as dist
import torch


class RandomEffects:
    """m ~ N(0, 1), z_n ~ N(m, a²), x_n ~ N(z_n, b²): Gaussian in all variables together."""

    def __init__(self, a: float = 1.2, b: float = 0.7) -> None:
        self.a, self.b = a, b

    def model(self, x):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(m, self.a))
            pyro.sample("x", dist.Normal(z, self.b), obs=x)

    def guide(self, x, widen=1.3):
        loc, scale = self.posterior_m(x)
        m = pyro.sample("m", dist.Normal(loc, widen * scale))
        precision = self.a**-2 + self.b**-2
        with pyro.plate("data", len(x)):
            mean = (m * self.a**-2 + x * self.b**-2) / precision
            pyro.sample("z", dist.Normal(mean, widen * precision**-0.5))

    def posterior_m(self, x):
        precision = 1 + len(x) / (self.a**2 + self.b**2)
        return x.mean() * (precision - 1) / precision, torch.tensor(precision**-0.5)

    def log_evidence(self, x):
        """log p(x) of all data: x ~ N(0, s I + 1 1ᵀ)."""
        x, n, s = x.double(), len(x), self.a**2 + self.b**2
        log_det = (n - 1) * math.log(s) + math.log(s + n)
        return -0.5 * (n * math.log(2 * math.pi) + log_det + x @ x / s - x.sum() ** 2 / (s * (s + n)))

    def log_given(self, x, m):
        """log p(x_n|m), (S, N)."""
        return dist.Normal(m.double()[:, None], (self.a**2 + self.b**2) ** 0.5).log_prob(x.double())
