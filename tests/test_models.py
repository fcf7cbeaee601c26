"""Models of the family whose marginal is known: linear Gaussian ones, with contexts, levels, labels and flows."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from torch import nn
from torch.distributions import kl_divergence
from truths import LinearGaussian, small_vae

from pyro_vae import VAE, draw_particles, fit, importance_sampling, latent_usage
from pyro_vae.distributions import (
    ConditionalFlow,
    ConditionalLowRankMultivariateNormal,
    ConditionalMultivariateNormal,
    ConditionalNormal,
    MultivariateNormal,
    StandardNormal,
)
from pyro_vae.networks import MLP


def inverse_positive(scale):
    """The raw parameter that makes this scale."""
    return torch.log(torch.expm1(scale - 1e-5)) - math.log(math.expm1(1 - 1e-5))


@torch.no_grad()
def set_linear(part, weight, bias, tril=None):
    """y = weight · inputs + bias for a conditional Normal without hidden layers, with a triangle or fixed scale."""
    raw = [bias]
    if tril is not None:
        d, scale = len(tril), tril.diagonal()
        raw.append(inverse_positive(scale))
        if isinstance(part, ConditionalMultivariateNormal):
            row, column = torch.tril_indices(d, d, -1)
            raw.append((tril / scale[:, None])[row, column] * math.sqrt(d))
    part.head.weight.zero_()
    part.head.weight[: len(weight)] = weight
    part.head.bias.copy_(torch.cat(raw))


def exact_vae(truth, *, contexts=0, slope=None, widen=1.0):
    """The VAE with this model, x ~ N(W z + slope · c + b, s²), and its exact posterior, or one wider than it."""
    size, k = truth.weight.shape
    vae = VAE(
        StandardNormal(k),
        ConditionalNormal(MLP(k, [], context_size=contexts), size, scale=truth.noise),
        ConditionalMultivariateNormal(MLP(size, [], context_size=contexts), k),
    )
    slope = torch.zeros(size, 0) if slope is None else slope
    covariance = truth.covariance.float()
    gain = covariance @ truth.weight.T / truth.noise**2
    set_linear(vae.likelihood, torch.cat([truth.weight, slope], 1), truth.bias)
    set_linear(
        vae.posterior,
        torch.cat([gain, -gain @ slope], 1),
        -gain @ truth.bias,
        widen * torch.linalg.cholesky(covariance),
    )
    return vae


# -- generated data ---------------------------------------------------------------------------------------------------


def assert_moments(x, mean, covariance):
    """Mean and every covariance of Gaussian rows within five standard errors: √((Σ_ij² + Σ_ii Σ_jj)/n) for these."""
    variance = covariance.diagonal()
    assert ((x.mean(0) - mean).abs() < 5 * (variance / len(x)).sqrt()).all()
    error = ((covariance.square() + variance[:, None] * variance) / len(x)).sqrt()
    assert ((torch.cov(x.T) - covariance).abs() < 5 * error).all()


@pytest.mark.parametrize("mean", [False, True])
def test_new_data_have_every_moment_of_the_model(mean):
    truth = LinearGaussian(2, 4)
    noise = 0.0 if mean else truth.noise**2
    x = exact_vae(truth).generate(50_000, mean=mean)
    assert_moments(x, truth.bias, truth.weight @ truth.weight.T + noise * torch.eye(4))


@pytest.mark.parametrize("mean", [False, True])
def test_similar_data_have_every_moment_of_the_posterior_predictive(mean):
    """x' | x ~ N(W μ(x) + b, W C Wᵀ + s² I), for each of two rows, which alternate among more than are made at once."""
    truth = LinearGaussian(2, 4)
    x, copies, size = truth.sample(2), 5000, 4
    drawn = exact_vae(truth).similar(x.repeat(copies, 1), size=size, mean=mean).unflatten(1, (copies, 2))
    covariance = truth.weight @ truth.covariance.float() @ truth.weight.T
    covariance += 0 if mean else truth.noise**2 * torch.eye(4)
    means = truth.posterior(x).mean @ truth.weight.T + truth.bias
    for row in range(2):
        assert_moments(drawn[:, :, row].flatten(0, 1), means[row], covariance)
    # draws for one row have nothing in common but the row, nor have draws for two rows
    independent = torch.cat([drawn[0], drawn[1]], 1).transpose(0, 1)  # (4, copies, 4)
    correlation = torch.corrcoef(independent.transpose(1, 2).flatten(0, 1)).unflatten(0, (4, 4)).unflatten(2, (4, 4))
    across = correlation.transpose(1, 2)[~torch.eye(4, dtype=torch.bool)]
    assert across.abs().max() < 5 / math.sqrt(copies)


