"""What a VAE says about roles, data and contexts that do not fit."""

import pyro
import pyro.distributions as dist
import pyro.optim
import pytest
import torch
from pyro.infer import (
    SVI,
    Trace_ELBO,
)
from truths import small_vae

from pyro_vae import VAE, fit, importance_sampling, prior_sampling
from pyro_vae.distributions import ConditionalBernoulli, ConditionalNormal, StandardNormal
from pyro_vae.networks import MLP


def binary(n, shape=(4, 4)):
    return torch.bernoulli(torch.full((n, *shape), 0.5))


def vae_with(prior=None, likelihood=None, posterior=None):
    vae = small_vae()
    return VAE(prior or vae.prior, likelihood or vae.likelihood, posterior or vae.posterior)


@pytest.mark.parametrize(
    ("vae", "x", "message"),
    [
        (
            vae_with(prior=StandardNormal(3)),
            binary(5),
            r"posterior: expected event shape \(3,\), that of the prior",
        ),
        (
            vae_with(posterior=lambda x: dist.Normal(x[:, 0, :2], 1.0)),
            binary(5),
            r"posterior: expected event shape \(2,\).*batch shape \(5, 2\). Try .to_event\(1\)",
        ),
        (small_vae(), binary(5, (5, 4)), r"MLP: expected inputs that end in shape \(4, 4\), got \(5, 5, 4\)"),
        (
            vae_with(likelihood=ConditionalBernoulli(MLP(2, [4]), (4, 3))),
            binary(5),
            r"likelihood: expected event shape \(4, 4\), that of a row of the data, got event shape \(4, 3\)",
        ),
        (small_vae(), torch.rand(5, 4, 4), r"site 'x': 5 of 5 rows lie outside the support of Bernoulli.*binarisation"),
        (small_vae(), binary(5).byte(), r"expected inputs of torch.float32, the weights' dtype, got torch.uint8"),
        (small_vae(), binary(5).double(), r"expected inputs of torch.float32, the weights' dtype, got torch.float64"),
        (vae_with(likelihood=lambda z: z), binary(5), r"likelihood: expected a distribution, got Tensor"),
    ],
)
def test_errors_of_model_and_guide(vae, x, message):
    for use in (
        lambda: SVI(vae.model, vae.guide, pyro.optim.Adam({}), Trace_ELBO()).step(x),
        lambda: fit(vae.model, vae.guide, x, num_epochs=1),
        lambda: importance_sampling(vae.model, vae.guide, x, num_particles=2),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            use()


def test_a_posterior_that_ignores_x_has_a_row_for_each():
    vae = VAE(
        StandardNormal(2), ConditionalNormal(MLP(2, []), 4, scale=0.1), dist.Normal(torch.ones(2), 1.0).to_event(1)
    )
    x = torch.randn(100, 4)
    assert vae.reconstruct(x).shape == (100, 4)
    similar = vae.similar(x, size=3)
    assert similar.shape == (3, 100, 4)
    assert similar.std(1).min() > 0.1  # draws of their own


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda vae, x: vae.encode(x.numpy()), r"expected tensors of rows, \(N, \*event\), got ndarray"),
        (lambda vae, x: vae.encode(x[0, 0]), "got a single number"),
        (lambda vae, x: vae.generate(x), r"expected an int or None as size, got Tensor\. Try generate\(None, c\)"),
        (lambda vae, x: importance_sampling(vae.model, x), "guide: expected a function, got Tensor"),
        (lambda vae, x: prior_sampling(vae.model, x), "guide: expected a function or None, got Tensor"),
    ],
)
def test_arguments_of_the_wrong_kind(call, message):
    vae = VAE(StandardNormal(2), ConditionalNormal(MLP(2, []), 4, scale=0.1), ConditionalNormal(MLP(4, []), 2))
    with pytest.raises(TypeError, match=message):
        call(vae, torch.randn(5, 4))


def test_a_model_without_data_has_no_evidence():
    vae = VAE(StandardNormal(2), ConditionalNormal(MLP(2, []), 4, scale=0.1), ConditionalNormal(MLP(4, []), 2))
    with pytest.raises(ValueError, match=r"the model observes no site.*look at the order"):
        importance_sampling(vae.guide, vae.guide, torch.randn(5, 4))


def test_a_context_that_is_missing_or_of_another_shape():
    network = MLP(4, [], context_size=2)
    for context, message in (
        ((), r"total width 2, \(N, width\), got none\. Try to pass the context behind x"),
        ((torch.randn(5, 3),), r"got \(5, 3\)\. Try context_size=3"),
        ((torch.randn(5),), r"got \(5,\)\. Try c\.flatten\(1\) for several dimensions, c\.unsqueeze\(-1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            network(torch.randn(5, 4), *context)
