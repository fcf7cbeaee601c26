r"""A VAE inside another model: codes with means of groups, which predict a response that few rows have.

Rows n belong to groups g(n), and x_n has 20 columns. One row in five has a response y_n too:

    m_g ~ N(0, τ² I),    z_n ~ N(m_g(n), I),    x_n ~ p(x|z_n) of the VAE,    y_n ~ N(a + bᵀ z_n, s²).

`sample_model` puts the sites of the VAE into the caller's plate, with the caller's prior of z. The codes can be turned,
but the mean response of a group cannot, e_g = a + bᵀ m_g, and the data are simulated, so that it is known. All rows
tell of m_g, so that e_g comes out better than from the responses alone. (The weights of the decoder are a point, so
that the posterior of e_g is a bit too narrow.)

Given the latents outside of the plate, θ = (m, τ, a, b, s), rows are independent. `integrated_log_likelihood` takes z_n
out, log p(x_n, y_n|θ). Here z_n has two dimensions, so that a grid gives this number too. `from_pyro_svi` stores it as
`log_likelihood`, so that `az.loo` leaves out a row with its code.

    python examples/supervised_groups.py

Gelman & Hill (2007), *Data Analysis Using Regression and Multilevel/Hierarchical Models*, chapter 12
"""

from __future__ import annotations

import math
from functools import partial

import pyro
import pyro.distributions as dist
import torch
from matplotlib import pyplot as plt
from pyro import poutine
from pyro.infer.autoguide import AutoMultivariateNormal
from script import parse_options, save
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR

from pyro_vae import VAE, fit, from_pyro_svi, integrated_log_likelihood
from pyro_vae.distributions import ConditionalMultivariateNormal, ConditionalNormal, LearnedScale, StandardNormal
from pyro_vae.networks import MLP

GROUPS, COLUMNS = 15, 20


class Grouped:
    """A Pyro pair for x (N, 20), y (N,), whether y is known (N,), and groups (N,)."""

    def __init__(self) -> None:
        likelihood = ConditionalNormal(MLP(2, [64]), COLUMNS, scale=LearnedScale())
        self.vae = VAE(
            StandardNormal(2), likelihood, ConditionalMultivariateNormal(MLP(COLUMNS, [64], context_size=2), 2)
        )
        self.guide_of_globals = AutoMultivariateNormal(poutine.block(self.model, hide=["data", "z", "x", "y"]))

    def model(self, x: Tensor, y: Tensor, known: Tensor, group: Tensor) -> None:
        spread = pyro.sample("spread", dist.LogNormal(0.0, 1.0))
        intercept = pyro.sample("intercept", dist.Normal(0.0, 3.0))
        slope = pyro.sample("slope", dist.Normal(0.0, 3.0).expand([2]).to_event(1))
        noise = pyro.sample("noise", dist.LogNormal(-1.0, 1.0))
        with pyro.plate("groups", GROUPS):
            means = pyro.sample("means", dist.Normal(torch.zeros(2), spread.unsqueeze(-1)).to_event(1))
            pyro.deterministic("effect", intercept + (means * slope).sum(-1))
        with pyro.plate("data", len(x)):
            z = self.vae.sample_model(x, prior=dist.Normal(means[..., group, :], 1.0).to_event(1))
            pyro.sample("y", dist.Normal(intercept + (z * slope).sum(-1), noise).mask(known), obs=y)

    def guide(self, x: Tensor, y: Tensor, known: Tensor, group: Tensor) -> None:
        self.guide_of_globals(x, y, known, group)
        with pyro.plate("data", len(x)):
            self.vae.sample_guide(x, torch.stack([y * known, known], -1))


def simulate() -> tuple[tuple[Tensor, ...], Tensor]:
    """x, y, known and group, and the mean response of each group."""
    group = torch.repeat_interleave(torch.arange(GROUPS), torch.arange(10, 10 + 4 * GROUPS, 4))
    means, slope, weights = 1.5 * torch.randn(GROUPS, 2), torch.tensor([1.0, -0.5]), torch.randn(2, COLUMNS)
    z = means[group] + torch.randn(len(group), 2)
    x = torch.tanh(0.4 * z @ weights) @ torch.randn(COLUMNS, COLUMNS) / 2 + 0.3 * torch.randn(len(z), COLUMNS)
    y = 2.0 + z @ slope + 0.5 * torch.randn(len(z))
    return (x, y, torch.arange(len(z)) % 5 == 0, group), 2.0 + means @ slope


