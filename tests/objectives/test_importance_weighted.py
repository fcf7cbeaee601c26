"""The importance-weighted bound: equal to Pyro's ELBO at K = 1, below log p(x) always, gradients without bias."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, RenyiELBO, Trace_ELBO
from truths import LinearGaussian, linear_vae, linear_vae_log_evidence, small_vae

from pyro_vae import ImportanceWeightedELBO, fit


def gradients(elbo, vae, x, seed=1):
    vae.zero_grad()
    pyro.set_rng_seed(seed)
    loss = elbo.differentiable_loss(vae.model, vae.guide, x)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in vae.parameters()])


@pytest.mark.parametrize("full", [False, True])
def test_one_particle_is_trace_elbo(full, device):
    vae = small_vae(full=full).to(device)
    x = torch.bernoulli(torch.full((6, 4, 4), 0.5, device=device))
    pyro_loss, pyro_gradient = gradients(Trace_ELBO(), vae, x)
    loss, gradient = gradients(ImportanceWeightedELBO(1), vae, x)
    assert loss == pytest.approx(pyro_loss, rel=1e-6)
    torch.testing.assert_close(gradient, pyro_gradient, rtol=1e-4, atol=1e-5)
    pyro.set_rng_seed(1)
    assert ImportanceWeightedELBO(1).loss(vae.model, vae.guide, x) == pytest.approx(pyro_loss, rel=1e-6)
    vae.zero_grad()
    pyro.set_rng_seed(1)
    assert ImportanceWeightedELBO(1).loss_and_grads(vae.model, vae.guide, x) == pytest.approx(pyro_loss, rel=1e-6)
    torch.testing.assert_close(torch.cat([p.grad.flatten() for p in vae.parameters()]), gradient)


def test_without_subsampling_it_is_the_renyi_bound():
    vae = small_vae()
    x = torch.bernoulli(torch.full((6, 4, 4), 0.5))
    renyi = RenyiELBO(alpha=0, num_particles=7, vectorize_particles=True, max_plate_nesting=1)
    pyro.set_rng_seed(1)
    expected = renyi.loss(vae.model, vae.guide, x)
    pyro.set_rng_seed(1)
    assert ImportanceWeightedELBO(7).loss(vae.model, vae.guide, x) == pytest.approx(expected, rel=1e-5)


def subsampled(truth, size):
    def model(x):
        with pyro.plate("data", size, subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(truth.weight[0]), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ truth.weight.T + truth.bias, truth.noise).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", size, subsample_size=len(x)):
            pyro.sample("z", truth.posterior(x, 1.7))

    return model, guide


def test_with_subsampling_it_never_exceeds_the_exact_value():
    """800 points, of which a batch has 8: Pyro's bound is above the truth, this one below and near."""
    truth = LinearGaussian(2, 4)
    x = truth.sample(8)
    model, guide = subsampled(truth, 800)
    exact = 100 * truth.log_evidence(x).sum().item()
    bounds = torch.tensor([-ImportanceWeightedELBO(50).loss(model, guide, x) for _ in range(60)])
    assert bounds.mean().item() < exact + 3 * bounds.std().item() / math.sqrt(60)
    assert bounds.mean().item() > exact - 0.05 * abs(exact)
    elbo = torch.tensor([-Trace_ELBO().loss(model, guide, x) for _ in range(60)])
    assert elbo.mean() < bounds.mean()
    for double in (False, True):
        loss = ImportanceWeightedELBO(50, doubly_reparameterized=double)
        values = []
        for evaluate in (loss.loss, loss.differentiable_loss, loss.loss_and_grads):
            pyro.set_rng_seed(2)
            values.append(torch.as_tensor(evaluate(model, guide, x)).item())
        assert values == pytest.approx([values[0]] * 3, rel=1e-6)
    renyi = RenyiELBO(alpha=0, num_particles=50, vectorize_particles=True, max_plate_nesting=1)
    assert -renyi.loss(model, guide, x) > exact  # why this exists


def test_the_bound_rises_with_k():
    vae, x = small_vae(), torch.bernoulli(torch.full((50, 4, 4), 0.5))
    means = [sum(-ImportanceWeightedELBO(k).loss(vae.model, vae.guide, x) for _ in range(15)) for k in (1, 5, 50)]
    assert means[0] < means[1] < means[2]


