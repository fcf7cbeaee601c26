r"""Pyro's causal effect VAE: what its weights say, and its individual treatment effects against the truth.

A confounder z decides on treatment and outcome, and only noisy proxies x of it are seen,

    z ~ N(0, 1),   x ~ N(c z, s² I),   t ~ Bernoulli(logit⁻¹(3z/2)),   y ~ N(2z + t (1 + tanh z), 1/4).

`pyro.contrib.cevae.CEVAE` learns p(z, x, t, y) with networks. Any pair goes through the tools as it is: here its model
and guide, with t and y as auxiliary sites of the guide where they are observed, and as latents where they are not. The
evidence log p(x, t, y) is held against a sum over z, which is one number. For new patients, of whom x alone is known,

    effect(x) = E[y|do(t=1), x] − E[y|do(t=0), x] = E_{p(z|x)}[E(y|t=1, z) − E(y|t=0, z)].

`CEVAE.ite` takes z from the guide; draws by their weights are from p(z|x) of the trained model, without the scatter of
the guide. What is left is the model's error: where hardly anyone goes untreated, it extrapolates.

    python examples/cevae.py

Louizos, Shalit, Mooij, Sontag, Zemel & Welling (2017), *Causal Effect Inference with Deep Latent-Variable Models*.
"""

from __future__ import annotations

import argparse
from math import log
from typing import Any

import pyro.distributions as dist
import torch
from matplotlib import pyplot as plt
from pyro.contrib.cevae import CEVAE
from script import parse_options, save
from torch import Tensor

from pyro_vae import from_pyro_svi, importance_sampling

PROXIES, NOISE, SD = torch.tensor([1.0, -1.0, 0.5, 1.0, -1.0]), 0.7, 0.5  # c, s, and the scale of y
GRID = torch.linspace(-6, 6, 301)[:, None]  # of z
PRIOR = dist.Normal(0.0, 1.0).log_prob(GRID[:, 0]) + log(12 / 300)


class Truth:
    """What the data come from, with the methods of `pyro.contrib.cevae.Model`; z is (…, 1)."""

    def x_dist(self, z: Tensor) -> dist.Distribution:
        return dist.Normal(z * PROXIES, NOISE).to_event(1)

    def t_dist(self, z: Tensor) -> dist.Distribution:
        return dist.Bernoulli(logits=1.5 * z[..., 0])

    def y_dist(self, t: Tensor, z: Tensor) -> dist.Distribution:
        return dist.Normal(2 * z[..., 0] + t * (1 + z[..., 0].tanh()), SD)

    def simulate(self, num: int) -> tuple[Tensor, Tensor, Tensor]:
        z = torch.randn(num, 1)
        t = self.t_dist(z).sample()
        return self.x_dist(z).sample(), t, self.y_dist(t, z).sample()


def main() -> None:
    options = parse_options(__doc__)
    num_epochs, num_particles, num_draws = (2, 100, 50) if options.quick else (60, 1000, 500)
    truth = Truth()
    x, t, y = truth.simulate(4000)
    new_x, new_t, new_y = truth.simulate(300)
    cevae = CEVAE(len(PROXIES), "normal", latent_dim=1, hidden_dim=40, num_layers=2)
    cevae.fit(x, t, y, num_epochs=num_epochs, learning_rate=5e-3, log_every=0)

    white = cevae.whiten(new_x)
    evidence = importance_sampling(
        *(cevae.model, cevae.guide, white, new_t, new_y), num_particles=num_particles, seed=options.seed
    )
    with torch.no_grad():
        exact = log_joint(cevae.model, white, new_t, new_y).logsumexp(1)
    true = log_joint(truth, new_x, new_t, new_y).logsumexp(1) - cevae.whiten.inv_scale.log().sum()
    error = (evidence.log_evidence - exact) / evidence.standard_error
    print(f"log p(x, t, y) of {len(new_x)} new patients, nats each, x whitened")
    print(f"  importance sampling    {evidence.log_evidence.mean():.4f}")
    print(f"  sum over z             {exact.mean():.4f}")
    print(f"  errors in standard errors: RMS {error.square().mean().sqrt():.2f}, largest {error.abs().max():.2f}")
    print(f"  the true distribution  {true.mean():.4f}")

    # of x alone, the guide's t and y are draws of latents; it concatenates tensors, and runs one draw at a time
    settings = {"num_samples": num_draws, "dims": {"z": ["latent"]}, "seed": options.seed, "parallel": False}
    tree = from_pyro_svi(cevae.model, cevae.guide, white, resample=True, **settings)
    z = torch.from_numpy(tree["posterior"]["z"].values.copy())[0]  # (draws, patients, 1)
    with torch.no_grad():
        effects = {"guide (CEVAE.ite)": cevae.ite(new_x), "draws by weight": effect(cevae.model, z).mean(0)}
    right = log_joint(truth, new_x).softmax(1) @ effect(truth, GRID)
    print(f"posterior of x alone: {', '.join(tree['posterior'].data_vars)}; ", end="")
    print(f"effective draws, median {tree['sample_stats']['ess'].median().item():.0f} of {num_draws}")
    print("average effect of the treatment, and errors of the individual ones (RMS)")
    print(f"  {'truth':22}{right.mean():6.3f}")
    print(f"  {'mean y of t=1 − t=0':22}{new_y[new_t == 1].mean() - new_y[new_t == 0].mean():6.3f}")
    for name, found in effects.items():
        print(f"  {name:22}{found.mean():6.3f}{(found - right).square().mean().sqrt():8.3f}")
    draw_figure(right, effects, evidence.log_evidence, exact, options)


def log_joint(model: Any, x: Tensor, t: Tensor | None = None, y: Tensor | None = None) -> Tensor:
    """log p(z, x, t, y) dz on the grid of z, (N, grid); without t and y, log p(z, x) dz."""
    total = PRIOR + model.x_dist(GRID).log_prob(x[:, None])
    if t is not None and y is not None:
        total = total + model.t_dist(GRID).log_prob(t[:, None]) + model.y_dist(t[:, None], GRID).log_prob(y[:, None])
    return total


def effect(model: Any, z: Tensor) -> Tensor:
    """E(y|t=1, z) − E(y|t=0, z)."""
    treated, untreated = (model.y_dist(torch.tensor(t), z).mean for t in (1.0, 0.0))
    return treated - untreated


def draw_figure(
    truth: Tensor, effects: dict[str, Tensor], evidence: Tensor, exact: Tensor, options: argparse.Namespace
) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4.2))
    for (name, found), marker in zip(effects.items(), "ox", strict=True):
        left.plot(truth, found, marker, markersize=4, fillstyle="none", label=name)
    left.axline((1, 1), slope=1, color="0.6", linewidth=1, zorder=0)
    left.set(xlabel="true effect of the treatment, given x", ylabel="estimate", title="each new patient")
    left.legend(frameon=False)
    right.plot(exact, evidence, "o", markersize=4, fillstyle="none")
    right.axline((-8, -8), slope=1, color="0.6", linewidth=1, zorder=0)
    right.set(xlabel="sum over z", ylabel="importance sampling", title="log p(x, t, y) of the trained model, nats")
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
    save(figure, options, "cevae")


if __name__ == "__main__":
    main()
