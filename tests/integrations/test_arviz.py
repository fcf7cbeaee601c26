"""ArviZ conversion on whichever generation is installed: the numbers, the names, and the way to disk and back."""

import math

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from trees import ARVIZ_1, GROUPS, dataset, groups
from truths import LinearGaussian, small_vae

from pyro_vae import from_pyro_svi, importance_sampling


@pytest.fixture
def truth():
    return LinearGaussian(2, 3)


@pytest.fixture
def x(truth):
    return truth.sample(20)


@pytest.fixture
def tree(truth, x):
    return from_pyro_svi(
        truth.model, lambda x: truth.guide(x, 1.5), x, num_samples=2000,
        dims={"z": ["latent"], "x": ["feature"]}, coords={"feature": ["a", "b", "c"]},
    )  # fmt: skip


def test_type_groups_and_dimensions(tree):
    assert isinstance(tree, xr.DataTree if ARVIZ_1 else az.InferenceData)
    assert groups(tree) == GROUPS
    sizes = {"chain": 1, "draw": 2000, "data": 20, "latent": 2, "feature": 3}
    expected = {
        "posterior": {"z": "chain draw data latent"},
        "posterior_predictive": {"x": "chain draw data feature"},
        "log_likelihood": {"x": "chain draw data"},
        "log_prior": {"z": "chain draw data"},
        "prior": {"z": "chain draw data latent"},
        "prior_predictive": {"x": "chain draw data feature"},
        "observed_data": {"x": "data feature"},
        "sample_stats": dict.fromkeys(("log_p", "log_q", "log_weights", "log_p_x_given_latents"), "chain draw data")
        | dict.fromkeys(("log_evidence", "log_evidence_error", "ess", "pareto_khat"), "data"),
    }
    for group, variables in expected.items():
        data = dataset(tree, group)
        assert {name: " ".join(map(str, v.dims)) for name, v in data.data_vars.items()} == variables
        assert all(sizes[dim] == size for dim, size in data.sizes.items())
        assert data.attrs["inference_library"] == "pyro-ppl"
    assert tree["observed_data"]["feature"].values.tolist() == ["a", "b", "c"]


def test_numbers(tree, truth, x):
    """Every group against the closed form of the model."""

    def flat(group, name):
        return torch.tensor(tree[group][name].values[0])

    torch.testing.assert_close(torch.tensor(tree["observed_data"]["x"].values), x)
    z = flat("posterior", "z")
    exact = truth.posterior(x, 1.5)
    error = exact.variance.sqrt() / math.sqrt(2000)
    assert ((z.mean(0) - exact.mean) / error).abs().max() < 5
    assert (z.var(0) / exact.variance - 1).abs().max() < 0.3
    log_likelihood = dist.Normal(z @ truth.weight.T + truth.bias, truth.noise).to_event(1).log_prob(x)
    torch.testing.assert_close(flat("sample_stats", "log_p_x_given_latents"), log_likelihood)
    torch.testing.assert_close(flat("log_prior", "z"), dist.Normal(0.0, 1.0).log_prob(z).sum(-1))
    log_p = log_likelihood + dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
    torch.testing.assert_close(flat("sample_stats", "log_p"), log_p)
    torch.testing.assert_close(flat("sample_stats", "log_q"), exact.log_prob(z), atol=1e-4, rtol=1e-4)
    log_weights = flat("sample_stats", "log_weights")
    torch.testing.assert_close(log_weights, log_p - exact.log_prob(z), atol=1e-4, rtol=1e-4)
    stats = {name: torch.tensor(tree["sample_stats"][name].values) for name in ("log_evidence", "log_evidence_error")}
    torch.testing.assert_close(stats["log_evidence"], log_weights.double().logsumexp(0) - math.log(2000))
    others = [log_weights[torch.arange(2000) != s].double().logsumexp(0) - math.log(1999) for s in range(0, 2000, 100)]
    torch.testing.assert_close(flat("log_likelihood", "x")[::100], torch.stack(others))
    assert ((stats["log_evidence"] - truth.log_evidence(x)) / stats["log_evidence_error"]).abs().max() < 5
    replicated, mean = flat("posterior_predictive", "x"), exact.mean @ truth.weight.T + truth.bias
    spread = truth.weight @ exact.covariance_matrix[0] @ truth.weight.T + truth.noise**2 * torch.eye(3)
    assert ((replicated.mean(0) - mean) / (spread.diagonal() / 2000).sqrt()).abs().max() < 5
    generated = flat("prior_predictive", "x").flatten(0, 1)
    spread = truth.weight @ truth.weight.T + truth.noise**2 * torch.eye(3)
    assert ((generated.mean(0) - truth.bias) / (spread.diagonal() / len(generated)).sqrt()).abs().max() < 5
    assert (torch.cov(generated.T) / spread - 1).diagonal().abs().max() < 0.05
    assert flat("prior", "z").std().item() == pytest.approx(1.0, abs=0.02)
    evidence = importance_sampling(truth.model, lambda x: truth.guide(x, 1.5), x, num_particles=2000)
    assert tree["sample_stats"]["ess"].values == pytest.approx(evidence.effective_sample_size.numpy(), rel=0.2)
    assert (tree["sample_stats"]["pareto_khat"].values < 0.7).all()


