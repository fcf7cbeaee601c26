"""Two levels of latents, and partly labelled data, against exact log p(x)."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from torch import nn
from truths import LinearGaussian

from pyro_vae import draw_particles, importance_sampling
from pyro_vae.distributions import (
    MultivariateNormal,
)

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
