"""More pairs that would give a number which is no log p(x), and states that a tool must not leave or miss."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_vae import ImportanceWeightedELBO, adaptive_importance_sampling, importance_sampling

X = torch.linspace(-1.0, 1.0, 12)


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def test_an_inner_plate_that_subsamples_is_refused():
    def inner(x):
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("columns", 4, subsample_size=2, dim=-1) as columns:
                pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, columns])

    def guide(x):
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("z", dist.Normal(x.mean(-1, keepdim=True), 0.5))

    with pytest.raises(ValueError, match="plate 'columns' inside of plate 'data' has 2 of 4 elements"):
        importance_sampling(inner, guide, X.reshape(3, 4).repeat(3, 1), progress=False)


def test_enumeration_by_draws_is_refused():
    def mixture(x):
        with pyro.plate("data", len(x)):
            infer = {"enumerate": "parallel", "num_samples": 7}
            k = pyro.sample("k", dist.Categorical(torch.ones(2)), infer=infer)
            pyro.sample("x", dist.Normal(k.float(), 1.0), obs=x)

    with pytest.raises(ValueError, match=r"site 'k' of the (guide|model) is enumerated by draws \(num_samples\)"):
        importance_sampling(mixture, lambda x: None, X, progress=False)


def test_a_mask_of_a_distribution_is_a_mask_for_fitted_gaussians_too():
    mask = torch.tensor([True, False] * 6)

    def masked(x, mask):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([len(x)]).mask(mask))
            pyro.sample("x", dist.Normal(z, 1.0).mask(mask), obs=x)

    def guide(x, mask):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0).mask(mask))

    with pytest.raises(ValueError, match=r"latent sites \['z'\] are masked"):
        adaptive_importance_sampling(masked, guide, X, mask, progress=False)


@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_the_importance_weighted_objective_refuses_what_estimators_refuse(spread):
    def guide(x):
        with pyro.plate("data", len(x)):
            u = pyro.sample("u", dist.Normal(x, 1.0), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Normal(u, spread) if spread else dist.Delta(2 * u))

    with pytest.raises(ValueError, match=r"in auxiliary sites|the Jacobian"):
        ImportanceWeightedELBO(3).loss(model, guide, X)


class Encoder(nn.Module):
    """Asks for its mode in a method, without being called."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def encode(self, x):
        self.seen.add(self.training)
        return x / 2


def test_modules_that_are_used_through_a_method_run_in_evaluation_mode():
    encoder, seen = Encoder(), set()
    encoder.seen = seen

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder.encode(x), 1.0))

    importance_sampling(model, guide, X, num_particles=10, defensive=0.2, progress=False)
    assert False in seen
    assert encoder.training
    seen.clear()
    importance_sampling(model, guide, X, num_particles=10, progress=False)
    assert seen == {False}


def test_a_lazy_module_is_made_by_its_first_call_and_stays():
    network = nn.LazyLinear(2)

    def guide(x):
        loc, scale = network(x.unsqueeze(-1)).unbind(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale.exp()))

    assert importance_sampling(model, guide, X, num_particles=10, progress=False).log_evidence.isfinite().all()
    assert network(torch.zeros(1, 1)).shape == (1, 2)
