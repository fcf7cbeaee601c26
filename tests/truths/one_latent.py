"""z ~ N(0, 1), x ~ N(z, 1), with the exact posterior as guide, under plates of any kind."""

import math

import pyro
import pyro.distributions as dist
import torch


def exact_pair(size=None, subsample=None, lookup=False):
    """z ~ N(0, 1), x ~ N(z, 1) with its exact posterior as guide: every weight is log N(x; 0, 2)."""

    def model(x):
        with pyro.plate("data", size or len(x), subsample_size=subsample) as index:
            z = pyro.sample("z", dist.Normal(torch.zeros((), device=x.device), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index] if lookup else x)

    def guide(x):
        with pyro.plate("data", size or len(x), subsample_size=subsample) as index:
            pyro.sample("z", dist.Normal((x[index] if lookup else x) / 2, math.sqrt(0.5)))

    return model, guide


def exact_log_evidence(x):
    return dist.Normal(0.0, math.sqrt(2.0)).log_prob(x)