def test_generated_data_follow_their_context():
    truth, slope = LinearGaussian(2, 3), torch.tensor([[1.0, -2.0], [0.5, 0.0], [0.0, 3.0]])
    vae = exact_vae(truth, contexts=2, slope=slope)
    c = torch.randn(30_000, 2)  # more rows than are made at once
    x = vae.generate(None, c)
    assert_moments(x - c @ slope.T, truth.bias, truth.weight @ truth.weight.T + truth.noise**2 * torch.eye(3))


# -- two joints of one coupling ---------------------------------------------------------------------------------------


def coupled(scale_f, scale_g, *, latent, size, hidden=()):
    return VAE(
        StandardNormal(latent),
        ConditionalNormal(MLP(latent, hidden, activation=nn.Tanh), size, scale=scale_g),
        ConditionalNormal(MLP(size, hidden, activation=nn.Tanh), latent, scale=scale_f),
    )


def autoencoder_loss(squared_error, code, size, scale_f, scale_g):
    """E|x − g(z)|²/2σ_g² + |f(x)|²/2 + const, which is −ELBO where both scales are fixed."""
    k = code.shape[-1]
    constant = size / 2 * math.log(2 * math.pi * scale_g**2) + k / 2 * (scale_f**2 - 1 - math.log(scale_f**2))
    return squared_error / (2 * scale_g**2) + code.square().sum(-1) / 2 + constant


def test_each_draw_of_the_elbo_is_the_loss_of_a_regularised_autoencoder():
    """Whatever f and g are: with KL(q‖p) in closed form, both are functions of one and the same draw z."""
    scale_f, scale_g = 0.4, 0.7
    vae = coupled(scale_f, scale_g, latent=2, size=5, hidden=[8])
    x = torch.randn(20, 5)
    pyro.set_rng_seed(1)
    loss = TraceMeanField_ELBO().loss(vae.model, vae.guide, x)
    pyro.set_rng_seed(1)
    z = vae.encode(x).sample()
    squared_error = (x - vae.decode(z).mean).square().sum(-1)
    expected = autoencoder_loss(squared_error, vae.encode(x).mean, 5, scale_f, scale_g)
    assert loss == pytest.approx(expected.sum().item(), rel=1e-5)


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
@pytest.mark.parametrize("decoder", ["linear", "curved"])
def test_the_elbo_is_the_loss_of_a_regularised_autoencoder(decoder, elbo):
    """The mean over z in closed form, |x − g(f(x))|² + σ_f² |W|², where g is linear; by quadrature where it is not."""
    scale_f, scale_g, size = 0.4, 0.7, 5
    latent, hidden = (3, []) if decoder == "linear" else (1, [8])
    vae = coupled(scale_f, scale_g, latent=latent, size=size, hidden=hidden)
    x = torch.randn(1, size)
    code = vae.encode(x).mean
    if decoder == "linear":
        weight = vae.likelihood.head.weight.detach()
        squared_error = (x - vae.decode(code).mean).square().sum(-1) + scale_f**2 * weight.square().sum()
    else:
        eps = torch.linspace(-7, 7, 401).unsqueeze(-1)
        density = dist.Normal(0.0, 1.0).log_prob(eps[:, 0]).exp() * 14 / 400
        squared_error = (density * (x - vae.decode(code + scale_f * eps).mean).square().sum(-1)).sum()[None]
    exact = autoencoder_loss(squared_error, code, size, scale_f, scale_g).item()
    loss = elbo(num_particles=500, vectorize_particles=True, max_plate_nesting=1)
    losses = torch.tensor([loss.loss(vae.model, vae.guide, x) for _ in range(40)])
    error = losses.std().item() / math.sqrt(len(losses))
    assert error < 0.02  # nats, of some ten
    assert abs(losses.mean().item() - exact) < 5 * error


