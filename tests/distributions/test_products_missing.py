"""Missing values, mixed tables and interrupted fits, against closed forms and uninterrupted ones."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import config_enumerate
from torch.distributions import MultivariateNormal
from truths import small_vae

from pyro_vae import (
    VAE,
    adaptive_importance_sampling,
    annealed_importance_sampling,
    fit,
    importance_sampling,
    impute,
)
from pyro_vae.distributions import (
    ConditionalBeta,
    ConditionalCategorical,
    ConditionalMultivariateNormal,
    ConditionalNormal,
    ConditionalPoisson,
    ConditionalProduct,
    ObservedPart,
    StandardNormal,
)
from pyro_vae.networks import MLP, MaskedInput


@pytest.fixture
def incomplete():
    """A linear-Gaussian VAE near its optimum, rows with holes, and the exact mean and covariance of x."""
    weight, noise = torch.randn(4, 2), 0.6
    x = torch.randn(400, 2) @ weight.T + noise * torch.randn(400, 4)
    holes = torch.rand(400, 4) < 0.3
    holes[holes.all(1), 0] = False
    posterior = ConditionalMultivariateNormal(MaskedInput(MLP(8, [64])), 2)
    vae = VAE(StandardNormal(2), ObservedPart(ConditionalNormal(MLP(2, []), 4, scale=noise)), posterior)
    with torch.no_grad():
        vae.likelihood.likelihood.head.weight.copy_(weight)
        vae.likelihood.likelihood.head.bias.zero_()
    vae.likelihood.requires_grad_(False)
    x = x.masked_fill(holes, torch.nan)
    fit(vae.model, vae.guide, x, num_epochs=200, learning_rate=5e-3, progress=False, seed=0)
    return vae, x, weight @ weight.T + noise**2 * torch.eye(4)


def test_evidence_of_the_observed_part(incomplete):
    vae, x, covariance = incomplete
    found = importance_sampling(vae.model, vae.guide, x, num_particles=5000, defensive=0.2, progress=False)
    seen = [~row.isnan() for row in x]
    exact = torch.stack(
        [
            MultivariateNormal(torch.zeros(int(o.sum())), covariance[o][:, o]).log_prob(row[o])
            for row, o in zip(x, seen, strict=True)
        ]
    )
    z = ((found.log_evidence - exact) / found.standard_error)[~found.doubtful]
    assert len(z) > 300
    assert z.abs().max() < 5
    assert z.square().mean() < 1.5


def test_imputations_have_the_conditional_moments(incomplete):
    vae, x, covariance = incomplete
    draws = impute(vae.model, vae.guide, x[:50], num_draws=2000, num_particles=5000)["x"]
    assert draws.shape == (2000, 50, 4)
    for n in range(50):
        o, m = ~x[n].isnan(), x[n].isnan()
        assert (draws[:, n, o] == x[n, o]).all()
        if m.any():
            gain = covariance[m][:, o] @ torch.linalg.inv(covariance[o][:, o])
            variance = (covariance[m][:, m] - gain @ covariance[o][:, m]).diagonal()
            error = (draws[:, n, m].mean(0) - gain @ x[n, o]) / (variance / 300).sqrt()  # draws are taken repeatedly
            assert error.abs().max() < 6
            assert (draws[:, n, m].var(0) / variance - 1).abs().max() < 0.5


def test_gradients_are_finite_and_infinities_refused(incomplete):
    vae, x, _ = incomplete
    with pytest.raises(ValueError, match="rows are infinite"):
        fit(vae.model, vae.guide, x.masked_fill(x.isnan(), torch.inf), num_epochs=1, progress=False)
    plain = VAE(StandardNormal(2), ConditionalNormal(MLP(2, []), 4), ConditionalNormal(MLP(4, []), 2), name="plain")
    with pytest.raises(ValueError, match="NaN or infinite"):
        fit(plain.model, plain.guide, x, num_epochs=1, progress=False)
    with pytest.raises(ValueError, match="no observed site takes NaN"):
        impute(plain.model, plain.guide, x.nan_to_num())
    with pytest.raises(TypeError, match="elements of MultivariateNormal are not independent"):
        ObservedPart(ConditionalMultivariateNormal(MLP(2, []), 4))(torch.zeros(3, 2))


def test_a_product_is_its_parts():
    network = MLP(2, [8])
    parts = [
        ConditionalNormal(network, 2),
        ConditionalCategorical(network, 1, num_categories=3),
        ConditionalPoisson(network, 1),
    ]
    p, z = ConditionalProduct(*parts), torch.randn(6, 2)
    x = p(z).sample()
    by_hand = parts[0](z).log_prob(x[:, :2]) + parts[1](z).log_prob(x[:, 2:3]) + parts[2](z).log_prob(x[:, 3:])
    torch.testing.assert_close(p(z).log_prob(x), by_hand)
    assert p(z).support.check(x).all()
    assert not p(z).support.check(x + torch.tensor([0.0, 0.0, 0.5, 0.0])).any()
    x[:, 2] = torch.nan
    observed = ObservedPart(p)(z)
    without = parts[0](z).log_prob(x[:, :2]) + parts[2](z).log_prob(x[:, 3:])
    torch.testing.assert_close(observed.log_prob(x), without)
    assert observed.support.check(x).all()


@pytest.mark.parametrize("compile", [False, "auto"])
def test_a_fit_goes_on_where_it_was(tmp_path, compile):
    x = torch.bernoulli(torch.full((60, 4, 4), 0.4))
    options = {"batch_size": 20, "validation_data": x[:20], "progress": False, "seed": 3, "compile": compile}
    decay = lambda optim: torch.optim.lr_scheduler.ExponentialLR(optim, 0.9)  # noqa: E731
    results, weights = [], []
    for stops in ([6], [2, 5, 6]):
        pyro.clear_param_store()
        torch.manual_seed(0)
        vae = small_vae()
        for stop in stops:
            path = tmp_path / f"{len(stops)}.pt"
            result = fit(vae.model, vae.guide, x, num_epochs=stop, scheduler=decay, checkpoint=path, **options)
            pyro.clear_param_store()
            state, vae = vae.state_dict(), small_vae()  # another process: nothing is left but the file
        results.append(result)
        weights.append(state)
    assert results[0].loss == results[1].loss
    assert results[0].validation_loss == results[1].validation_loss
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name
    other = small_vae(latent=3, name="other")
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(ValueError, match="of another model, guide"):
        fit(other.model, other.guide, x, num_epochs=9, checkpoint=path, **options)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_a_missing_value_is_filled_inside_any_support():
    p = ObservedPart(lambda z: dist.Uniform(10.0, 20.0).expand(z.shape).to_event(1))(torch.zeros(2, 3))
    x = torch.tensor([[12.0, torch.nan, 15.0], [torch.nan, torch.nan, torch.nan]])
    torch.testing.assert_close(p.log_prob(x), -torch.tensor([2.0, 0.0]) * math.log(10.0))
    assert p.support.check(x).all()
    assert p.support.check(x.masked_fill(x == 12, 9.0)).tolist() == [False, True]


def test_what_is_outside_the_support_is_named_without_the_missing():
    vae = VAE(
        StandardNormal(2),
        ObservedPart(ConditionalPoisson(MLP(2, []), 2)),
        ConditionalNormal(MaskedInput(MLP(4, [])), 2),
    )
    x = torch.tensor([[1.0, torch.nan], [torch.nan, 2.5], [3.0, 1.0], [0.0, 1.0]])
    with pytest.raises(
        ValueError, match=r"1 of 4 rows lie outside the support of Poisson .* row 1, .*from 2\.5 to 2\.5"
    ):
        importance_sampling(vae.model, vae.guide, x, progress=False)


def test_an_encoder_that_does_not_see_what_is_missing():
    likelihood = ObservedPart(ConditionalNormal(MLP(2, []), 3, scale=1.0))
    vae = VAE(StandardNormal(2), likelihood, ConditionalNormal(MLP(3, []), 2))
    x = torch.randn(20, 3)
    x[4, 1] = torch.nan
    with pytest.raises(ValueError, match=r"missing values \(NaN\)\. Try MaskedInput\(network\)"):
        fit(vae.model, vae.guide, x, num_epochs=1, progress=False)
    with pytest.raises(ValueError, match=r"site 'z' of the guide: draws that are NaN, the first at row 4"):
        importance_sampling(vae.model, vae.guide, x, progress=False)


def test_products_are_priors_and_posteriors_of_every_estimator():
    """A Normal and a Beta, x observed of both."""

    def family(size):
        return ConditionalProduct(ConditionalNormal(MLP(size, []), 1), ConditionalBeta(MLP(size, []), 1))

    prior = ConditionalProduct(ConditionalNormal(None, 1), ConditionalBeta(None, 1))
    vae = VAE(prior, ConditionalNormal(MLP(2, []), 2, scale=0.7), family(2))
    x = torch.randn(10, 2)
    plain = importance_sampling(vae.model, vae.guide, x, num_particles=20_000, progress=False)
    for estimator, options in (
        (adaptive_importance_sampling, {"num_particles": 3000}),
        (annealed_importance_sampling, {"num_particles": 64, "num_temperatures": 20}),
    ):
        found = estimator(vae.model, vae.guide, x, progress=False, **options)
        error = (found.standard_error.square() + plain.standard_error.square()).sqrt()
        assert ((found.log_evidence - plain.log_evidence).abs() < 5 * error + 1e-3).all()


def test_a_product_calls_what_its_parts_are():
    class Shifted(ConditionalNormal):
        def forward(self, *inputs, event_dims=None):
            return dist.Normal(super().forward(*inputs, event_dims=event_dims).mean + 100, 1.0).to_event(1)

    network = MLP(2, [4])
    parts = Shifted(network, 2), Shifted(network, 1)
    assert (ConditionalProduct(*parts)(torch.zeros(5, 2)).mean > 90).all()


def test_imputation_draws_no_latents_that_are_summed_out():
    likelihood = ObservedPart(ConditionalNormal(None, 3))

    @config_enumerate
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Bernoulli(0.5))
            pyro.sample("x", likelihood().expand([len(x)]), obs=x)

    x = torch.randn(20, 3)
    x[4, 1] = torch.nan
    with pytest.raises(ValueError, match=r"latent sites \['y'\] are summed out in the model"):
        impute(model, lambda x: None, x)
