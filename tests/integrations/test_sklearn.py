"""VAETransformer: scikit-learn's own checks, and numbers against PCA and the evidence of probabilistic PCA."""

import pickle

import numpy as np
import pyro
import pytest
import torch
from scipy.stats import multivariate_normal
from torch.distributions import AffineTransform

pytest.importorskip("sklearn")

from sklearn.base import clone
from sklearn.decomposition import PCA
from sklearn.model_selection import GridSearchCV, KFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks
from truths import linear_vae_log_evidence

from pyro_vae import VAE, importance_sampling
from pyro_vae.distributions import ConditionalFlow, ConditionalNormal, StandardNormal
from pyro_vae.integrations.sklearn import VAETransformer
from pyro_vae.networks import MLP

# what scikit-learn asks of every estimator, and a score from random draws cannot give
DOES_NOT_APPLY = {
    "check_methods_sample_order_invariance": "score_samples draws its particles: a row's noise depends on its place",
    "check_methods_subset_invariance": "score_samples draws its particles: a row's noise depends on its place",
}


@parametrize_with_checks(
    [VAETransformer(num_epochs=2, num_particles=100)], expected_failed_checks=lambda _: DOES_NOT_APPLY
)
def test_the_checks_of_scikit_learn(estimator, check):
    check(estimator)


MEAN, NOISE = np.arange(6) / 2, 0.25
WEIGHT = np.linalg.qr(np.random.default_rng(9).normal(size=(6, 2)))[0] * [3.0, 1.5]  # two factors of unlike size


def linear_data(rows):
    rng = np.random.default_rng(0)
    return rng.normal(size=(rows, 2)) @ WEIGHT.T + MEAN + NOISE * rng.normal(size=(rows, 6))


def linear(n_components=2, **options):
    return VAETransformer(n_components, hidden_sizes=(), random_state=0, **options)


def squared_error(reduce, x):
    return np.square(reduce.inverse_transform(reduce.transform(x)) - x).sum(1).mean()


def test_the_round_trip_of_a_linear_model_is_that_of_pca():
    """The posterior mean shrinks a factor of variance λ by s²/λ, which costs Σ s⁴/λ: here, 0.8 % of PCA's error."""
    x = linear_data(3000)
    reduce = linear(num_epochs=400, batch_size=3000, learning_rate=0.02).fit(x)
    best = squared_error(PCA(2).fit(x), x)
    assert best < squared_error(reduce, x) < 1.02 * best
    # at the optimum of probabilistic PCA the noise variance is the mean of the eigenvalues left out
    left_out = np.linalg.eigvalsh(np.cov(x.T, bias=True))[:4].mean()
    assert reduce.vae_.likelihood.scale().item() ** 2 == pytest.approx(left_out, rel=0.03)


def test_score_samples_is_the_log_density_of_the_model():
    x = linear_data(200)
    reduce = linear(num_epochs=60, learning_rate=0.03, num_particles=2000).fit(x)
    rows = torch.tensor(x, dtype=torch.float32)
    exact = linear_vae_log_evidence(reduce.vae_, rows).numpy()
    error = importance_sampling(reduce.vae_.model, reduce.vae_.guide, rows, num_particles=2000).standard_error.numpy()
    scores = reduce.score_samples(x)
    assert (np.abs(scores - exact) < 5 * error + 1e-4).all()
    assert error.max() < 0.3  # so that the line above says something
    assert reduce.score(x) == pytest.approx(scores.mean())
    assert reduce.score(x) == reduce.score(x)  # the same draws each time


def test_parameters_are_kept_set_and_cloned():
    x = linear_data(50)
    options = {
        "n_components": 1,
        "hidden_sizes": (3,),
        "build": None,
        "num_epochs": 2,
        "batch_size": 20,
        "learning_rate": 0.01,
        "num_particles": 7,
        "random_state": 5,
    }
    direct = VAETransformer(**options)
    assert direct.get_params() == options
    by_setting = VAETransformer().set_params(**options)
    copied = clone(direct.fit(x))
    assert copied.get_params() == options
    assert not hasattr(copied, "vae_")
    codes = direct.transform(x)
    for other in (by_setting, copied):
        np.testing.assert_array_equal(other.fit(x).transform(x), codes)
    for change in ({"hidden_sizes": ()}, {"num_epochs": 3}, {"batch_size": 50}, {"learning_rate": 0.02}):
        assert not np.allclose(clone(direct).set_params(**change).fit(x).transform(x), codes), change
    with pytest.raises(ValueError, match="Invalid parameter 'latent'"):
        direct.set_params(latent=3)


def test_another_vae_is_built_from_the_sizes():
    """Its codes, reconstructions and loss are those of the maps f and g written by hand; they are left untrained."""

    def build(features, latent):
        vae = VAE(
            StandardNormal(latent),
            ConditionalNormal(MLP(latent, []), features, scale=1.0),
            ConditionalNormal(MLP(features, []), latent, scale=0.5),
        )
        with torch.no_grad():
            for part in (vae.likelihood, vae.posterior):
                part.head.weight.copy_(torch.eye(*part.head.weight.shape) * 2)
                part.head.bias.fill_(0.25)
        return vae

    x = linear_data(40)
    reduce = VAETransformer(2, build=build, num_epochs=60, batch_size=20, learning_rate=1e-9, random_state=0).fit(x)
    codes, back = 2 * x[:, :2] + 0.25, np.full((40, 6), 0.25)
    back[:, :2] += 2 * codes
    np.testing.assert_allclose(reduce.transform(x), codes, atol=1e-5)
    np.testing.assert_allclose(reduce.inverse_transform(codes), back, atol=1e-5)
    # −ELBO of z ~ N(f(x), I/4): E|x − g(z)|²/2 + 3 log 2π + KL(q‖p), with E|x − g(z)|² = |x − g(f(x))|² + |W|²/4
    kl = 0.5 * np.square(codes).sum(1) + 0.25 - 1 - np.log(0.25)
    exact = (np.square(x - back).sum(1) / 2 + (8 / 4) / 2 + 3 * np.log(2 * np.pi) + kl).mean()
    assert abs(reduce.loss_.mean() - exact) < 5 * reduce.loss_.std() / np.sqrt(60)
    assert reduce.loss_.std() < 0.1 * exact