def test_the_divergence_of_the_joints_is_the_loss_less_the_entropy_of_the_data():
    """KL(n_f‖n_g) of two Normals of (x, z). Where the scales are those of the exact posterior it is zero."""
    weight, bias, scale_g = torch.tensor([[1.1, 0.0], [0.0, 0.6], [0.0, -0.8]]), torch.tensor([0.5, -1.0, 0.0]), 0.6
    data = dist.MultivariateNormal(bias, weight @ weight.T + scale_g**2 * torch.eye(3))
    for scale_f, tilt, zero in ((0.7, 0.3, False), (None, 0.0, True)):
        q = torch.linalg.inv(weight.T @ weight / scale_g**2 + torch.eye(2))
        gain = q @ weight.T / scale_g**2 + tilt
        scale_f = q.diagonal().sqrt() if scale_f is None else torch.full((2,), scale_f)
        vae = coupled(scale_f, scale_g, latent=2, size=3)
        set_linear(vae.likelihood, weight, bias)
        set_linear(vae.posterior, gain, -gain @ bias)
        v = data.covariance_matrix
        joint_f = torch.cat([torch.cat([v, v @ gain.T], 1), torch.cat([gain @ v, gain @ v @ gain.T], 1)])
        joint_f[3:, 3:] += torch.diag(scale_f**2)
        joint_g = torch.cat([torch.cat([v, weight], 1), torch.cat([weight.T, torch.eye(2)], 1)])
        mean = torch.cat([bias, torch.zeros(2)])
        n_f, n_g = (dist.MultivariateNormal(mean, joint) for joint in (joint_f, joint_g))
        exact = kl_divergence(n_f, n_g).item()
        x = data.sample((20_000,))
        # log p(x, z) − log q(z|x) and log p_data(x) of the same rows: their difference has mean KL(n_f‖n_g)
        with torch.no_grad():
            log_weight = draw_particles(vae.model, vae.guide, x, num_particles=1).log_weight[0]
        difference = data.log_prob(x) - log_weight
        error = difference.std().item() / math.sqrt(len(x))
        assert abs(difference.mean().item() - exact) < 5 * error + 1e-5
        assert (abs(exact) < 1e-5) == zero
        assert (error < 1e-6) == zero  # equal joints: not only in the mean


# -- contexts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("widen", [1.0, 1.3])
def test_evidence_given_a_context(widen):
    """log p(x|c) = log N(x; A c + b, W Wᵀ + s² I), for the context that is given and for a wrong one alike."""
    truth, slope = LinearGaussian(2, 4), torch.randn(4, 3)
    vae = exact_vae(truth, contexts=3, slope=slope, widen=widen)
    c = torch.randn(30, 3)
    x = truth.sample(30) + c @ slope.T
    for context in (c, c.flip(0)):
        exact = truth.log_evidence(x - context @ slope.T)
        found = importance_sampling(vae.model, vae.guide, x, context, num_particles=2000)
        if widen == 1:
            torch.testing.assert_close(found.log_evidence, exact, atol=1e-4, rtol=1e-5)
            assert found.standard_error.max() < 1e-5
        else:
            z = (found.log_evidence - exact) / found.standard_error
            assert z.abs().max() < 5
            assert z.square().mean() > 0.2  # error bars that are not far too large
    wrong = importance_sampling(vae.model, vae.guide, x, c.flip(0), num_particles=100).log_evidence
    assert wrong.mean() < truth.log_evidence(x - c @ slope.T).mean() - 1


