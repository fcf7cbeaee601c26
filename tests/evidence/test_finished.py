"""Evidence kept in a file: nothing is estimated twice, and an interrupted run ends where it would have ended."""

import functools

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset
from truths import LinearGaussian, exact_log_evidence, exact_pair, linear_vae

from pyro_vae import (
    adaptive_importance_sampling,
    annealed_importance_sampling,
    fit,
    importance_sampling,
    prior_sampling,
    simulate,
)
from pyro_vae.evidence import log_weights
from pyro_vae.evidence.collect import LogWeightSummary

X = LinearGaussian(2, 4).sample(40)
FIELDS = ("log_evidence", "standard_error", "effective_sample_size", "pareto_khat", "num_zero")


class Interrupted(Exception):
    pass


@pytest.fixture
def passes(monkeypatch):
    """Counts passes of rows, and stops before one of them."""
    result, seen = LogWeightSummary.result, {"count": 0, "stop": None, "rows": 0}

    def counted(self):
        if seen["count"] == seen["stop"]:
            raise Interrupted
        seen["count"] += 1
        found = result(self)
        seen["rows"] += len(found[0])
        return found

    monkeypatch.setattr(log_weights.LogWeightSummary, "result", counted)
    return seen


def same(first, second, order=slice(None)):
    pairs = ((getattr(first, name)[order], getattr(second, name)) for name in FIELDS)
    return all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)


@pytest.mark.parametrize(
    "estimate",
    [
        functools.partial(importance_sampling, num_particles=50, chunk_size=500, compile=False),
        functools.partial(importance_sampling, num_particles=50, chunk_size=500, defensive=0.2),
        functools.partial(prior_sampling, num_particles=50, chunk_size=500, compile=False),
        functools.partial(adaptive_importance_sampling, num_particles=50, num_steps=2, chunk_size=500),
        functools.partial(
            annealed_importance_sampling, num_particles=4, num_temperatures=3, num_leapfrog=1, chunk_size=40
        ),
    ],
    ids=["importance", "defensive", "prior", "adaptive", "annealed"],
)
@pytest.mark.parametrize("seed", [3, None])
def test_an_interrupted_run_ends_where_it_would_have_ended(tmp_path, passes, estimate, seed):
    vae = linear_vae(2, 4)
    run = functools.partial(estimate, vae.model, vae.guide, seed=seed, progress=False)
    torch.manual_seed(5)
    expected = run(X, checkpoint=tmp_path / "whole.pt")
    assert passes["count"] >= 4
    each, passes["count"], passes["rows"], passes["stop"] = passes["count"], 0, 0, 3
    torch.manual_seed(5)
    with pytest.raises(Interrupted):
        run(X, checkpoint=tmp_path / "half.pt")
    done, passes["stop"] = passes["rows"], None
    torch.manual_seed(6)  # what the file goes on from is its own
    assert same(expected, run(X, checkpoint=tmp_path / "half.pt"))
    assert passes["count"] == each
    assert 0 < done < passes["rows"] == len(X)


def test_rows_are_found_in_any_order_and_new_ones_are_added(tmp_path, passes):
    vae = linear_vae(2, 4)
    run = functools.partial(importance_sampling, vae.model, vae.guide, num_particles=50, seed=0, progress=False)
    path, order = tmp_path / "e.pt", torch.randperm(40)
    first = run(X[:30], checkpoint=path)
    second = run(X[order], checkpoint=path)
    assert passes["rows"] == 40
    known = order < 30
    assert torch.equal(second.log_evidence[known], first.log_evidence[order[known]])
    loaded = run(DataLoader(TensorDataset(X), batch_size=16), checkpoint=path)
    assert same(loaded, second, order)
    assert torch.equal(run(X.numpy(), checkpoint=path).log_evidence, loaded.log_evidence)
    assert passes["rows"] == 40


def test_twins_have_draws_of_their_own(tmp_path, passes):
    model = exact_pair()[0]
    twins = torch.zeros(6)
    found = importance_sampling(
        model, wide, twins, num_particles=30, chunk_size=30, seed=0, checkpoint=tmp_path / "e.pt"
    )
    assert len(found.log_evidence.unique()) == 6
    again = importance_sampling(
        model, wide, twins[:5], num_particles=30, chunk_size=30, seed=0, checkpoint=tmp_path / "e.pt"
    )
    assert torch.equal(again.log_evidence, found.log_evidence[:5])
    assert passes["rows"] == 6


def wide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 1.0))


def test_joint_evidence_is_kept_as_one_result(tmp_path, passes):
    model, guide = exact_pair()
    run = functools.partial(importance_sampling, model, guide, plate=None, num_particles=30, seed=0)
    first = run(torch.arange(3.0), checkpoint=tmp_path / "e.pt")
    assert first.log_evidence.item() == pytest.approx(exact_log_evidence(torch.arange(3.0)).sum().item(), abs=1e-4)
    assert same(first, run(torch.arange(3.0), checkpoint=tmp_path / "e.pt"))
    assert passes["rows"] == 1
    with pytest.raises(ValueError, match="of another model or guide"):
        run(torch.arange(3.0) + 1, checkpoint=tmp_path / "e.pt")


def test_files_of_other_estimates_are_refused_and_left_alone(tmp_path):
    vae, path = linear_vae(2, 4), tmp_path / "e.pt"
    run = functools.partial(importance_sampling, vae.model, vae.guide, X, progress=False, checkpoint=path)
    run(num_particles=50, seed=0)
    before = path.read_bytes()
    for change, message in (
        ({"num_particles": 60}, "written with num_particles=50; this call has num_particles=60"),
        ({"seed": 1}, "written with seed=0; this call has seed=1"),
        ({"smooth": True}, "smooth=False; this call has smooth=True"),
    ):
        with pytest.raises(ValueError, match=message):
            run(**{"num_particles": 50, "seed": 0} | change)
    other = functools.partial(vae.model)
    with pytest.raises(ValueError, match="method='importance_sampling'"):
        prior_sampling(other, None, X, num_particles=50, seed=0, checkpoint=path)
    fit(vae.model, vae.guide, X, num_epochs=1, progress=False)
    with pytest.raises(ValueError, match="is of another model or guide, or of other weights"):
        run(num_particles=50, seed=0)
    assert path.read_bytes() == before
    torch.save({"weights": []}, path)
    with pytest.raises(ValueError, match="was not written by an estimate"):
        run(num_particles=50, seed=0)
    with pytest.raises(ValueError, match="got no folder"):
        importance_sampling(vae.model, vae.guide, X, checkpoint=tmp_path / "no" / "e.pt")
    simulated = simulate(vae.model, vae.guide, X)
    with pytest.raises(ValueError, match="no exact_draw"):
        annealed_importance_sampling(
            vae.model, vae.guide, *simulated.args, exact_draw=simulated.latents, checkpoint=tmp_path / "f.pt"
        )


def test_the_generator_is_where_it_would_be(tmp_path):
    """A seed disturbs no other draws, whether or not results are kept."""
    vae = linear_vae(2, 4)
    state = torch.get_rng_state()
    importance_sampling(vae.model, vae.guide, X, num_particles=5, seed=0, checkpoint=tmp_path / "e.pt")
    assert torch.equal(state, torch.get_rng_state())