def test_to_disk_and_back(tree, tmp_path):
    tree.to_netcdf(str(tmp_path / "tree.nc"), engine="h5netcdf")
    back = az.from_netcdf(str(tmp_path / "tree.nc"))
    assert groups(back) == GROUPS
    for group in GROUPS:
        xr.testing.assert_identical(dataset(tree, group).load(), dataset(back, group).load())
        assert dataset(back, group).attrs == dataset(tree, group).attrs


def test_arviz_works_on_it(tree):
    summary = az.summary(tree, var_names=["z"], kind="stats")
    assert len(summary) == 40
    import matplotlib.pyplot as plt

    if ARVIZ_1:
        az.plot_ppc_dist(tree)
    else:
        az.plot_ppc(tree, num_pp_samples=20)
    plt.close("all")


def test_inner_plates_get_their_names():
    x = torch.randn(6, 3)

    def model(x):
        with pyro.plate("rows", len(x), dim=-2):
            m = pyro.sample("m", dist.Normal(0.0, 1.0))
            with pyro.plate("columns", 3, dim=-1):
                pyro.sample("x", dist.Normal(m, 1.0), obs=x)

    def guide(x):
        with pyro.plate("rows", len(x), dim=-2):
            pyro.sample("m", dist.Normal(x.mean(-1, keepdim=True), 1.0))

    tree = from_pyro_svi(model, guide, x, num_samples=10, plate="rows")
    assert tree["posterior"]["m"].dims == ("chain", "draw", "rows")
    assert tree["log_likelihood"]["x"].dims == ("chain", "draw", "rows")
    assert tree["sample_stats"]["log_p_x_given_latents"].dims == ("chain", "draw", "rows", "columns")
    np.testing.assert_array_equal(tree["observed_data"]["x"], x)
    m = torch.tensor(tree["posterior"]["m"].values[0])
    expected = dist.Normal(m.unsqueeze(-1), 1.0).log_prob(x)
    torch.testing.assert_close(torch.tensor(tree["sample_stats"]["log_p_x_given_latents"].values[0]), expected)


def test_images_and_chunks_of_rows():
    vae, x = small_vae(), torch.bernoulli(torch.full((5000, 4, 4), 0.5))
    tree = from_pyro_svi(vae.model, vae.guide, x, num_samples=3, dims={"x": ["height", "width"]})
    assert tree["posterior_predictive"]["x"].dims == ("chain", "draw", "data", "height", "width")
    np.testing.assert_array_equal(tree["observed_data"]["x"], x)
    z = torch.tensor(tree["posterior"]["z"].values[0])
    conditional = torch.tensor(tree["sample_stats"]["log_p_x_given_latents"].values[0])
    torch.testing.assert_close(conditional, vae.decode(z).log_prob(x))


def test_wrong_names_are_refused(truth, x):
    with pytest.raises(ValueError, match=r"dims\['z'\]: expected 1 names for the event dimensions, or 2"):
        from_pyro_svi(truth.model, truth.guide, x, num_samples=2, dims={"z": ["a", "b", "c"]})
    with pytest.raises(ValueError, match=r"coords\['data'\]: expected 20 labels, got \(3,\)"):
        from_pyro_svi(truth.model, truth.guide, x, num_samples=2, coords={"data": [1, 2, 3]})
    with pytest.raises(ValueError, match=r"dims: expected names among .*'x', 'z'.*, got \['q'\]"):
        from_pyro_svi(truth.model, truth.guide, x, num_samples=2, dims={"q": ["latent"]})
    with pytest.raises(ValueError, match=r"coords: expected names among \['chain', .*, got \['latents'\]"):
        from_pyro_svi(truth.model, truth.guide, x, num_samples=2, coords={"latents": [1, 2]})


def test_bad_data_are_refused(truth, x):
    broken = x.clone()
    broken[7] = math.nan
    with pytest.raises(ValueError, match="rows are NaN or infinite, the first at row 7"):
        from_pyro_svi(truth.model, truth.guide, broken, num_samples=2)
    vae = small_vae()
    with pytest.raises(ValueError, match="outside the support of Bernoulli"):
        from_pyro_svi(vae.model, vae.guide, torch.full((5, 4, 4), 0.5), num_samples=2)
    with pytest.raises(ValueError, match="num_samples: expected at least 1, got 0"):
        from_pyro_svi(truth.model, truth.guide, x, num_samples=0)
