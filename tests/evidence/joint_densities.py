"""Joint densities of globals and locals whose posterior is known, and weights of draws from an `Arrow`."""

import math

import numpy as np
import torch
from torch.distributions import Binomial, HalfCauchy, Normal, Poisson

from pyro_vae.evidence.log_weights import LogWeightSummary

F64 = {"dtype": torch.float64}


class Density:
    """A `JointDensity` by autograd, whose guide is N(0, spread²)."""

    dtype, global_dim, dim, spread = torch.float64, 2, 1, 1.0

    def draw(self, count):
        g = torch.randn(count, self.global_dim, dtype=self.dtype)
        u = torch.randn(count, self.num_points, self.dim, dtype=self.dtype)
        return self.spread * g, self.spread * u

    def gradient(self, g, u):
        g, u = g.detach().requires_grad_(), u.detach().requires_grad_()
        prior, conditional = self.log_joint(g, u)
        found = torch.autograd.grad(prior.sum() + conditional.sum(), (g, u), allow_unused=True)
        return tuple(torch.zeros_like(v) if x is None else x for x, v in zip(found, (g, u), strict=True))


class HierarchicalGaussian(Density):
    """g ~ N(0, I), u_n ~ N(A_n g, T_n), x_n ~ N(u_n, s_n²), and its posterior: mean, cov, a, b, c, log_evidence."""

    def __init__(self, num_points, global_dim, dim, dtype=torch.float64, spread=1.0):
        self.num_points, self.global_dim, self.dim, self.dtype, self.spread = num_points, global_dim, dim, dtype, spread
        a, root = torch.randn(num_points, dim, global_dim, **F64), torch.randn(num_points, dim, dim, **F64)
        t = root @ root.mT / max(dim, 1) + 0.3 * torch.eye(dim, **F64)
        noise = 2.0 * torch.rand(num_points, dim, **F64) + 0.2
        g = torch.randn(global_dim, **F64)
        v = t + torch.diag_embed(noise)
        x = (a @ g.unsqueeze(-1) + torch.linalg.cholesky(v) @ torch.randn(num_points, dim, 1, **F64)).squeeze(-1)
        inverse = torch.linalg.inv(v)
        h = torch.einsum("nij,nik,nk->j", a, inverse, x)
        precision = torch.eye(global_dim, **F64) + torch.einsum("nij,nik,nkl->jl", a, inverse, a)
        self.cov = torch.linalg.inv(precision)
        self.mean = self.cov @ h
        gain = t @ inverse
        self.b, self.c = a - gain @ a, t - gain @ t
        prior_mean = a @ self.mean
        self.a = prior_mean + torch.einsum("nij,nj->ni", gain, x - prior_mean)
        misfit = torch.einsum("ni,nij,nj->", x, inverse, x) + torch.logdet(v).sum() + torch.logdet(precision)
        self.log_evidence = 0.5 * (h @ self.mean - misfit - x.numel() * math.log(2 * math.pi)).item()
        self.design, self.inverse, self.log_det = a.to(dtype), torch.linalg.inv(t).to(dtype), torch.logdet(t).to(dtype)
        self.noise, self.x = noise.sqrt().to(dtype), x.to(dtype)

    def log_joint(self, g, u):
        deviation = u - torch.einsum("nij,kj->kni", self.design, g)
        square = torch.einsum("kni,nij,knj->kn", deviation, self.inverse, deviation)
        prior = -0.5 * (square + self.log_det + self.dim * math.log(2 * math.pi))
        return Normal(0.0, 1.0).log_prob(g).sum(-1), prior + Normal(u, self.noise).log_prob(self.x).sum(-1)

    def errors(self, q):
        """Largest errors of q in units of posterior standard deviations: mean, cov, a, b, c."""
        root, local_root = torch.linalg.cholesky(self.cov), torch.linalg.cholesky(self.c)

        def scaled(root, value):
            return torch.linalg.solve(root, value.double())

        covariance, local = scaled(root, q.scale_tril), scaled(local_root, q.local_scale_tril)
        errors = {
            "mean": scaled(root, (q.loc - self.mean).unsqueeze(-1)),
            "cov": covariance @ covariance.mT - torch.eye(self.global_dim),
            "a": scaled(local_root, (q.local_loc - self.a).unsqueeze(-1)),
            "b": scaled(local_root, (q.slope.double() - self.b) @ root),
            "c": local @ local.mT - torch.eye(self.dim),
        }
        return {name: value.abs().max().item() if value.numel() else 0.0 for name, value in errors.items()}