def by_quadrature(
    pair: Grouped, theta: dict[str, Tensor], x: Tensor, y: Tensor, known: Tensor, group: Tensor
) -> Tensor:
    """log p(x_n, y_n|θ_s), (S, N), as the sum over a grid of z."""
    axis = torch.arange(-8.0, 8.0, 0.08)
    z = torch.cartesian_prod(axis, axis)
    likelihood = pair.vae.decode(z)
    log_x = torch.stack([likelihood.log_prob(row) for row in x])  # (N, points of the grid)
    found = []
    for means, intercept, slope, noise in zip(
        *(theta[name] for name in ("means", "intercept", "slope", "noise")), strict=True
    ):
        log_z = dist.Normal(means[:, None], 1.0).to_event(1).log_prob(z)[group]
        log_y = dist.Normal(intercept + z @ slope, noise).log_prob(y[:, None]) * known[:, None]
        found.append((log_x + log_z + log_y).logsumexp(1) + 2 * math.log(0.08))
    return torch.stack(found)


def main() -> None:
    options = parse_options(__doc__)
    epochs, draws, particles = (5, 20, 20) if options.quick else (6000, 500, 300)
    data, truth = simulate()
    x, y, known, group = data
    pair = Grouped()
    settings = {"batch_size": len(x), "learning_rate": 0.01, "seed": options.seed}
    fit(pair.model, pair.guide, data, num_epochs=epochs, scheduler=partial(CosineAnnealingLR, T_max=epochs), **settings)

    tree = from_pyro_svi(pair.model, pair.guide, *data, num_samples=draws, progress=False)
    effect = torch.from_numpy(tree["posterior"]["effect"].values)[0]
    sd, scores = effect.std(0), (effect.mean(0) - truth) / effect.std(0)
    responses = [
        torch.stack([y[rows & (group == g)].mean() for g in range(GROUPS)]) for rows in (known, known | ~known)
    ]
    print(f"mean response of {GROUPS} groups, {len(x)} rows, {known.sum()} of them with a response: error (RMS)")
    for name, value in {"this model": effect.mean(0), "mean of the responses": responses[0]}.items():
        print(f"  {name:<38}{(value - truth).square().mean().sqrt():.3f}")
    print(f"  {'mean of the responses, were all known':<38}{(responses[1] - truth).square().mean().sqrt():.3f}")
    print(f"  error of this model / its sd, RMS     {scores.square().mean().sqrt():.2f} (1 if the sd is right)")

    adaptive = not options.quick  # a fit of 570 Gaussians takes a quarter of a minute
    pick = {"num_samples": 1 if options.quick else 5, "num_particles": particles, "adaptive": adaptive}
    pick |= {"seed": options.seed, "progress": False}
    log_p = integrated_log_likelihood(pair.model, pair.guide, *data, **pick)
    exact = by_quadrature(pair, log_p.globals, *data)
    print(f"log p(x, y|θ) of each row at {len(exact)} draws of θ, nats")
    difference, error = (log_p - exact).abs(), log_p.standard_error.median()
    print(f"  integrated_log_likelihood             {log_p.mean():.4f}, of a row ± {error:.4f} (median)")
    print(f"  quadrature                            {exact.mean():.4f}")
    rms = difference.square().mean().sqrt()
    print(f"  |difference|, row by row              RMS {rms:.4f}, largest {difference.max():.4f}")

    figure, ax = plt.subplots(figsize=(6, 4.2))
    ax.axline((0, 0), slope=1, color="0.7", linewidth=1)
    ax.plot(truth, responses[0], "x", color="tab:orange", label="mean of the responses")
    ax.errorbar(truth, effect.mean(0), 2 * sd, fmt="o", color="tab:blue", capsize=2, label="this model, ± 2 sd")
    ax.set(xlabel="mean response of the group, true", ylabel="estimated", aspect="equal")
    ax.legend(frameon=False)
    save(figure, options, "supervised_groups")


if __name__ == "__main__":
    main()
