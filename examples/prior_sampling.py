r"""Why not to estimate log p(x) with draws from the prior: how the error grows with the dimension of z.

Both estimators average over K draws. They differ in where the draws come from:

    prior sampling        p(x) ≈ 1/K Σ_k p(x|z_k),                     z_k ~ p(z)
    importance sampling   p(x) ≈ 1/K Σ_k p(x|z_k) p(z_k) / q(z_k|x),   z_k ~ q(z|x)

Both are unbiased for p(x). Their relative variance is χ²/K, where χ² is the chi-square divergence of the posterior from
the proposal. Over d independent dimensions, 1 + χ² = (1 + χ₁²)^d, and the effective sample size tends to K / (1 + χ²).
The χ₁² of the prior is large, so that it fails after a handful of dimensions. The χ₁² of a guide is small even if the
guide is only roughly right. The model here is z ~ N(0, I_d), x|z ~ N(W z, σ² I) with orthogonal W and σ = 0.3, for
which log p(x) is known: x ~ N(0, W Wᵀ + σ² I). The guide is the exact posterior, with its mean shifted by 0.3 standard
deviations and its standard deviation multiplied by 1.2.

    python examples/prior_sampling.py

Owen (2013), *Monte Carlo theory, methods and examples*, chapter 9.
"""

from __future__ import annotations

import math
from argparse import Namespace

import pyro
import pyro.distributions as dist
import torch
from matplotlib import pyplot as plt
from script import parse_options, save
from torch import Tensor

from pyro_vae import importance_sampling, prior_sampling

NOISE = 0.3  # σ
SHIFT, STRETCH = 0.3, 1.2  # of the guide, in standard deviations of the exact posterior
DIMENSIONS = (1, 2, 4, 8, 16, 32)


class LinearGaussian:
    """Model, guide and exact log p(x) for d latent variables and as many observed ones."""

    def __init__(self, d: int) -> None:
        self.d = d
        self.weight = torch.linalg.qr(torch.randn(d, d))[0]  # orthogonal, so that every d is as hard per dimension
        self.scale = (1 + NOISE**-2) ** -0.5  # of p(z|x), the same in all dimensions

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(self.d), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.weight.T, NOISE).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        mean = x @ self.weight * (self.scale / NOISE) ** 2
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(mean + SHIFT * self.scale, STRETCH * self.scale).to_event(1))

    def simulate(self, n: int) -> Tensor:
        return torch.randn(n, self.d) @ self.weight.T + NOISE * torch.randn(n, self.d)

    def log_evidence(self, x: Tensor) -> Tensor:
        covariance = self.weight @ self.weight.T + NOISE**2 * torch.eye(self.d)
        return dist.MultivariateNormal(torch.zeros(self.d), covariance).log_prob(x)


def main() -> None:
    options = parse_options(__doc__)
    num_points, num_particles = (20, 500) if options.quick else (100, 5000)
    names = ("prior", "guide")
    errors: dict[str, list[Tensor]] = {name: [] for name in names}
    sizes: dict[str, list[float]] = {name: [] for name in names}
    print(f"{num_points} data points, {num_particles} particles each; nats per data point")
    print(f"{'':>3} {'log p(x)':>9}   {'mean estimate':^16}   {'mean |error|':^16}   {'effective sample size':^21}")
    print(f"{'d':>3} {'exact':>9}  {'prior':>8} {'guide':>8}  {'prior':>8} {'guide':>8}  {'prior':>10} {'guide':>10}")
    for d in DIMENSIONS:
        problem = LinearGaussian(d)
        x = problem.simulate(num_points)
        exact = problem.log_evidence(x)
        results = {
            "prior": prior_sampling(problem.model, None, x, num_particles=num_particles, progress=False),
            "guide": importance_sampling(problem.model, problem.guide, x, num_particles=num_particles, progress=False),
        }
        for name, result in results.items():
            errors[name].append((result.log_evidence - exact).abs())
            sizes[name].append(result.effective_sample_size.mean().item())
        estimates = "".join(f" {results[name].log_evidence.mean():8.2f}" for name in names)
        wrong = "".join(f" {errors[name][-1].mean():8.3f}" for name in names)
        print(f"{d:>3} {exact.mean():9.2f}  {estimates}  {wrong}  " + "".join(f" {sizes[n][-1]:10.1f}" for n in names))
    draw_figure(errors, sizes, num_particles, options)


def draw_figure(
    errors: dict[str, list[Tensor]], sizes: dict[str, list[float]], num_particles: int, options: Namespace
) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    labels = {"prior": "draws from the prior", "guide": "draws from the guide"}
    for name, marker in (("prior", "o"), ("guide", "s")):
        quantiles = torch.stack([e.quantile(e.new_tensor([0.1, 0.9])) for e in errors[name]])
        mean = [e.mean().item() for e in errors[name]]
        (line,) = left.plot(DIMENSIONS, mean, marker=marker, label=labels[name])
        left.fill_between(DIMENSIONS, *quantiles.T.numpy(), color=line.get_color(), alpha=0.15, linewidth=0)
        right.plot(DIMENSIONS, sizes[name], marker=marker, label=labels[name])
    left.set(ylabel="|error of log p(x)| (nats)", title="mean error, and 10 % to 90 % of the data points")
    # 1 + χ₁² of the guide, for one dimension, in units of the posterior's standard deviation
    growth = STRETCH**2 / (2 * STRETCH**2 - 1) ** 0.5 * math.exp(SHIFT**2 / (2 * STRETCH**2 - 1))
    limit = [num_particles / growth**d for d in DIMENSIONS]
    right.plot(DIMENSIONS, limit, "k--", linewidth=1)
    right.axhline(num_particles, color="0.6", linestyle=":")
    right.axhline(1, color="0.6", linestyle=":")
    right.set(
        ylabel="effective sample size", title=f"K = {num_particles}; dashed: $K / (1 + \\chi_1^2)^d$ of the guide"
    )
    for ax in (left, right):
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_xticks(DIMENSIONS, [str(d) for d in DIMENSIONS])
        ax.set_xlabel("dimension d of z")
        ax.spines[["top", "right"]].set_visible(False)
    right.set_ylim(0.7, 1.5 * num_particles)
    left.legend(frameon=False)
    save(figure, options, "prior_sampling")


if __name__ == "__main__":
    main()