def test_a_pipeline_in_a_grid_search_finds_the_number_of_factors():
    """By held-out log p(x): two factors beat the best model of one, and no model beats the truth, but for chance."""
    x = linear_data(300)
    reduce = linear(num_epochs=15, batch_size=15, learning_rate=0.03, num_particles=100)
    sizes = {"vaetransformer__n_components": [1, 2]}
    search = GridSearchCV(make_pipeline(StandardScaler(), reduce), sizes, cv=KFold(2)).fit(x)
    assert search.best_params_ == {"vaetransformer__n_components": 2}
    truth = multivariate_normal(MEAN, WEIGHT @ WEIGHT.T + NOISE**2 * np.eye(6))
    for fold, (train, test) in enumerate(KFold(2).split(x)):
        scaler = StandardScaler().fit(x[train])
        scaled = {"train": scaler.transform(x[train]), "test": scaler.transform(x[test])}
        one, two = (search.cv_results_[f"split{fold}_test_score"][i] for i in range(2))
        best_one = PCA(1).fit(scaled["train"]).score(scaled["test"])  # of probabilistic PCA
        exact = truth.logpdf(x[test]).mean() + np.log(scaler.scale_).sum()  # in units of the scaler
        assert one < best_one + 0.05
        assert best_one < two < exact + 0.05
        if fold == 0:
            assert two == pytest.approx(clone(reduce).fit(scaled["train"]).score(scaled["test"]), rel=1e-6)
    best = search.best_estimator_
    codes = best[-1].transform(best[0].transform(x))
    np.testing.assert_array_equal(best.transform(x), codes)
    back = best[-1].inverse_transform(codes) * best[0].scale_ + best[0].mean_
    np.testing.assert_allclose(best.inverse_transform(codes), back, atol=1e-5)


def test_a_pickle_gives_the_same_codes():
    x = linear_data(50)
    reduce = VAETransformer(hidden_sizes=(8,), num_epochs=2, num_particles=20, random_state=0).fit(x)
    again = pickle.loads(pickle.dumps(reduce))
    codes = reduce.transform(x)
    np.testing.assert_array_equal(again.transform(x), codes)
    np.testing.assert_array_equal(again.inverse_transform(codes), reduce.inverse_transform(codes))
    np.testing.assert_array_equal(again.score_samples(x), reduce.score_samples(x))
    np.testing.assert_array_equal(again.loss_, reduce.loss_)


def test_a_flow_as_posterior_gives_means_of_draws():
    def build(num_features, latent_size):
        base = ConditionalNormal(MLP(num_features, []), latent_size, scale=0.5)
        likelihood = ConditionalNormal(MLP(latent_size, []), num_features, scale=1.0)
        return VAE(StandardNormal(latent_size), likelihood, ConditionalFlow(base, [AffineTransform(1.0, 2.0)]))

    x = linear_data(50)
    reduce = VAETransformer(build=build, num_epochs=1, num_particles=400, random_state=0).fit(x)
    exact = 1 + 2 * reduce.vae_.posterior.base(torch.as_tensor(x).float()).mean.detach().numpy()
    codes = reduce.transform(x)
    assert np.abs(codes - exact).max() < 5 * 2 * 0.5 / np.sqrt(400)  # of 100 codes
    np.testing.assert_array_equal(reduce.transform(x), codes)
    with pytest.raises(ValueError, match="inverse_transform: expected 2 components, got 3"):
        reduce.inverse_transform(np.zeros((4, 3)))


def test_a_random_state_repeats():
    x = linear_data(60)

    def codes(random_state):
        torch.manual_seed(torch.seed() % 1000)  # whatever the global state is
        return VAETransformer(num_epochs=2, batch_size=20, random_state=random_state).fit_transform(x)

    first = codes(4)
    np.testing.assert_array_equal(codes(4), first)
    np.testing.assert_array_equal(codes(np.random.RandomState(4)), first)
    assert not np.allclose(codes(5), first)
    one = np.random.RandomState(4)  # an instance goes on, as everywhere in scikit-learn
    assert not np.allclose(codes(one), codes(one))


def test_global_states_stay_as_they_were():
    x = linear_data(50)
    pyro.param("mine", torch.tensor(3.0))
    torch.manual_seed(1)
    np.random.seed(1)
    expected = torch.rand(3), np.random.rand(3)
    torch.manual_seed(1)
    np.random.seed(1)
    reduce = VAETransformer(num_epochs=2, num_particles=20, random_state=0).fit(x)
    reduce.score(x)
    reduce.inverse_transform(reduce.transform(x))
    assert torch.equal(torch.rand(3), expected[0])
    assert np.array_equal(np.random.rand(3), expected[1])
    assert list(pyro.get_param_store()) == ["mine"]
