"""One guide, four objectives: forward KL covers the whole posterior where the ELBO settles on a part of it.

A point z in the plane is seen by a sensor at the origin, which measures its distance:

    z ~ N((½, 0), I),    x | z ~ N(|z|, 0.1²),

so that p(z|x) is a ring. An amortized mixture q(z|x) of six normal distributions can follow a ring. Which part of it
the mixture covers depends on the objective:

    ELBO                  minimises KL(q‖p): nothing is lost by leaving out a part of p;
    importance-weighted   with 8 particles, of which one has to lie well: q spreads, and wastes the others;
    forward KL            minimises KL(p‖q) on simulated (z, x): what is left out costs most;
    both                  ELBO + forward KL.

Both divergences come from quadrature, as does the coverage: the mass of p(z|x) where q(z|x) has its densest 90 %. The
last column is the effective share of draws in importance sampling from q, 1/∫ p²/q.

    python examples/forward_kl.py

Papamakarios & Murray (2016), *Fast ε-free Inference of Simulation Models with Bayesian Conditional Density Estimation*;
Burda, Grosse & Salakhutdinov (2016), *Importance Weighted Autoencoders*.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from matplotlib import pyplot as plt
from pyro.infer import Trace_ELBO
from script import parse_options, save
from torch import Tensor, nn

from pyro_vae import CombinedELBO, ForwardKL, ImportanceWeightedELBO, fit
from pyro_vae.networks import MLP

COMPONENTS, NOISE = 6, 0.1
PRIOR = dist.Normal(torch.tensor([0.5, 0.0]), 1.0).to_event(1)
ELBO = {"num_particles": 8, "vectorize_particles": True, "max_plate_nesting": 1}
OBJECTIVES = {
    "ELBO": lambda: Trace_ELBO(**ELBO),
    "importance-weighted": lambda: ImportanceWeightedELBO(8),
    "forward KL": lambda: ForwardKL(),
    "both": lambda: CombinedELBO([(Trace_ELBO(**ELBO), 1.0), (ForwardKL(), 1.0)]),
}
SHOWN = torch.tensor([0.75, 1.5, 2.5])  # distances


def model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", PRIOR)
        pyro.sample("x", dist.Normal(z.norm(dim=-1), NOISE), obs=x)


def posterior(network: nn.Module, x: Tensor) -> dist.TorchDistribution:
    """q(z|x): a mixture, whose draws are differentiable."""
    h = network(x.unsqueeze(-1)).unflatten(-1, (COMPONENTS, 5))
    return dist.MixtureOfDiagNormals(h[..., :2], 0.05 + nn.functional.softplus(h[..., 2:4]), h[..., 4])


def log_posterior(z: Tensor, x: Tensor, area: float) -> Tensor:
    """log p(z|x) on a grid (G, 2) for each x, (G, N), normalised by quadrature."""
    log_joint = PRIOR.log_prob(z)[:, None] + dist.Normal(z.norm(dim=-1)[:, None], NOISE).log_prob(x)
    return log_joint - (log_joint.logsumexp(0) + torch.tensor(area).log())


def compare(log_p: Tensor, log_q: Tensor, area: float) -> list[float]:
    """KL(p‖q), KL(q‖p), coverage and effective share, means over x."""
    p, q = log_p.exp() * area, log_q.exp() * area  # masses of cells, (G, N)
    densest = log_q.argsort(0, descending=True)
    inside = q.gather(0, densest).cumsum(0) < 0.9
    rows = [
        (p * (log_p - log_q)).sum(0),
        (q * (log_q - log_p)).sum(0),
        (p.gather(0, densest) * inside).sum(0),
        1 / (p * (log_p - log_q).exp()).sum(0),
    ]
    return [row.mean().item() for row in rows]


def main() -> None:
    options = parse_options(__doc__)
    steps = 3 if options.quick else 1000
    x = (PRIOR.sample((256,)).norm(dim=-1) + NOISE * torch.randn(256)).abs()
    axis = torch.linspace(-5.0, 5.0, 101 if options.quick else 401)
    z, ticks = torch.cartesian_prod(axis, axis), axis.numpy()
    area = float(axis[1] - axis[0]) ** 2
    log_p = log_posterior(z, SHOWN, area)
    print(f"means over x = {', '.join(f'{x:g}' for x in SHOWN.tolist())}")
    print(f"{'objective':<22}{'KL(p‖q)':>9}{'KL(q‖p)':>9}{'coverage':>10}{'effective':>11}")
    figure, axes = plt.subplots(len(SHOWN), 1 + len(OBJECTIVES), figsize=(11, 6.6), sharex=True, sharey=True)
    densities = {"p(z|x)": log_p}
    for name, objective in OBJECTIVES.items():
        pyro.set_rng_seed(options.seed)
        network = nn.Sequential(MLP(1, [64, 64]), nn.Linear(64, 5 * COMPONENTS))

        def guide(x: Tensor, network: nn.Module = network) -> None:
            pyro.module("network", network)
            with pyro.plate("data", len(x)):
                pyro.sample("z", posterior(network, x))

        fit(
            *(model, guide, x),
            num_epochs=steps,
            batch_size=256,
            learning_rate=3e-3,
            scheduler=lambda optim: torch.optim.lr_scheduler.CosineAnnealingLR(optim, steps),
            clip_norm=10.0,
            loss=objective(),
            seed=options.seed,
        )
        with torch.no_grad():
            log_q = densities[name] = posterior(network, SHOWN).log_prob(z[:, None])
        row = compare(log_p.double(), log_q.double(), area)
        print(f"{name:<22}{row[0]:>9.3f}{row[1]:>9.3f}{row[2]:>10.1%}{row[3]:>11.1%}")
        pyro.clear_param_store()
    for column, (name, log_density) in zip(axes.T, densities.items(), strict=True):
        for ax, density in zip(column, log_density.exp().T, strict=True):
            image = density.reshape(len(axis), -1).T.numpy()
            ax.pcolormesh(ticks, ticks, image, cmap="Blues", rasterized=True)
            ax.set(xlim=(-3.2, 3.2), ylim=(-3.2, 3.2), aspect="equal")
        column[0].set_title(name)
    for ax, value in zip(axes[:, 0], SHOWN.tolist(), strict=True):
        ax.set_ylabel(f"x = {value}")
    save(figure, options, "forward_kl")


if __name__ == "__main__":
    main()
