"""Which arguments have rows is found by a probe, not by their length."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_vae import importance_sampling
from pyro_vae.pairs.pair import Pair

X = torch.linspace(-1.0, 1.0, 8)


def guide(x, *others):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.0, 1.0).expand([len(x)]))


def model_with(likelihood):
    def model(x, *others):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", likelihood(z, *others), obs=x)

    return model


def mixture(z, means):
    return dist.MixtureSameFamily(dist.Categorical(torch.ones(8)), dist.Normal(means + z.unsqueeze(-1), 0.5))


MEANS = torch.linspace(-4.0, 4.0, 8)
INDEX = torch.tensor([3, 1, 4, 1, 5, 2, 6, 0])
CASES = {
    "a context": (lambda z, c: dist.Normal(z + c, 1.0), (MEANS,), {0, 1}),
    "means of a mixture": (mixture, (MEANS,), {0}),
    "weights of a sum": (lambda z, w: dist.Normal(z, w.sum()), (torch.full((8,), 0.2),), {0}),
    "the largest": (lambda z, w: dist.Normal(z, w.max()), (MEANS,), {0}),
    "the last": (lambda z, w: dist.Normal(z, w[-1]), (MEANS,), {0}),
    "a table and its index": (lambda z, t, i: dist.Normal(z + t[i], 1.0), (MEANS, INDEX), {0, 2}),
    "a matrix": (lambda z, m: dist.Normal(z, m.trace()), (torch.eye(8),), {0}),
    "a context and a table": (lambda z, c, w: dist.Normal(z + c, w.sum()), (MEANS, torch.full((8,), 0.1)), {0, 1}),
}


@pytest.mark.parametrize("name", CASES)
def test_arguments_that_are_as_long_as_the_data(name):
    """The same evidence in one pass of all rows and in passes of single rows, each of all its particles."""
    likelihood, others, cut = CASES[name]
    model = model_with(likelihood)
    assert Pair(model, guide, (X, *others)).rows.cut_keys == cut
    options = {"num_particles": 4000, "progress": False, "compile": False}
    whole = importance_sampling(model, guide, X, *others, chunk_size=10**9, **options)
    single = importance_sampling(model, guide, X, *others, chunk_size=4000, **options)
    error = (whole.standard_error.square() + single.standard_error.square()).sqrt()
    assert ((whole.log_evidence - single.log_evidence).abs() < 5 * error).all()


def test_the_evidence_is_that_of_the_whole_argument():
    """x ~ N(z, Σ w), as long as the data: in closed form."""
    w = torch.full((8,), 0.2)
    model = model_with(lambda z, w: dist.Normal(z, w.sum()))
    evidence = importance_sampling(model, guide, X, w, num_particles=200_000, progress=False)
    exact = dist.Normal(0.0, (1 + 1.6**2) ** 0.5).log_prob(X)
    assert ((evidence.log_evidence - exact).abs() < 5 * evidence.standard_error).all()


def test_rows_that_depend_on_each_other_pass_together():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + x.mean(), 1.0), obs=x)

    assert not Pair(model, guide, (X,)).rows.separable


def test_keywords_have_rows_too():
    def model(x, *, c):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + c, 1.0), obs=x)

    def guide_with(x, *, c):
        guide(x)

    assert Pair(model, guide_with, (X,), {"c": MEANS}).rows.cut_keys == {0, "c"}


def test_small_data_pass_together():
    model = model_with(lambda z: dist.Normal(z, 1.0))
    for n in (1, 2, 3, 4):
        assert not Pair(model, guide, (X[:n],)).rows.separable
    assert Pair(model, guide, (X[:5],)).rows.separable


EXACT = dist.Normal(0.0, 2**0.5).log_prob(X)


def plated(make_plate, rows_of):
    def model(x, *others):
        with make_plate(x, *others) as rows:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=rows_of(x, rows))

    def guide(x, *others):
        with make_plate(x, *others) as rows:
            pyro.sample("z", dist.Normal(rows_of(x, rows) / 2, 0.5**0.5))

    return model, guide


def test_a_mini_batch_in_a_plate_of_all_data():
    """The plate draws indices that nobody uses: the rows are those of the argument, whatever else is long."""
    pair = plated(lambda x, *_: pyro.plate("data", 100, subsample_size=len(x)), lambda x, _: x)
    for others in ((), (torch.zeros(100),), (torch.zeros(8),)):
        evidence = importance_sampling(*pair, X, *others, num_particles=10, progress=False)
        torch.testing.assert_close(evidence.log_evidence.float(), EXACT)


def test_a_fixed_mini_batch_in_a_plate_of_all_data():
    pair = plated(lambda x, *_: pyro.plate("data", 100, subsample_size=8), lambda x, _: x)
    for others in ((), (torch.zeros(100),)):
        evidence = importance_sampling(*pair, X, *others, num_particles=10, progress=False)
        torch.testing.assert_close(evidence.log_evidence.float(), EXACT)


def test_indices_that_the_user_gives():
    indices = torch.arange(20, 28)
    pair = plated(lambda x, *_: pyro.plate("data", 100, subsample=indices), lambda x, _: x)
    for others in ((), (torch.zeros(100),)):
        evidence = importance_sampling(*pair, X, *others, num_particles=10, progress=False)
        torch.testing.assert_close(evidence.log_evidence.float(), EXACT)


def test_indices_that_the_user_gives_into_all_data():
    x, indices = torch.linspace(-2.0, 2.0, 100), torch.arange(20, 28)
    pair = plated(lambda x, *_: pyro.plate("data", 100, subsample=indices), lambda x, rows: x[rows])
    evidence = importance_sampling(*pair, x, num_particles=10, progress=False)
    torch.testing.assert_close(evidence.log_evidence.float(), dist.Normal(0.0, 2**0.5).log_prob(x[indices]))


def test_a_plate_that_takes_its_rows_from_all_data():
    pair = plated(lambda x, *_: pyro.plate("data", 8, subsample_size=3), lambda x, rows: x[rows])
    for others in ((), (torch.zeros(3),)):
        evidence = importance_sampling(*pair, X, *others, num_particles=10, progress=False)
        torch.testing.assert_close(evidence.log_evidence.float(), EXACT)


def test_a_closed_over_mask_is_not_cut_and_so_nothing_is():
    """Its shape fits no window: a log-probability that fails is no agreement."""
    from pyro import poutine

    mask = torch.tensor([True, False] * 4)

    def model(x):
        with pyro.plate("data", len(x)), poutine.mask(mask=mask):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def masked_guide(x):
        with pyro.plate("data", len(x)), poutine.mask(mask=mask):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    evidence = importance_sampling(model, masked_guide, X, num_particles=10, progress=False)
    torch.testing.assert_close(evidence.log_evidence.float(), EXACT * mask)