# -- two levels -------------------------------------------------------------------------------------------------------


class TwoLevels:
    """z2 ~ N(0, I), z1|z2 ~ N(A z2, s₁² I), x|z1 ~ N(B z1, s² I), and q(z1|x) q(z2|z1)."""

    upper, lower = torch.tensor([[1.0, 0.5], [-0.5, 1.5], [0.3, 0.0]]), LinearGaussian(3, 4).weight
    middle_noise, noise = 0.6, 0.5

    def __init__(self, *, widen=1.0, shift=0.0):
        a, b = self.upper, self.lower
        self.middle = a @ a.T + self.middle_noise**2 * torch.eye(3)  # the covariance of z1
        self.marginal = dist.MultivariateNormal(torch.zeros(4), b @ self.middle @ b.T + self.noise**2 * torch.eye(4))
        covariance = torch.linalg.inv(torch.linalg.inv(self.middle) + b.T @ b / self.noise**2)
        self.gain, self.tril = covariance @ b.T / self.noise**2, widen * torch.linalg.cholesky(covariance)
        covariance = torch.linalg.inv(torch.eye(2) + a.T @ a / self.middle_noise**2)
        self.top_gain = covariance @ a.T / self.middle_noise**2
        self.top_tril, self.shift = widen * torch.linalg.cholesky(covariance), shift

    def model(self, x):
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            z1 = pyro.sample("z1", dist.Normal(z2 @ self.upper.T, self.middle_noise).to_event(1))
            pyro.sample("x", dist.Normal(z1 @ self.lower.T, self.noise).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            loc = x @ self.gain.T + self.shift * self.tril.diagonal()
            z1 = pyro.sample("z1", dist.MultivariateNormal(loc, scale_tril=self.tril))
            loc = z1 @ self.top_gain.T + self.shift * self.top_tril.diagonal()
            pyro.sample("z2", dist.MultivariateNormal(loc, scale_tril=self.top_tril))


def test_the_exact_guide_of_two_levels_has_equal_weights():
    pair = TwoLevels()
    x = pair.marginal.sample((40,))
    exact = pair.marginal.log_prob(x)
    particles = draw_particles(pair.model, pair.guide, x, num_particles=10)
    torch.testing.assert_close(particles.log_weight, exact.expand(10, 40), atol=1e-4, rtol=1e-4)
    found = importance_sampling(pair.model, pair.guide, x, num_particles=100)
    torch.testing.assert_close(found.log_evidence.float(), exact, atol=1e-4, rtol=1e-4)
    assert found.standard_error.max() < 1e-5
    elbo = -Trace_ELBO().loss(pair.model, pair.guide, x)
    assert elbo == pytest.approx(exact.sum().item(), rel=1e-5)


def test_a_guide_beside_the_posterior_of_two_levels():
    pair = TwoLevels(widen=1.2, shift=0.3)
    x = pair.marginal.sample((100,))
    found = importance_sampling(pair.model, pair.guide, x, num_particles=2000)
    z = (found.log_evidence - pair.marginal.log_prob(x)) / found.standard_error
    assert z.abs().max() < 5
    assert 0.5 < z.square().mean() < 1.7  # 1 ± 5 √(2/100)


# -- labels -----------------------------------------------------------------------------------------------------------


class Labelled:
    """y ~ Categorical(π), z ~ N(0, I), x|y, z ~ N(W_y z + b_y, s² I); y is known in some rows.

    The guide takes q(y|x) = softmax(sharp · log p(y|x)) where it is missing and q(z|x, y) with a triangle that is
    `widen` times that of the posterior: with both at one it is exact.
    """

    def __init__(self, *, sharp=1.0, widen=1.0):
        generator = torch.Generator().manual_seed(2)
        self.shares, self.noise = torch.tensor([0.2, 0.3, 0.5]), 0.7
        self.weight = torch.randn(3, 4, 2, generator=generator)
        self.bias = 1.2 * torch.randn(3, 4, generator=generator)
        self.marginal = dist.MultivariateNormal(
            self.bias, self.weight @ self.weight.mT + self.noise**2 * torch.eye(4)
        )  # of x in each class
        self.covariance = torch.linalg.inv(torch.eye(2) + self.weight.mT @ self.weight / self.noise**2)
        self.sharp, self.widen = sharp, widen

    def log_joint(self, x):
        """log p(x, y) for each y, (N, 3)."""
        return self.shares.log() + self.marginal.log_prob(x.unsqueeze(-2))

    def classifier(self, x):
        return (self.sharp * self.log_joint(x)).softmax(-1)

    def posterior(self, x, y, widen):
        residual = (x - self.bias[y]).unsqueeze(-1)
        loc = self.covariance[y] @ self.weight[y].mT @ residual / self.noise**2
        tril = widen * torch.linalg.cholesky(self.covariance)[y]
        return MultivariateNormal(loc.squeeze(-1), tril)

    def likelihood(self, z, y):
        return dist.Normal((self.weight[y] @ z.unsqueeze(-1)).squeeze(-1) + self.bias[y], self.noise).to_event(1)

    def model(self, x, y, known):
        with pyro.plate("data", len(x)):
            label = pyro.sample("y", dist.Categorical(self.shares))
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", self.likelihood(z, label), obs=x)

    def guide(self, x, y, known):
        with pyro.plate("data", len(x)):
            given = nn.functional.one_hot(y, 3).to(x.dtype)
            probabilities = torch.where(known.unsqueeze(-1), given, self.classifier(x))
            label = pyro.sample("y", dist.Categorical(probabilities), infer={"enumerate": "parallel"})
            pyro.sample("z", self.posterior(x, label, self.widen))

    def data(self, rows):
        y = dist.Categorical(self.shares).sample((rows,))
        known = torch.arange(rows) % 3 == 0
        x = self.marginal.sample((rows,))[torch.arange(rows), y]
        return x, torch.where(known, y, 0), known  # where a label is not known, 0 says nothing

    def log_evidence(self, x, y, known):
        joint = self.log_joint(x)
        return torch.where(known, joint.gather(-1, y.unsqueeze(-1)).squeeze(-1), joint.logsumexp(-1))


def test_the_elbo_of_partly_labelled_data_lies_below_by_the_divergence():
    """log p − ELBO = KL(q(y|x)‖p(y|x)) + Σ q(y|x) KL(q(z|x, y)‖p(z|x, y)); zero where the guide is exact."""
    exact_pair, other = Labelled(), Labelled(sharp=0.5, widen=1.2)
    data = exact_pair.data(60)
    x, _, known = data
    exact = exact_pair.log_evidence(*data).sum().item()
    loss = TraceEnum_ELBO(max_plate_nesting=1)
    assert -loss.loss(exact_pair.model, exact_pair.guide, *data) == pytest.approx(exact, rel=1e-5)
    q_y, p_y = other.classifier(x), exact_pair.classifier(x)
    gap = torch.where(known, 0.0, (q_y * (q_y.log() - p_y.log())).sum(-1)).sum().item()
    gap += len(x) * (1.2**2 - 1 - 2 * math.log(1.2))  # KL of a triangle 1.2 times as wide, in two dimensions
    elbos = torch.tensor([-loss.loss(other.model, other.guide, *data) for _ in range(100)])
    error = elbos.std().item() / 10
    assert error < 0.2 * gap
    assert abs(exact - gap - elbos.mean().item()) < 5 * error


@pytest.mark.parametrize("enumerate_label", [None, "parallel"])
def test_evidence_where_labels_are_given_in_some_rows(enumerate_label):
    """log p(x, y) where the label is known; where it is not, log p(x) of a mixture of three Gaussians.

    In Pyro's own way, `obs_mask`: what is missing is a site "y_unobserved", masked in the rows where nothing is.
    """
    data = Labelled().data(60)
    exact = Labelled().log_evidence(*data)
    for pair in (Labelled(), Labelled(sharp=0.5, widen=1.2)):

        def model(x, y, known, pair=pair):
            with pyro.plate("data", len(x)):
                label = pyro.sample("y", dist.Categorical(pair.shares), obs=y, obs_mask=known)
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("x", pair.likelihood(z, label), obs=x)

        def guide(x, y, known, pair=pair):
            with pyro.plate("data", len(x)):
                with poutine.mask(mask=~known):
                    proposal = dist.Categorical(pair.classifier(x))
                    drawn = pyro.sample("y_unobserved", proposal, infer={"enumerate": enumerate_label})
                pyro.sample("z", pair.posterior(x, torch.where(known, y, drawn), pair.widen))

        found = importance_sampling(model, guide, *data, num_particles=2000)
        if pair.widen == 1:
            torch.testing.assert_close(found.log_evidence.float(), exact, atol=1e-4, rtol=1e-4)
            assert found.standard_error.max() < 1e-5
        else:
            z = (found.log_evidence - exact) / found.standard_error
            assert z.abs().max() < 5
            assert z.square().mean() > 0.3  # error bars that are not far too large


# -- what latent dimensions are used for ------------------------------------------------------------------------------


def three_dimensions():
    """W with orthogonal columns, the last of them zero: the posterior is diagonal, and one dimension says nothing."""
    truth = LinearGaussian(3, 5)
    truth.weight = torch.linalg.qr(truth.weight).Q * torch.tensor([2.0, 0.5, 0.0])
    covariance = 1 / (1 + truth.weight.square().sum(0) / truth.noise**2)
    truth.covariance = torch.diag(covariance).double()
    return truth, covariance


def test_usage_of_a_diagonal_posterior_in_closed_form():
    """KL_d = ½ E(c + m² − 1 − log c) over rows and A_d = Var(m), with m and c the posterior's mean and variance."""
    truth, covariance = three_dimensions()
    x = truth.sample(500)
    m = truth.posterior(x).mean
    for vae in (exact_vae(truth), coupled(covariance.sqrt(), truth.noise, latent=3, size=5)):
        if isinstance(vae.posterior, ConditionalNormal):
            gain = covariance[:, None] * truth.weight.T / truth.noise**2
            set_linear(vae.likelihood, truth.weight, truth.bias)
            set_linear(vae.posterior, gain, -gain @ truth.bias)
        usage = latent_usage(vae.model, vae.guide, x)
        kl = 0.5 * (covariance + m.square() - 1 - covariance.log()).mean(0)
        torch.testing.assert_close(usage.kl, kl, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(usage.variance_of_means, m.var(0), rtol=1e-4, atol=1e-5)
        assert usage.active.tolist() == [True, True, False]
        assert usage.kl[2].abs() < 1e-5
        assert "collapsed [2]" in repr(usage)
        # over many rows, m has the variance 1 − c of p(z) that the posterior explains: 500 rows, 5 standard errors
        assert ((m.var(0) - (1 - covariance)).abs() <= 5 * math.sqrt(2 / 499) * (1 - covariance) + 1e-6).all()
        threshold = (usage.variance_of_means[0] + usage.variance_of_means[1]).item() / 2
        assert latent_usage(vae.model, vae.guide, x, threshold=threshold).active.tolist() == [True, False, False]


def test_usage_of_a_correlated_posterior_is_that_of_its_marginals():
    truth = LinearGaussian(2, 3)
    x = truth.sample(200)
    vae = exact_vae(truth)
    usage = latent_usage(vae.model, vae.guide, x)
    m, c = truth.posterior(x).mean, truth.covariance.float().diagonal()
    torch.testing.assert_close(usage.kl, 0.5 * (c + m.square() - 1 - c.log()).mean(0), rtol=1e-4, atol=1e-5)
    whole = kl_divergence(truth.posterior(x), dist.MultivariateNormal(torch.zeros(2), torch.eye(2))).mean()
    assert usage.kl.sum() < whole - 0.01  # what the correlation costs is no dimension's


def test_usage_of_a_flow_is_estimated_from_draws():
    """A flow whose maps are affine is Gaussian, but does not say so: no KL, and means from draws, less their noise."""
    truth, covariance = three_dimensions()
    x = truth.sample(400)
    gain = covariance[:, None] * truth.weight.T / truth.noise**2
    base = ConditionalNormal(MLP(5, []), 3, scale=2 * covariance.sqrt())
    shift = torch.tensor([0.5, -1.0, 2.0])
    affine = dist.transforms.AffineTransform(shift, 0.5, event_dim=1)
    set_linear(base, 2 * gain, -2 * (gain @ truth.bias + shift))
    vae = exact_vae(truth)
    vae.posterior = ConditionalFlow(base, [affine])
    found = importance_sampling(vae.model, vae.guide, x, num_particles=20)
    torch.testing.assert_close(found.log_evidence.float(), truth.log_evidence(x).float(), atol=1e-3, rtol=1e-4)
    m = truth.posterior(x).mean
    for num_particles in (4, 100):
        usage = latent_usage(vae.model, vae.guide, x, num_particles=num_particles)
        assert usage.kl.isnan().all()
        # of the variance of m + e over rows, e ~ N(0, c/K): twice the covariance with e, and the spread of e² itself
        noise = covariance / num_particles
        error = (4 * m.var(0) * noise / 400 + 2 * noise.square() / 400).sqrt()
        assert ((usage.variance_of_means - m.var(0)).abs() < 5 * error + 1e-6).all()
    assert usage.active.tolist() == [True, True, False]


def test_usage_of_a_latent_number():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, math.sqrt(0.5)))

    x = torch.randn(50)
    usage = latent_usage(model, guide, x)
    expected = 0.5 * (0.5 + (x / 2).square() - 1 - math.log(0.5)).mean()
    torch.testing.assert_close(usage.kl, expected.reshape(1))
    torch.testing.assert_close(usage.variance_of_means, (x / 2).var().reshape(1))


