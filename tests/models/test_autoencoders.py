"""Point posteriors, stacks and denoising, against PCA and the closed-form denoiser."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from scipy.linalg import subspace_angles
from sklearn.decomposition import PCA
from torch import nn
from torch.distributions import constraints
from truths import LinearGaussian

from pyro_vae import (
    VAE,
    BetaELBO,
    DenoisingELBO,
    adaptive_importance_sampling,
    fit,
    fit_layers,
    importance_sampling,
    stack,
)
from pyro_vae.distributions import ConditionalDelta, ConditionalNormal, StandardNormal
from pyro_vae.networks import MLP
from pyro_vae.objectives.denoising import gaussian_noise, masking_noise, salt_and_pepper_noise
from pyro_vae.objectives.schedules import linear


def autoencoder(size: int, code: int, *, hidden=(), name: str = "vae") -> VAE:
    return VAE(
        dist.ImproperUniform(constraints.real_vector, (), (code,)),
        ConditionalNormal(MLP(code, list(hidden)), size, scale=1.0),
        ConditionalDelta(MLP(size, list(hidden)), code),
        name=name,
    )


def decaying(num_epochs: int):
    return {
        "num_epochs": num_epochs,
        "scheduler": lambda optim: torch.optim.lr_scheduler.CosineAnnealingLR(optim, num_epochs),
        "progress": False,
        "seed": 0,
    }


@pytest.fixture
def rows():
    spread = torch.tensor([3.0, 2.0, 0.8, 0.5, 0.3])
    rotation = torch.linalg.qr(torch.randn(5, 5)).Q
    x = (torch.randn(400, 5) * spread) @ rotation.T
    return x - x.mean(0)


def error(vae: VAE, x: torch.Tensor) -> float:
    return (vae.reconstruct(x, mean=True) - x).square().sum(1).mean().item()


def test_the_linear_autoencoder_is_pca(rows):
    vae = autoencoder(5, 2)
    result = fit(vae.model, vae.guide, rows, batch_size=400, learning_rate=0.03, **decaying(600))
    pca = PCA(2).fit(rows.numpy())
    best = np.square(pca.inverse_transform(pca.transform(rows.numpy())) - rows.numpy()).sum(1).mean()
    assert 1 - 1e-5 < error(vae, rows) / best < 1.001
    # the loss is half the squared error, and the normalisation of the Normal
    assert result.loss[-1] == pytest.approx(0.5 * error(vae, rows) + 2.5 * np.log(2 * np.pi), rel=1e-3)
    angles = subspace_angles(vae.likelihood.head.weight.detach().numpy(), pca.components_.T)
    assert angles.max() < 1e-2


def test_log_p_is_refused_for_a_point(rows):
    vae = autoencoder(5, 2)
    for estimator in (importance_sampling, adaptive_importance_sampling):
        with pytest.raises(ValueError, match=r"site 'z' of the guide is a point \(Delta\)"):
            estimator(vae.model, vae.guide, rows)


def test_layers_are_trained_one_by_one_and_tuned_together(rows):
    options = {"batch_size": 400, "learning_rate": 0.02, **decaying(200)}
    layers, apart = ([autoencoder(5, 4), autoencoder(4, 3), autoencoder(3, 2)] for _ in range(2))
    for copy, layer in zip(apart, layers, strict=True):
        copy.load_state_dict(layer.state_dict())
    results = fit_layers(layers, rows, **options)
    codes = rows
    for layer, result in zip(apart, results, strict=True):
        assert fit(layer.model, layer.guide, codes, **options).loss == result.loss
        codes = layer.encode(codes).mean
    deep = stack(layers)
    torch.testing.assert_close(deep.encode(rows).mean, codes)
    by_hand = codes
    for layer in reversed(apart):
        by_hand = layer.decode(by_hand).mean
    torch.testing.assert_close(deep.reconstruct(rows, mean=True), by_hand)
    before = error(deep, rows)
    fit(deep.model, deep.guide, rows, **options)
    assert error(deep, rows) <= before
    assert layers[0].likelihood is deep.likelihood.parts[-1]  # tuned in place


def test_the_linear_denoiser():
    """min_A E|x − A(x + n)|² is at A = S (S + σ² I)⁻¹."""
    noise, x = 1.0, torch.randn(1000, 3) * torch.tensor([2.0, 1.0, 0.5])
    x = x - x.mean(0)
    vae = autoencoder(3, 3)
    loss = DenoisingELBO(gaussian_noise(noise))
    fit(vae.model, vae.guide, x, batch_size=200, learning_rate=0.02, loss=loss, **decaying(300))
    covariance = x.T @ x / len(x)

    def risk(matrix):
        rest = torch.eye(3) - matrix
        return ((rest @ covariance @ rest.T).trace() + noise**2 * matrix.square().sum()).item()

    best = covariance @ torch.linalg.inv(covariance + noise**2 * torch.eye(3))
    learned = vae.likelihood.head.weight.detach() @ vae.posterior.head.weight.detach()
    assert risk(best) * (1 - 1e-5) <= risk(learned) < 1.01 * risk(best)
    assert risk(learned) < 0.7 * risk(torch.eye(3))  # what the plain one learns


def test_the_denoising_objective_is_a_bound():
    truth = LinearGaussian(2, 4)
    x = truth.sample(50)
    bounds = [-DenoisingELBO(gaussian_noise(s)).loss(truth.model, truth.guide, x) for s in (0.0, 0.3, 1.0)]
    exact = truth.log_evidence(x).sum().item()
    assert bounds[0] == pytest.approx(exact, abs=1e-3)  # the exact posterior
    assert bounds[0] > bounds[1] > bounds[2]


def test_corruptions():
    x = torch.full((200, 100), 0.3)
    masked = masking_noise(0.2, value=-1.0)(x)
    assert set(masked.unique().tolist()) == {-1.0, x[0, 0].item()}
    assert abs((masked == -1).float().mean() - 0.2) < 5 * (0.16 / 20000) ** 0.5
    spoilt = salt_and_pepper_noise(0.4)(x)
    for value in (0.0, 1.0):
        assert abs((spoilt == value).float().mean() - 0.2) < 5 * (0.16 / 20000) ** 0.5
    noisy = gaussian_noise(2.0)(x)
    assert abs((noisy - x).std() - 2) < 0.05
    for wrong in (lambda: masking_noise(1.5), lambda: salt_and_pepper_noise(-0.1), lambda: gaussian_noise(-1.0)):
        with pytest.raises(ValueError, match="expected"):
            wrong()


def test_denoising_takes_other_objectives_and_steps():
    vae = VAE(StandardNormal(1), ConditionalNormal(MLP(1, []), 3, scale=1.0), ConditionalNormal(MLP(3, []), 1))
    x, loss = torch.randn(40, 3), DenoisingELBO(masking_noise(0.5), BetaELBO(linear(10)))
    fit(vae.model, vae.guide, x, num_epochs=11, loss=loss, progress=False)  # ends at beta = 1: no warning
    assert loss.beta == 0.0  # the one that was passed is never changed
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), loss=DenoisingELBO(masking_noise(0.5)))
    assert np.isfinite(svi.step(x))


def test_restores_digits_better_than_the_plain_one():
    from sklearn.datasets import load_digits

    images = torch.from_numpy(load_digits().images / 16).float()
    x, test = images[:1500].flatten(1), images[1500:].flatten(1)
    torch.manual_seed(1)
    corrupted = masking_noise(0.4)(test)
    errors = {}
    for name, loss in (("plain", Trace_ELBO()), ("denoising", DenoisingELBO(masking_noise(0.4)))):
        torch.manual_seed(0)
        vae = autoencoder(64, 16, hidden=[64], name=name)
        fit(vae.model, vae.guide, x, loss=loss, learning_rate=3e-3, num_epochs=40, seed=0, progress=False)
        errors[name] = (vae.decode(vae.encode(corrupted).mean).mean - test).square().sum(1).mean().item()
    assert errors["denoising"] < 0.6 * errors["plain"]


def test_a_network_of_ones_own_is_a_layer():
    first = autoencoder(5, 3)
    first.posterior = ConditionalDelta(nn.Sequential(nn.Linear(5, 8), nn.Tanh()), 3, features=8)
    assert stack([first, autoencoder(3, 2)]).encode(torch.zeros(7, 5)).event_shape == (2,)


def test_each_layer_has_a_checkpoint_of_its_own(rows, tmp_path):
    options = {"num_epochs": 3, "progress": False, "seed": 0}
    layers, again = ([autoencoder(5, 3), autoencoder(3, 3), autoencoder(3, 3)] for _ in range(2))
    results = fit_layers(layers, rows, checkpoint=tmp_path / "l.pt", **options)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["l_1.pt", "l_2.pt", "l_3.pt"]
    resumed = fit_layers(again, rows, checkpoint=str(tmp_path / "l.pt"), **options)
    assert [r.loss for r in resumed] == [r.loss for r in results]
    assert results[1].loss != results[2].loss
    for layer, other in zip(layers, again, strict=True):
        assert all(p.equal(q) for p, q in zip(layer.parameters(), other.parameters(), strict=True))


def test_validation_data_are_encoded_along(rows):
    x, validation = rows[:300], rows[300:]
    layers = [autoencoder(5, 3), autoencoder(3, 2)]
    start = layers[1].state_dict()
    start = {name: value.clone() for name, value in start.items()}
    options = {"num_epochs": 3, "progress": False, "seed": 0, "patience": 2}
    results = fit_layers(layers, x.numpy(), validation_data=validation.numpy(), **options)
    layers[1].load_state_dict(start)
    codes, of_validation = (layers[0].encode(y).mean for y in (x, validation))
    by_hand = fit(layers[1].model, layers[1].guide, codes, validation_data=of_validation, **options)
    assert by_hand == results[1]


def test_what_is_no_layer_or_no_rows_is_refused_at_the_start(rows):
    layers = [autoencoder(5, 3), autoencoder(3, 2)]
    before = [p.clone() for p in layers[0].parameters()]
    for wrong in ((rows, rows), torch.utils.data.DataLoader(rows), rows.tolist()):
        with pytest.raises(TypeError, match="fit_layers: data: expected a tensor or a numpy array, got"):
            fit_layers(layers, wrong, num_epochs=1)
    assert all(p.equal(q) for p, q in zip(layers[0].parameters(), before, strict=True))
    for call in (lambda vae: fit_layers(vae, rows, num_epochs=1), stack):
        with pytest.raises(TypeError, match="expected a list of VAEs, got one VAE"):
            call(layers[0])


def test_one_layer_in_two_places():
    layer, x = autoencoder(3, 3), torch.randn(7, 3)
    deep = stack([layer, layer])
    torch.testing.assert_close(deep.encode(x).mean, layer.encode(layer.encode(x).mean).mean)
    torch.testing.assert_close(deep.decode(x).mean, layer.decode(layer.decode(x).mean).mean)


def test_context_belongs_to_the_layer_of_the_data():
    first = VAE(
        StandardNormal(3),
        ConditionalNormal(MLP(3, [], context_size=2), 5, scale=1.0),
        ConditionalNormal(MLP(5, [], context_size=2), 3),
    )
    second, x, c = autoencoder(3, 2), torch.randn(7, 5), torch.randn(7, 2)
    deep = stack([first, second])
    codes = deep.encode(x, c).mean
    torch.testing.assert_close(codes, second.encode(first.encode(x, c).mean).mean)
    torch.testing.assert_close(deep.decode(codes, c).mean, first.decode(second.decode(codes).mean, c).mean)
    fit(deep.model, deep.guide, (x, c), num_epochs=1, progress=False)


def test_functions_are_stacked_too():
    def halves(x):
        return dist.Normal(x[..., :2] / 2, 1.0).to_event(1)

    def doubles(z):
        return dist.Normal(torch.cat([z, z], -1) * 2, 1.0).to_event(1)

    first, second = VAE(StandardNormal(2), doubles, halves), autoencoder(2, 1)
    deep, x = stack([first, second]), torch.randn(7, 4)
    codes = deep.encode(x).mean
    torch.testing.assert_close(codes, second.encode(x[:, :2] / 2).mean)
    torch.testing.assert_close(deep.decode(codes).mean, doubles(second.decode(codes).mean).mean)
    assert {id(p) for p in deep.parameters()} == {id(p) for p in second.parameters()}
    fit(deep.model, deep.guide, x, num_epochs=1, progress=False)
