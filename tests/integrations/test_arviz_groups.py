"""What `from_pyro` and `from_pyro_svi` share: steps that are stacked, names, and the way to disk and back."""

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from pyro.infer import MCMC, NUTS
from trees import ARVIZ_1, back_from, dataset, dims, groups, with_draws

from pyro_vae import from_pyro, from_pyro_svi

STEPS = 12


def chain(y):
    """A random walk in steps, each observed."""
    with pyro.plate("sequence", len(y)):
        z = torch.zeros(())
        for t in pyro.markov(range(STEPS)):
            z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0))
            pyro.deterministic(f"twice_{t}", 2 * z, event_dim=0)
            pyro.sample(f"y_{t}", dist.Normal(z, 0.5), obs=y[:, t])


def smoother(y):
    with pyro.plate("sequence", len(y)):
        for t in pyro.markov(range(STEPS)):
            pyro.sample(f"z_{t}", dist.Normal(y[:, t], 0.5))


@pytest.fixture
def y():
    return torch.randn(6, STEPS).cumsum(1)


def svi(y, **options):
    return from_pyro_svi(chain, smoother, y, num_samples=20, plate="sequence", **options)


def test_steps_are_stacked(y):
    """Steps 0 … 11, in the order of their numbers, not of their letters."""
    stack = dict.fromkeys(("z", "y", "twice"), "time")
    for tree in (svi(y, stack=stack), from_pyro(mcmc(y), stack=stack)):
        assert dims(tree, "posterior") == dict.fromkeys(("z", "twice"), "chain draw sequence time")
        assert dims(tree, "posterior_predictive") == {"y": "chain draw sequence time"}
        assert dims(tree, "observed_data") == {"y": "sequence time"}
        assert dims(tree, "log_prior") == {"z": "chain draw sequence time"}
        assert dims(tree, "prior").keys() == {"z", "twice"}
        np.testing.assert_array_equal(tree["observed_data"]["y"], y)
        assert tree["posterior"]["time"].values.tolist() == list(range(STEPS))
        z = torch.tensor(tree["posterior"]["z"].values[0])
        torch.testing.assert_close(torch.tensor(tree["posterior"]["twice"].values[0]), 2 * z)
        conditional = torch.tensor(tree["sample_stats"]["log_p_y_given_latents"].values[0])
        torch.testing.assert_close(conditional, dist.Normal(z, 0.5).log_prob(y))
        before = torch.cat([torch.zeros_like(z[..., :1]), z[..., :-1]], -1)
        log_prior = torch.tensor(tree["log_prior"]["z"].values[0])
        torch.testing.assert_close(log_prior, dist.Normal(before, 1.0).log_prob(z))


def mcmc(y):
    return with_draws({f"z_{t}": torch.randn(10, len(y)) for t in range(STEPS)}, chain, y)


def test_event_dimensions_follow_the_steps():
    def model(x):
        with pyro.plate("data", len(x)):
            for t in range(1, 3):
                z = pyro.sample(f"z{t}", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            for t in range(1, 3):
                pyro.sample(f"z{t}", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    options = {"stack": {"z": "layer"}, "dims": {"z": ["latent"]}, "coords": {"layer": ["low", "high"]}}
    tree = from_pyro_svi(model, guide, torch.randn(5), num_samples=7, **options)
    assert dims(tree, "posterior") == {"z": "chain draw data layer latent"}
    assert dims(tree, "log_prior") == {"z": "chain draw data layer"}
    assert tree["posterior"]["layer"].values.tolist() == ["low", "high"]
    tree = from_pyro_svi(model, guide, torch.randn(5), num_samples=7, stack={"z": "layer"})
    assert tree["posterior"]["layer"].values.tolist() == [1, 2]


def test_steps_that_do_not_stack_are_refused(y):
    with pytest.raises(ValueError, match=r"stack\['w'\]: expected variables w_0, w_1, …, got only \[.*'y_0'"):
        svi(y, stack={"w": "time"})

    def ragged():
        for t in range(2):
            pyro.sample(f"z_{t}", dist.Normal(torch.zeros(t + 1), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.zeros(()))

    run = MCMC(NUTS(ragged), num_samples=3, warmup_steps=3, disable_progbar=True)
    run.run()
    with pytest.raises(ValueError, match=r"stack\['z'\]: expected the same shape in all steps, got \{0: \(3, 1\), 1: "):
        from_pyro(run, stack={"z": "time"})


def test_two_variables_with_other_steps_need_other_dimensions():
    def model():
        for t in range(3):
            z = pyro.sample(f"z_{t}", dist.Normal(0.0, 1.0))
            if t:
                pyro.sample(f"w_{t}", dist.Normal(z, 1.0))

    run = MCMC(NUTS(model), num_samples=3, warmup_steps=3, disable_progbar=True)
    run.run()
    with pytest.raises(ValueError, match=r"dimension 'time' of posterior: '.' has . labels from . to 2, another"):
        from_pyro(run, stack={"z": "time", "w": "time"})
    tree = from_pyro(run, stack={"z": "time", "w": "time_of_w"})
    assert tree["posterior"]["time_of_w"].values.tolist() == [1, 2]


@pytest.mark.filterwarnings("ignore:Consolidated metadata is currently not part")
@pytest.mark.parametrize("form", ["netcdf", "zarr"])
@pytest.mark.parametrize("source", ["svi", "mcmc"])
def test_to_disk_and_back(y, tmp_path, form, source):
    if form == "zarr":
        zarr = pytest.importorskip("zarr")
        if not ARVIZ_1 and not zarr.__version__.startswith("2."):
            pytest.skip("ArviZ 0.2x needs zarr 2")
        try:
            xr.Dataset().to_zarr(str(tmp_path / "probe"))
        except TypeError:
            pytest.skip("this xarray needs zarr 3")
    options = {"stack": {"y": "time", "z": "time"}, "predictions": (y[:2],), "coords": {"sequence": list("abcdef")}}
    tree = svi(y, **options) if source == "svi" else from_pyro(mcmc(y), **options)
    back = back_from(tree, tmp_path / "tree", form)
    assert groups(back) == groups(tree)
    assert "predictions" in groups(tree)
    for group in groups(tree):
        xr.testing.assert_identical(dataset(tree, group).load(), dataset(back, group).load())
        assert dataset(back, group).attrs.keys() == dataset(tree, group).attrs.keys()
    assert az.summary(back, var_names=["z"], kind="stats").shape[0] == 6 * STEPS