class RandomEffects(Density):
    """g = (μ, log τ), u_n ~ N(μ, τ²), counts x_n ~ Poisson(exp u_n), or Binomial(10, logistic u_n)."""

    def __init__(self, num_points, *, binomial=False, tau=0.7, dtype=torch.float64, spread=1.0):
        self.num_points, self.binomial, self.dtype, self.spread = num_points, binomial, dtype, spread
        self.x = self.likelihood(0.5 + tau * torch.randn(num_points, **F64)).sample().to(dtype)

    def likelihood(self, u):
        if self.binomial:
            return Binomial(10, logits=u, validate_args=False)
        return Poisson(u.exp(), validate_args=False)

    def prior(self, g):
        return Normal(0.0, 2.0).log_prob(g[:, 0]) + Normal(-0.5, 1.0).log_prob(g[:, 1])

    def log_joint(self, g, u):
        effects = Normal(g[:, :1], g[:, 1:].exp(), validate_args=False)
        return self.prior(g), effects.log_prob(u[..., 0]) + self.likelihood(u[..., 0]).log_prob(self.x)

    def log_marginal(self, g):
        """Σ_n log p(x_n|g) by Gauss–Hermite quadrature with 61 nodes."""
        nodes, weights = (torch.as_tensor(v) for v in np.polynomial.hermite_e.hermegauss(61))
        u = g[:, :1] + g[:, 1:].exp() * nodes
        values, counts = self.x.double().unique(return_counts=True)
        log_weight = (weights / math.sqrt(2 * math.pi)).log()
        terms = [(self.likelihood(u).log_prob(v) + log_weight).logsumexp(-1) for v in values]
        return (torch.stack(terms, -1) * counts).sum(-1)


class EightSchools(Density):
    """g = (μ, log τ), u_n ~ N(0, 1), y_n ~ N(μ + τ u_n, σ_n): not centred."""

    num_points = 8

    def __init__(self, dtype=torch.float64, spread=1.0):
        self.dtype, self.spread = dtype, spread
        self.x = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12], dtype=dtype)
        self.sigma = torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18], dtype=dtype)

    def prior(self, g):
        return Normal(0.0, 5.0).log_prob(g[:, 0]) + HalfCauchy(5.0).log_prob(g[:, 1].exp()) + g[:, 1]

    def log_joint(self, g, u):
        mean = g[:, :1] + g[:, 1:].exp() * u[..., 0]
        return self.prior(g), Normal(0.0, 1.0).log_prob(u[..., 0]) + Normal(mean, self.sigma).log_prob(self.x)

    def log_marginal(self, g):
        scale = (g[:, 1:].exp().square() + self.sigma.double().square()).sqrt()
        return Normal(g[:, :1], scale).log_prob(self.x.double()).sum(-1)


def on_grid(density, q, *, half_width=8.0, size=65):
    """log p(x), and mean and standard deviations of the globals, on a grid around q."""
    step = torch.linspace(-half_width, half_width, size, **F64)
    scale = (q.scale_tril @ q.scale_tril.mT).diagonal().sqrt().double()
    g = q.loc.double() + torch.cartesian_prod(step, step) * scale
    log_prob = density.prior(g) + density.log_marginal(g)
    weight = log_prob.softmax(0).unsqueeze(-1)
    mean = (weight * g).sum(0)
    std = (weight * (g - mean).square()).sum(0).sqrt()
    area = (step[1] - step[0]).square() * scale.prod()
    return (log_prob.logsumexp(0) + area.log()).item(), mean, std


def log_evidence(log_weight):
    """log p(x) and its standard error, effective sample size and k-hat."""
    summary = LogWeightSummary(len(log_weight))
    summary.update(log_weight.unsqueeze(1))
    return [float(v) for v in summary.result()]


def joint_weights(density, q, count):
    """Of all latents at once."""
    result = []
    for _ in range(count // 50):
        g = q.draw_globals(50)
        u = q.draw_locals(g)
        prior, conditional = density.log_joint(g, u)
        log_q = q.log_prob_globals(g).double() + q.log_prob_locals(u, g).double().sum(-1)
        result.append(prior.double() + conditional.double().sum(-1) - log_q)
    return torch.cat(result)


def integrated_weights(density, q, count, num_particles=100):
    """Of the globals, the locals of each point integrated given them."""
    result = []
    for g in q.draw_globals(count).split(max(1, 1000 // density.num_points)):
        given = g.repeat_interleave(num_particles, 0)
        u = q.draw_locals(given)
        prior, conditional = density.log_joint(given, u)
        weight = (conditional - q.log_prob_locals(u, given)).double().unflatten(0, (len(g), num_particles))
        points = weight.logsumexp(1) - math.log(num_particles)
        result.append(prior[::num_particles].double() + points.sum(-1) - q.log_prob_globals(g).double())
    return torch.cat(result)