# -- low rank ---------------------------------------------------------------------------------------------------------


def low_rank_and_full(d=4, rank=2):
    """Two posteriors with the same mean and covariance for every x, one as factor and diagonal, one as triangle."""
    low, full = (
        ConditionalLowRankMultivariateNormal(MLP(3, []), d, rank=rank),
        ConditionalMultivariateNormal(MLP(3, []), d),
    )
    gain, bias, scale, factor = torch.randn(d, 3), torch.randn(d), torch.rand(d) + 0.3, 0.7 * torch.randn(d, rank)
    set_linear(full, gain, bias, torch.linalg.cholesky(factor @ factor.T + torch.diag(scale**2)))
    with torch.no_grad():
        low.head.weight[:d] = gain
        low.head.bias.copy_(torch.cat([bias, inverse_positive(scale), factor.flatten()]))
    return low, full


def test_divergences_of_low_rank_and_full_gaussians_in_both_directions():
    low, full = low_rank_and_full()
    x, y = torch.randn(2, 5, 3)
    a, b, c = low(x), full(x), full(y)
    torch.testing.assert_close(a.covariance_matrix, b.covariance_matrix)
    plain_b, plain_c = (dist.MultivariateNormal(q.loc, q.covariance_matrix) for q in (b, c))
    exact = kl_divergence(plain_b, plain_c)
    assert exact.min() > 0.1
    for p, q in ((a, c), (b, low(y)), (a, low(y)), (a, plain_c), (plain_b, low(y)), (b, c)):
        torch.testing.assert_close(kl_divergence(p, q), exact, rtol=1e-3, atol=1e-4)
    for p in (a, b):
        assert kl_divergence(p, {a: b, b: a}[p]).abs().max() < 1e-4


