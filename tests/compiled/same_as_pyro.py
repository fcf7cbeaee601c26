"""Comparing compiled losses and gradients with those of Pyro."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_vae import CompiledELBO

X = torch.bernoulli(torch.full((6, 4, 4), 0.4), generator=torch.Generator().manual_seed(0))


def vae_pair(make):
    vae = make()
    return vae.model, vae.guide


def gradients(elbo, model, guide, *args):
    """Loss and gradients of all parameters under one seed."""
    torch.manual_seed(7)
    with poutine.trace(param_only=True) as seen:
        loss = elbo.loss_and_grads(model, guide, *args)
    params = {name: site["value"].unconstrained() for name, site in seen.trace.nodes.items()}
    found = {name: p.grad.clone() for name, p in params.items() if p.grad is not None}
    for p in params.values():
        p.grad = None
    return loss, found


def assert_same(elbo, model, guide, *args, backend="eager", calls=4, rtol=1e-6, atol=1e-6):
    compiled = CompiledELBO(elbo, backend=backend)
    gradients(elbo, model, guide, *args)
    expected = gradients(elbo, model, guide, *args)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="CompiledELBO|no working")
        for _ in range(calls):
            loss, found = gradients(compiled, model, guide, *args)
            assert loss == pytest.approx(expected[0], rel=rtol)
            assert found.keys() == expected[1].keys()
            for name in found:
                torch.testing.assert_close(found[name], expected[1][name], rtol=1e-5, atol=atol)
    assert len(compiled.plans) == 1
    assert not compiled.reasons
    return compiled


def asserting(x):
    """A model with assertions. It stands here, as pytest rewrites those in files of tests."""
    assert (x.abs() < 100).all()
    assert not x.isnan().any(), "no"
    assert x.max() > 0 and x.min() < 0  # noqa: PT018
    loc = pyro.sample("loc", dist.Normal(torch.zeros(x.shape[-1]), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)
