"""The pair that `rank_runs.py` trains. Draws come with the data: a share of the rows has a share of them."""

import pyro
import pyro.distributions as dist
import torch

from pyro_vae import fit

N, D = 203, 5  # batches of 32: the last one has 11 rows


class Given(dist.Normal):
    """A Normal whose draws are made of given noise."""

    def __init__(self, loc, scale, noise):
        super().__init__(loc, scale)
        self.noise = noise

    def rsample(self, sample_shape=()):
        return self.loc + self.scale * self.noise

    def expand(self, batch_shape, _instance=None):
        return self


class Autoencoder:
    def __init__(self):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        with torch.random.fork_rng():
            self.x, self.noise = torch.randn(N, D), torch.randn(N, 2)
            self.held_out = torch.randn(61, D), torch.randn(61, 2)
            self.encoder = torch.nn.Sequential(torch.nn.Linear(D, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))
            self.decoder = torch.nn.Linear(2, D)

    def model(self, x, noise):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x, noise):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            h = self.encoder(x)
            pyro.sample("z", Given(h[:, :2], h[:, 2:].exp(), noise).to_event(1))

    def own_guide(self, x, noise):
        """One that draws."""
        with pyro.plate("data", len(x)):
            h = self.encoder(x)
            pyro.sample("z", dist.Normal(h[:, :2], h[:, 2:].exp()).to_event(1))

    @property
    def weights(self):
        return [p.detach().clone() for p in (*self.encoder.parameters(), *self.decoder.parameters())]

    def fit(self, data=None, **options):
        options = {"num_epochs": 30, "batch_size": 32, "learning_rate": 1e-2, "clip_norm": 1.0, "seed": 3} | options
        data = (self.x, self.noise) if data is None else data
        result = fit(self.model, self.guide, data, progress=False, **options)
        return {**vars(result), "weights": self.weights}