def mean_gradient(elbo, vae, x, n=100):
    samples = torch.stack([gradients(elbo, vae, x, seed)[1] for seed in range(n)])
    return samples.mean(0), samples.std(0) / math.sqrt(n), samples.std(0)


def test_doubly_reparameterized_gradients_have_the_same_mean_and_less_noise():
    vae, x = small_vae(), torch.bernoulli(torch.full((4, 4, 4), 0.5))
    plain, plain_error, plain_std = mean_gradient(ImportanceWeightedELBO(6), vae, x)
    double, double_error, double_std = mean_gradient(ImportanceWeightedELBO(6, doubly_reparameterized=True), vae, x)
    z = (plain - double) / (plain_error.square() + double_error.square()).sqrt().clamp(min=1e-9)
    assert z.abs().max() < 5
    assert 0.5 < z.std() < 1.5
    guide = torch.cat([torch.full((p.numel(),), n.startswith("posterior")) for n, p in vae.named_parameters()])
    assert (double_std / plain_std.clamp(min=1e-9))[guide].median() < 0.7
    assert gradients(ImportanceWeightedELBO(6, doubly_reparameterized=True), vae, x)[0] == pytest.approx(
        gradients(ImportanceWeightedELBO(6), vae, x)[0], rel=1e-5
    )


def test_doubly_reparameterized_gradients_are_those_of_the_formula():
    """Tucker et al. (2019), equation 8: Σ_k w̃_k² ∂ log w_k/∂z_k ∂z_k/∂φ, at the draws that were made."""
    x = torch.linspace(-2.0, 2.0, 5)
    loc, scale = (0.3 * x).requires_grad_(), torch.full((5,), 1.3).requires_grad_()
    seen = []

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            seen.append(pyro.sample("z", dist.Normal(loc, scale)))

    ImportanceWeightedELBO(6, doubly_reparameterized=True).differentiable_loss(model, guide, x).backward()
    with torch.no_grad():
        z = seen[-1]
        noise = (z - loc) / scale
        weight = (
            dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z, 1.0).log_prob(x) - dist.Normal(loc, scale).log_prob(z)
        )
        term = weight.softmax(0).square() * (x - 2 * z + noise / scale)
    assert z.shape == (6, 5)
    torch.testing.assert_close(loc.grad, -term.sum(0))
    torch.testing.assert_close(scale.grad, -(term * noise).sum(0))


def test_dropout_and_batch_norm_run_once_a_step():
    """What scores a draw is what drew it: the same dropout masks, and one update of the running statistics."""
    x = torch.bernoulli(torch.full((20, 4, 4), 0.5))
    values, counts = [], []
    for double in (False, True):
        torch.manual_seed(0)
        vae = small_vae(full=False, name=f"dropout_{double}")
        norm = torch.nn.BatchNorm1d(16)
        vae.posterior.network = torch.nn.Sequential(vae.posterior.network, norm, torch.nn.Dropout(0.5))
        elbo = ImportanceWeightedELBO(4, doubly_reparameterized=double)
        for _ in range(3):
            pyro.set_rng_seed(1)
            values.append(elbo.differentiable_loss(vae.model, vae.guide, x).item())
        counts.append(int(norm.num_batches_tracked))
    assert values == pytest.approx([values[0]] * 6, rel=1e-5)
    assert counts == [3, 3]


