"""Missing values, mixed tables and interrupted fits, against closed forms and uninterrupted ones."""

import pyro
import pytest
import torch
from torch.distributions import MultivariateNormal
from truths import small_vae

from pyro_vae import VAE, fit, importance_sampling, impute
from pyro_vae.distributions import (
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
    with pytest.raises(ValueError, match="of another model, guide or optimizer"):
        fit(other.model, other.guide, x, num_epochs=9, checkpoint=path, **options)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
