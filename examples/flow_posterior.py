r"""A banana-shaped posterior, and how close Gaussians and flows come to it.

    python examples/flow_posterior.py

The model has two latents and one observation, x = 1:

    z ~ N(0, I),    x | z ~ N(z₂ + 2 − z₁², 0.3²),

so that p(z|x) lies along the parabola z₂ = z₁² − 1. For every q,

    log p(x) − ELBO(q) = KL(q(z)‖p(z|x)),

Because z has only two dimensions, log p(x) is known by quadrature, and the gap shows how well a family fits. A Gaussian
can at best follow a part of the parabola. A flow bends Gaussian noise into shape, z = T(ε), and its density follows
from the Jacobian of T. An autoregressive T is fast in one direction only: from ε to z (inverse autoregressive flow,
which is fast to draw from) or, if T is inverted, from z to ε (masked autoregressive flow, which is fast to score any z
with).

Kingma et al. (2016), *Improving Variational Inference with Inverse Autoregressive Flow*;
Rezende & Mohamed (2015), *Variational Inference with Normalizing Flows*.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from matplotlib import pyplot as plt
from pyro.distributions.transforms import affine_autoregressive, permute, spline_coupling
from pyro.infer import Trace_ELBO
from script import parse_options, save
from torch import Tensor

from pyro_vae import VAE, draw_particles, fit
from pyro_vae.distributions import (
    ConditionalFlow,
    ConditionalLowRankMultivariateNormal,
    ConditionalMultivariateNormal,
    ConditionalNormal,
    StandardNormal,
)

X = torch.tensor([[1.0]])
NOISE = 0.3


def likelihood(z: Tensor) -> Any:
    return dist.Normal((z[..., 1] + 2 - z[..., 0] ** 2)[..., None], NOISE).to_event(1)


def flow(make: Callable[[], Any]) -> ConditionalFlow:
    """Three transformations of Gaussian noise; the coordinates swap places between them."""
    swap = permute(2, torch.tensor([1, 0]))
    return ConditionalFlow(StandardNormal(2), [make(), swap, make(), swap, make()])


# One observation: nothing to amortize. A family without a network has parameters of its own, and q(z) ignores x.
FAMILIES: dict[str, Callable[[], Any]] = {
    "diagonal Gaussian": lambda: ConditionalNormal(None, 2),
    "low-rank Gaussian": lambda: ConditionalLowRankMultivariateNormal(None, 2, rank=1),
    "full Gaussian": lambda: ConditionalMultivariateNormal(None, 2),
    "inverse autoregressive": lambda: flow(lambda: affine_autoregressive(2, [32, 32])),
    "masked autoregressive": lambda: flow(lambda: affine_autoregressive(2, [32, 32]).inv),
    "spline coupling": lambda: flow(lambda: spline_coupling(2, hidden_dims=[32, 32], count_bins=8, bound=4.0)),
}


def main() -> None:
    options = parse_options(__doc__)
    num_steps, num_draws = (5, 500) if options.quick else (500, 50_000)
    z1, z2, log_joint, log_p = quadrature()
    print(f"log p(x) by quadrature: {log_p:.4f} nats\n\n{'q(z)':<24}{'ELBO':>9}{'KL(q‖p) ± error':>20}")
    figure, axes = plt.subplots(2, 3, figsize=(11, 7), sharex=True, sharey=True)
    for ax, (name, make) in zip(axes.flat, FAMILIES.items(), strict=True):
        pyro.set_rng_seed(options.seed)
        q = make()
        vae = VAE(StandardNormal(2), likelihood, lambda x, q=q, name=name: pyro.module(name, q)(), name=name)
        fit(
            vae.model,
            vae.guide,
            X,
            num_epochs=num_steps,
            learning_rate=1e-2,
            scheduler=lambda optim: torch.optim.lr_scheduler.CosineAnnealingLR(optim, num_steps),
            loss=Trace_ELBO(num_particles=64, vectorize_particles=True, max_plate_nesting=1),
            seed=options.seed,
            # the others decide by values, so that they have no graph
            compile=name == "inverse autoregressive" and not options.quick,
        )
        with torch.no_grad():
            particles = draw_particles(vae.model, vae.guide, X, num_particles=num_draws)
        log_w = particles.log_weight[:, 0].double()
        kl, error = log_p - log_w.mean(), log_w.std() / num_draws**0.5
        print(f"{name:<24}{log_w.mean():>9.4f}{f'{kl:.4f} ± {error:.4f}':>20}")
        ax.scatter(*particles.latents["z"][:1000, 0].T, s=3, alpha=0.5, color="tab:orange", rasterized=True)
        levels = [(log_joint.max() - drop).exp().item() for drop in (4.5, 2.0, 0.5)]
        ax.contour(z1, z2, log_joint.exp(), levels=levels, colors="0.15", linewidths=0.9)
        ax.set(title=f"{name}, KL = {kl:.3f}", xlim=(-3, 3), ylim=(-3, 3.5))
    figure.supxlabel("$z_1$")
    figure.supylabel("$z_2$")
    figure.suptitle("p(z|x) (contours) and draws of q(z)")
    save(figure, options, "flow_posterior")


def quadrature(num: int = 801) -> tuple[Tensor, Tensor, Tensor, float]:
    """A grid over z, log p(x, z) on it, and log p(x) = log ∫ p(x, z) dz by the trapezoidal rule."""
    axis = torch.linspace(-7, 7, num, dtype=torch.float64)
    z1, z2 = torch.meshgrid(axis, axis, indexing="ij")
    z = torch.stack([z1, z2], -1)
    log_joint = dist.Normal(0.0, 1.0).log_prob(z).sum(-1) + likelihood(z).log_prob(X[0].double())
    return z1, z2, log_joint, torch.trapezoid(torch.trapezoid(log_joint.exp(), axis), axis).log().item()


if __name__ == "__main__":
    main()
