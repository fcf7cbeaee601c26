r"""Whether to believe a guide: calibration on simulated data, before and after each row gets a Gaussian of its own.

An observer detects signals of nine levels in ten trials each; the curve has a threshold and a slope:

    y_j ~ Binomial(10, logit⁻¹(s (level_j − t))),    t ~ N(0, 1),    log s ~ N(1, ½²).

If (t*, s*) is drawn from the prior, and y from the model at (t*, s*), then among draws from the exact posterior of y,
the ranks of t*, of s* and of log p(y|t*, s*) are uniform, and a region that holds 90 % of the draws holds the truth
nine times out of ten. A guide whose training was stopped early fails. There are two ways to go on without training:

    resampling   draws of the guide, weighed by p/q: it has too few good ones here (importance), unless the proposal is
                 fitted to each row first (adaptive);
    refine       a Gaussian for each row, for the rows it was made for. So data are simulated first, then it is refined
                 on them, then truths are ranked: as any other inference would be checked.

    python examples/calibration.py

Talts, Betancourt, Simpson, Vehtari & Gelman (2018), *Validating Bayesian inference algorithms with simulation-based
calibration*; Modrák et al. (2023), *Simulation-based calibration checking for Bayesian computation*.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterable

import pyro
import pyro.distributions as dist
import torch
from matplotlib import pyplot as plt
from pyro import poutine
from script import parse_options, save
from torch import Tensor

from pyro_vae import draw_particles, fit, refine, simulate
from pyro_vae.diagnostics import (
    Calibration,
    Coverage,
    expected_coverage,
    posterior_calibration,
    simulation_based_calibration,
)
from pyro_vae.guides import AmortizedMultivariateNormal
from pyro_vae.networks import MLP

LEVELS, TRIALS, NUM_DRAWS = torch.linspace(-2, 2, 9), 10, 99


def model(y: Tensor) -> None:
    with pyro.plate("data", len(y)):
        threshold = pyro.sample("threshold", dist.Normal(0.0, 1.0)).unsqueeze(-1)
        slope = pyro.sample("slope", dist.LogNormal(1.0, 0.5)).unsqueeze(-1)
        pyro.sample("y", dist.Binomial(TRIALS, logits=slope * (LEVELS - threshold)).to_event(1), obs=y)


def main() -> None:
    options = parse_options(__doc__)
    simulations, epochs = (50, 2) if options.quick else (1000, 5)
    y = poutine.trace(poutine.uncondition(model)).get_trace(torch.zeros(2000, len(LEVELS))).nodes["y"]["value"]
    guide = AmortizedMultivariateNormal(model, MLP(len(LEVELS), [32]))
    fit(model, guide, y, num_epochs=epochs, learning_rate=5e-3, seed=options.seed)

    settings = {"num_simulations": simulations, "num_draws": NUM_DRAWS, "seed": options.seed}
    found = {
        "guide": simulation_based_calibration(model, guide, y, **settings),
        "resampled, importance": simulation_based_calibration(model, guide, y, method="importance", **settings),
        "resampled, adaptive": simulation_based_calibration(model, guide, y, method="adaptive", **settings),
    }
    coverage = {"guide": expected_coverage(model, guide, y, kinds=("highest_density",), **settings)}
    found["refined"], coverage["refined"] = calibration_of_refined(guide, y[:simulations], options)
    print(f"p-values of uniform ranks, {simulations} simulations")
    print(f"{'':22}" + "".join(f"{name:>16}" for name in found["guide"].ranks))
    for name, calibration in found.items():
        print(f"{name:22}" + "".join(f"{p.item():>16.2g}" for p in calibration.p_values.values()))
    for name, covered in coverage.items():
        print(f"{name}: regions of 90 % hold {covered.coverage['highest_density'][89]:.1%} of the truths")
    with warnings.catch_warnings(action="ignore"):  # of observers that are left out
        at_data = posterior_calibration(model, guide, y, **settings)
    print(f"the guide on replications of the data at hand: {at_data}")
    draw_figure(found, coverage, options)


def calibration_of_refined(guide: Callable, y: Tensor, options: argparse.Namespace) -> tuple[Calibration, Coverage]:
    """Ranks by hand: `refine` fits given rows, here simulated ones, whose latents are known."""
    simulation = simulate(model, guide, y, seed=options.seed)
    truths = simulation.latents
    refined = refine(model, guide, *simulation.args, seed=options.seed)
    with torch.no_grad():
        particles = draw_particles(model, refined, *simulation.args, num_particles=NUM_DRAWS, seed=options.seed)
        log_p = log_prob(model, truths, simulation.args, ["y"])
        log_q = log_prob(refined, truths, simulation.args, truths)
    ranks = {name: (draws < truths[name]).sum(0) for name, draws in particles.latents.items()}
    ranks["log_likelihood"] = (particles.log_likelihood < log_p).sum(0)
    means, sds = ({n: f(z, dim=0) for n, z in particles.latents.items()} for f in (torch.mean, torch.std))
    denser = (particles.log_posterior > log_q).sum(0)
    return Calibration(ranks, truths, means, sds, NUM_DRAWS), Coverage({"highest_density": denser}, NUM_DRAWS)


def log_prob(function: Callable, latents: dict[str, Tensor], args: tuple, names: Iterable[str]) -> Tensor:
    """Of these sites together, at given latents, (N,)."""
    trace = poutine.trace(poutine.condition(function, data=latents)).get_trace(*args)
    trace.compute_log_prob()
    return torch.stack([trace.nodes[name]["log_prob"] for name in names]).sum(0)


def draw_figure(found: dict[str, Calibration], coverage: dict[str, Coverage], options: argparse.Namespace) -> None:
    figure, (before, after, covered) = plt.subplots(1, 3, figsize=(12, 3.8))
    found["guide"].plot(before).set_title("ranks before: the guide, stopped early")
    found["refined"].plot(after).set(title="ranks after: refined", ylabel="", ylim=before.get_ylim())
    ranks = {name: found.ranks["highest_density"] for name, found in coverage.items()}
    Coverage(ranks, NUM_DRAWS).plot(covered).set_title("coverage of regions of highest density")
    save(figure, options, "calibration")


if __name__ == "__main__":
    main()