def test_the_elbo_of_a_low_rank_posterior_is_that_of_the_full_one():
    """Where x does not depend on z, TraceMeanField_ELBO has no noise: log p(x) − KL(q‖p), the same for both."""
    low, full = low_rank_and_full()
    x = torch.randn(6, 3)
    likelihood = ConditionalNormal(MLP(4, []), 3, scale=0.8)
    set_linear(likelihood, torch.zeros(3, 4), torch.ones(3))
    covariance, m = full(x).covariance_matrix, full(x).mean
    kl = 0.5 * (covariance.diagonal(dim1=-2, dim2=-1).sum(-1) + m.square().sum(-1) - 4 - covariance.logdet())
    exact = (dist.Normal(1.0, 0.8).log_prob(x).sum(-1) - kl).sum().item()
    for q in (low, full):
        vae = VAE(StandardNormal(4), likelihood, q)
        assert -TraceMeanField_ELBO().loss(vae.model, vae.guide, x) == pytest.approx(exact, rel=1e-5)
        c = covariance.diagonal(dim1=-2, dim2=-1)
        usage = latent_usage(vae.model, vae.guide, x)
        torch.testing.assert_close(usage.kl, 0.5 * (c + m.square() - 1 - c.log()).mean(0), rtol=1e-4, atol=1e-5)
    # where x does depend on it, so do both: E log p(x|z) = log N(x; W m + b, s²) − tr(W Σ Wᵀ)/2s²
    weight = torch.randn(3, 4)
    set_linear(likelihood, weight, torch.ones(3))
    spread = torch.einsum("ij,njk,ik->n", weight, covariance, weight) / (2 * 0.8**2)
    exact = (dist.Normal(m @ weight.T + 1, 0.8).log_prob(x).sum(-1) - spread - kl).sum().item()
    for q in (low, full):
        vae = VAE(StandardNormal(4), likelihood, q)
        loss = TraceMeanField_ELBO(num_particles=100, vectorize_particles=True, max_plate_nesting=1)
        elbos = torch.tensor([-loss.loss(vae.model, vae.guide, x) for _ in range(40)])
        error = elbos.std().item() / math.sqrt(40)
        assert abs(elbos.mean().item() - exact) < 5 * error
        assert error < 0.02 * abs(exact)


