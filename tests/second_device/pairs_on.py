"""Pairs and data that are alike on every device."""

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoNormal
from torch import nn

from pyro_vae import VAE
from pyro_vae.distributions import ConditionalBernoulli, ConditionalMultivariateNormal, StandardNormal
from pyro_vae.guides import AmortizedFlow, AmortizedMultivariateNormal, AmortizedNormal
from pyro_vae.networks import MLP


class On:
    """What the calls of a device are made of: everything comes from the CPU under one seed, and moves there."""

    def __init__(self, device):
        self.device = torch.device(device)

    def tensor(self, values):
        return torch.as_tensor(values).to(self.device)

    def normal(self, *shape):
        return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(self.device)

    def images(self, rows=12):
        return (self.normal(rows, 4, 4) > 0).float()

    def made(self, make):
        """A module made on the CPU, with the same weights whatever was drawn before."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            return make().to(self.device)

    def vae(self, latent=2, shape=(4, 4), name="vae"):
        return self.made(
            lambda: VAE(
                StandardNormal(latent),
                ConditionalBernoulli(MLP(latent, [8], activation=nn.Tanh), shape),
                ConditionalMultivariateNormal(MLP(shape, [8]), latent),
                name=name,
            )
        )

    def plain(self):
        """Functions with parameters in Pyro's store; x is normal, and partly missing where it is NaN."""
        loc, scale = self.tensor(0.3), self.tensor(0.8)

        def model(x, noise=1.0):
            weight = pyro.param("weight", lambda: self.tensor([1.0, 0.5, -0.5]))
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(loc, 1.0))
                pyro.sample("x", dist.Normal(z.unsqueeze(-1) * weight, noise).to_event(1), obs=x)

        def guide(x, noise=1.0):
            slope = pyro.param("slope", lambda: self.tensor([0.3, 0.2, -0.2]))
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(x @ slope, scale))

        return model, guide, self.normal(12, 3)

    def subsampled(self):
        """The plate draws the rows of each run, on the device."""
        x = self.normal(12)

        def rows():
            return pyro.plate("data", 12, subsample_size=5, device=self.device)

        def model():
            with rows() as index:
                z = pyro.sample("z", dist.Normal(self.tensor(0.0), 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

        def guide():
            with rows() as index:
                pyro.sample("z", dist.Normal(x[index] / 2, 0.8))

        return model, guide

    def enumerated(self):
        """A component that is summed out, and a latent."""
        locs = self.tensor([-1.0, 0.0, 2.0])

        def model(x):
            share = pyro.param("share", lambda: self.tensor([0.2, 0.3, 0.5]), constraint=dist.constraints.simplex)
            with pyro.plate("data", len(x)):
                k = pyro.sample("k", dist.Categorical(share), infer={"enumerate": "parallel"})
                z = pyro.sample("z", dist.Normal(locs[k], 1.0))
                pyro.sample("x", dist.Normal(z, 0.5), obs=x)

        def guide(x):
            shift = pyro.param("shift", lambda: self.tensor(0.1))
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(x + shift, 0.6))

        return model, guide, self.normal(12)

    def hierarchical(self):
        """Latents outside of the plate, one of them positive, with a guide of Pyro's."""
        zero = self.tensor(0.0)

        def model(x):
            mean = pyro.sample("mean", dist.Normal(zero, 2.0))
            spread = pyro.sample("spread", dist.LogNormal(zero - 1.0, 0.5))
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(mean, spread))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        return model, AutoNormal(model), self.normal(12)

    def factored(self):
        """Two latents of different supports, for guides that are made of the model."""
        zero = self.tensor(0.0)

        def model(x):
            with pyro.plate("data", len(x)):
                mean = pyro.sample("mean", dist.Normal(zero, 2.0)).unsqueeze(-1)
                scale = pyro.sample("scale", dist.LogNormal(zero, 0.5)).unsqueeze(-1)
                pyro.sample("x", dist.Normal(mean, scale).expand((*mean.shape[:-1], 3)).to_event(1), obs=x)

        return model, self.normal(12, 3)

    def bounded(self):
        """A latent whose bounds are tensors."""
        low, high = self.tensor([-3.0, 0.0]), self.tensor([3.0, 2.0])

        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Uniform(low, high).to_event(1))
                pyro.sample(
                    "x", dist.Normal(z.sum(-1, keepdim=True), 1.0).expand((*z.shape[:-1], 3)).to_event(1), obs=x
                )

        return model, self.normal(12, 3)

    def counts(self):
        """A latent whose draws have no gradient."""

        def model(x):
            rate = pyro.param("rate", lambda: self.tensor(2.0), constraint=dist.constraints.positive)
            with pyro.plate("data", len(x)):
                n = pyro.sample("n", dist.Poisson(rate))
                pyro.sample("x", dist.Normal(n, 1.0), obs=x)

        def guide(x):
            guess = pyro.param("guess", lambda: self.tensor(1.0), constraint=dist.constraints.positive)
            with pyro.plate("data", len(x)):
                pyro.sample("n", dist.Poisson(guess + x.abs()))

        return model, guide, self.normal(12)

    def correlated(self):
        """A latent triangle."""
        concentration = self.tensor(1.5)

        def model(x):
            with pyro.plate("data", len(x)):
                scale_tril = pyro.sample("scale_tril", dist.LKJCholesky(3, concentration))
                loc = scale_tril.new_zeros(3)
                pyro.sample("x", dist.MultivariateNormal(loc, scale_tril=scale_tril), obs=x)

        return model, None, self.normal(12, 3)

    def amortized(self, kind, pair=None):
        make = {"flow": AmortizedFlow, "full": AmortizedMultivariateNormal, "diagonal": AmortizedNormal}[kind]
        model, x = pair or self.factored()
        guide = self.made(lambda: make(model, MLP(3, [8])))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            guide(x)  # it sets itself up
        return model, guide, x