def test_doubly_reparameterized_gradients_through_two_levels():
    """z2 | z1 in the guide: the gradient of z1 goes through the draw of z2, too."""
    a, b = torch.tensor(0.3, requires_grad=True), torch.tensor(0.6, requires_grad=True)
    x = torch.tensor([0.5, -1.0, 2.0]).repeat(50)  # rows are draws too, and cost less than runs

    def model(x):
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(0.0, 1.0))
            z2 = pyro.sample("z2", dist.Normal(z1, 1.0))
            pyro.sample("x", dist.Normal(z2, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(a * x, 0.9))
            pyro.sample("z2", dist.Normal(b * (x + z1), 0.8))

    means = []
    for double in (False, True):
        elbo = ImportanceWeightedELBO(3, doubly_reparameterized=double)
        samples = []
        for _ in range(60):
            grads = torch.autograd.grad(elbo.differentiable_loss(model, guide, x), [a, b])
            samples.append(torch.stack(grads))
        samples = torch.stack(samples)
        means.append((samples.mean(0), samples.std(0) / math.sqrt(len(samples))))
    (m1, e1), (m2, e2) = means
    assert ((m1 - m2).abs() < 5 * (e1.square() + e2.square()).sqrt()).all()


def test_score_function_gradients_of_discrete_latents():
    """Against the exact gradient of E log mean w over the four pairs of draws, K = 2; all rows are the same."""
    logit, rows, runs = torch.tensor(0.4, requires_grad=True), 20, 200
    x = torch.full((rows,), 0.7)

    def model(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(2 * y, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=logit.expand(len(x))))

    q = dist.Bernoulli(logits=logit)
    values = torch.tensor([0.0, 1.0])
    log_weight = dist.Bernoulli(0.3).log_prob(values) + dist.Normal(2 * values, 1.0).log_prob(x[0]) - q.log_prob(values)
    pairs = (log_weight[:, None].exp() + log_weight[None].exp()).log() - math.log(2)
    probability = q.log_prob(values).exp()
    exact = torch.autograd.grad(-(probability[:, None] * probability[None] * pairs).sum(), logit)[0].item()
    samples = []
    for _ in range(runs):
        loss = ImportanceWeightedELBO(2).differentiable_loss(model, guide, x)
        samples.append(torch.autograd.grad(loss, logit)[0] / rows)
    samples = torch.stack(samples)
    error = samples.std().item() / math.sqrt(runs)
    assert abs(samples.mean().item() - exact) < 5 * error
    with pytest.raises(ValueError, match="site 'y': Bernoulli cannot be reparameterized"):
        ImportanceWeightedELBO(2, doubly_reparameterized=True).differentiable_loss(model, guide, x)


@pytest.mark.parametrize("double", [False, True])
def test_in_fit_and_in_svi(double):
    """A linear VAE whose diagonal posterior cannot be exact: K = 20 comes nearer to the maximum likelihood."""
    torch.manual_seed(0)
    x = LinearGaussian(2, 5).sample(300)
    vae = linear_vae(2, 5, full=False, name=f"vae_{double}")
    loss = ImportanceWeightedELBO(10, doubly_reparameterized=double)
    result = fit(vae.model, vae.guide, x, num_epochs=60, learning_rate=0.02, loss=loss, seed=0)
    exact = linear_vae_log_evidence(vae, x).mean().item()
    assert -exact - 0.1 < result.loss[-1] < -exact + 0.15
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), loss)
    before = vae.likelihood.head.weight.detach().clone()
    value = svi.step(x)
    assert value / 300 == pytest.approx(result.loss[-1], abs=0.3)
    assert not vae.likelihood.head.weight.equal(before)


def test_errors():
    def outside(x):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(m, 1.0), obs=x)

    def outside_guide(x):
        pyro.sample("m", dist.Normal(0.0, 1.0))

    def scaled(x):
        with pyro.plate("data", len(x)):
            with poutine.scale(scale=0.5):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    elbo, x = ImportanceWeightedELBO(2), torch.zeros(3)
    with pytest.raises(ValueError, match=r"site 'm' of the guide is outside plate 'data' \(its plates: none\)"):
        elbo.loss(outside, outside_guide, x)
    with pytest.raises(ValueError, match=r"site 'z' of the model is scaled by 0.5, site 'x' of the model by 1.0.*Try"):
        elbo.loss(scaled, guide, x)
    with pytest.raises(ValueError, match=r"site 'm' of the model is outside plate 'data'"):
        elbo.loss(outside, lambda x: None, x)
    with pytest.raises(ValueError, match=r"different latent sites: \['z'\] only in the model"):
        elbo.loss(scaled, lambda x: None, x)
    with pytest.raises(ValueError, match="num_particles: expected at least 1, got 0"):
        ImportanceWeightedELBO(0)
