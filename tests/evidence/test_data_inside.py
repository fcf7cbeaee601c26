"""Evidence of pairs whose data are in closures, in dictionaries and lists: compiled or not, it is the same."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import LowRankMultivariateNormal

from pyro_vae import importance_sampling
from pyro_vae.evidence.compiled import compiled_log_weight
from pyro_vae.particles.sampler import ParticleSampler

ROWS, COLUMNS = 200, 20


def make_data():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(ROWS, COLUMNS, generator=generator), 0.3 * torch.randn(COLUMNS, generator=generator)


def make_pair(read):
    """z ~ N(0, 1), x ~ N(z w, I), whose log p(x) is that of N(0, I + w wᵀ); `read` finds (x, w) in the arguments."""

    def model(*args, **kwargs):
        x, w = read(*args, **kwargs)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z[..., None] * w, 1.0).to_event(1), obs=x)

    def guide(*args, **kwargs):
        x, w = read(*args, **kwargs)
        precision = 1 + w.square().sum()
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.9 * x @ w / precision, 1.2 * precision**-0.5))

    return model, guide


def make_joint(read):
    """The same model with all rows in one site, without a plate."""

    def model(*args):
        x, w = read(*args)
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z[..., None] * w, 1.0).to_event(2), obs=x)

    def guide(*args):
        x, w = read(*args)
        precision = 1 + w.square().sum()
        pyro.sample("z", dist.Normal(x @ w / precision, precision**-0.5).to_event(1))

    return model, guide


X, W = make_data()
EXACT = LowRankMultivariateNormal(torch.zeros(COLUMNS), W[:, None], torch.ones(COLUMNS)).log_prob(X).double()
PLACES = {
    "closure": (lambda: (X, W), (), {}),
    "dictionary": (lambda d: (d["x"], d["w"]), ({"x": X, "w": W},), {}),
    "list of tuples": (lambda a: (a[0][0], a[0][1]), ([(X, W)],), {}),
    "dictionary beside rows": (lambda x, d: (x, d["w"][0]), (X, {"w": [W]}), {}),
    "keyword beside rows": (lambda x, *, w: (x, w["w"]), (X,), {"w": {"w": W}}),
    "the same tensor twice": (lambda x, w, d: (x, (w + d[0]) / 2), (X, W, (W,)), {}),
    "rows and the same rows whole": (lambda x, d: (x + 0 * d[0].mean(), W), (X, [X]), {}),
}


@pytest.fixture
def runs(monkeypatch):
    """One entry for each run of the pair by Pyro, to count those that a replay took the place of."""
    made = []
    run = ParticleSampler.log_weight

    def counted(*args, **kwargs):
        made.append(1)
        return run(*args, **kwargs)

    monkeypatch.setattr(ParticleSampler, "log_weight", counted)
    return made


@pytest.mark.parametrize("place", PLACES)
def test_evidence_is_the_same_compiled_or_not_and_meets_the_closed_form(place, runs, request):
    if place not in ("closure", "keyword beside rows", "the same tensor twice"):
        request.getfixturevalue("by_operation")  # what the code is generated from is the same for all places
    read, args, kwargs = PLACES[place]
    model, guide = make_pair(read)
    values, counts = {}, {}
    for compile in (False, "auto", True):
        runs.clear()
        torch.manual_seed(0)
        options = {"num_particles": 400, "chunk_size": 10 * ROWS, "compile": compile, "progress": False}
        evidence = importance_sampling(model, guide, *args, **options, **kwargs)
        values[compile], counts[compile] = evidence.log_evidence, len(runs)
        z = (evidence.log_evidence - EXACT) / evidence.standard_error
        assert z.abs().max() < 4.5
        assert z.square().mean() < 1.5
    assert max(counts["auto"], counts[True]) < counts[False] / 2
    torch.testing.assert_close(values["auto"], values[False], rtol=0, atol=1e-5)
    if len(args) < 2 and "rows" not in place:  # generated code takes other chunks of rows, if these can be told apart
        torch.testing.assert_close(values[True], values[False], rtol=0, atol=1e-4)


@pytest.mark.parametrize("compile", [False, "auto", True])
def test_the_joint_evidence_of_data_in_a_closure_meets_the_closed_form(compile, runs):
    model, guide = make_joint(lambda: (X, W))  # the guide is exact
    evidence = importance_sampling(
        model, guide, num_particles=400, chunk_size=5, plate=None, compile=compile, progress=False
    )
    assert (len(runs) < 40) == (compile is not False)  # of 80 passes
    torch.testing.assert_close(evidence.log_evidence, EXACT.sum()[None], rtol=2e-6, atol=0)


def test_a_plate_that_takes_some_of_its_rows_is_not_compiled():
    def pair(kind):
        def function():
            with pyro.plate("data", ROWS, subsample_size=50) as rows:
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                if kind == "model":
                    pyro.sample("x", dist.Normal(z, 1.0), obs=X[rows, 0])

        return function

    sampler = ParticleSampler(pair("model"), pair("guide"))
    assert sampler.rows.fixed == 50
    assert compiled_log_weight(sampler, True, 100) is None