# -- an interrupted fit -----------------------------------------------------------------------------------------------


def test_a_fit_of_recorded_steps_goes_on_where_it_was_interrupted(tmp_path, monkeypatch):
    """Of 300 steps, which "auto" records: interrupted in one process, taken up by the same call in another."""
    monkeypatch.setattr("pyro_vae.training.resume.SECONDS_BETWEEN", 0.0)
    x = torch.bernoulli(torch.full((60, 4, 4), 0.4))

    def run(path, stop=None):
        pyro.clear_param_store()
        torch.manual_seed(0)
        vae = small_vae()

        def decay(epoch):
            if epoch == stop:
                raise KeyboardInterrupt
            return 0.99**epoch

        options = {"num_epochs": 100, "batch_size": 20, "compile": "auto", "seed": 3, "progress": False}
        schedule = lambda optim: torch.optim.lr_scheduler.LambdaLR(optim, decay)  # noqa: E731
        result = fit(vae.model, vae.guide, x, scheduler=schedule, checkpoint=path, **options)
        return result, vae.state_dict()

    whole, weights = run(None)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "fit.pt", stop=50)
    result, resumed = run(tmp_path / "fit.pt")
    assert result.loss == pytest.approx(whole.loss, rel=1e-6)  # sums are rounded otherwise until steps are recorded
    assert result.num_steps == whole.num_steps == 300
    for name, value in weights.items():
        torch.testing.assert_close(value, resumed[name])
    again, _ = run(tmp_path / "fit.pt")  # a finished one has nothing to do
    assert again.loss == result.loss
