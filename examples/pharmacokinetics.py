r"""Concentration curves: latents of one patient that depend on each other, and what a guide pays for not seeing it.

A tablet has three layers, which release their shares w of the dose D at constant rates, within T = ½, 6 and 20 hours.
A patient clears the drug from a volume V at a rate k = C/V, and ten blood samples are measured with an error of 10 %:

    C, V log-normal,   w ~ Dirichlet(5, 5, 5),   y(t) ~ LogNormal(log c(t), 0.1),
    c(t) = D/C Σ_r w_r/T_r (1 − e^{−k min(t, T_r)}) e^{−k max(t − T_r, 0)}.

A large volume prolongs the curve, and so does a large share of the slow layer: given a curve, more of one is less of
the other. A guide with independent coordinates (mean field) cannot say so; one with full covariance over all sites of a
patient, two positive numbers and a simplex, can. Patients who were held out say what this is worth. What the network
costs, `refine` takes away by a Gaussian for each patient, and nearly all draws count then. Its tails are lighter than
the posterior's where a share is small, which k-hat sees; adaptive importance sampling mixes it with the prior, so that
weights are bounded, and trusted if k-hat is low or more than half of the draws count.

    python examples/pharmacokinetics.py

Gibaldi & Perrier (1982), *Pharmacokinetics*; Cremer, Li & Duvenaud (2018), *Inference Suboptimality in Variational
Autoencoders*.
"""

from __future__ import annotations

import argparse

import pyro
import pyro.distributions as dist
import torch
from matplotlib import pyplot as plt
from pyro import poutine
from pyro.poutine import Trace
from script import parse_options, save
from torch import Tensor

from pyro_vae import adaptive_importance_sampling, draw_particles, draw_posterior, fit, importance_sampling, refine
from pyro_vae.guides import AmortizedMultivariateNormal, AmortizedNormal
from pyro_vae.networks import MLP

HOURS = torch.tensor([0.5, 1, 2, 4, 6, 8, 12, 16, 24, 36])
RELEASE, NOISE = torch.tensor([0.5, 6.0, 20.0]), 0.1
GUIDES = {"mean field": AmortizedNormal, "full covariance": AmortizedMultivariateNormal}
COLOURS = {"mean field": "C1", "full covariance": "C0", "refined": "C2", "adaptive": "C3"}


def log_concentration(clearance: Tensor, volume: Tensor, shares: Tensor, dose: Tensor, hours: Tensor) -> Tensor:
    """log c(t), (*batch, hours)."""
    t, k = hours.unsqueeze(-1), (clearance / volume)[..., None, None]
    released = (shares / RELEASE).log().unsqueeze(-2) + (-torch.expm1(-k * t.clamp(max=RELEASE))).log()
    return (released - k * (t - RELEASE).clamp(min=0)).logsumexp(-1) + (dose / clearance).log().unsqueeze(-1)


def model(y: Tensor, dose: Tensor) -> None:
    with pyro.plate("data", len(y)):
        clearance = pyro.sample("clearance", dist.LogNormal(1.6, 0.5))
        volume = pyro.sample("volume", dist.LogNormal(3.4, 0.4))
        shares = pyro.sample("shares", dist.Dirichlet(torch.full((3,), 5.0)))
        log_c = log_concentration(clearance, volume, shares, dose, HOURS)
        pyro.sample("y", dist.LogNormal(log_c, NOISE).to_event(1), obs=y)


def main() -> None:
    options = parse_options(__doc__)
    held_out, epochs, particles = (20, 1, 100) if options.quick else (400, 100, 3000)
    dose = torch.tensor([50.0, 100.0, 200.0]).repeat(800)
    everyone = poutine.trace(poutine.uncondition(model)).get_trace(torch.ones(len(dose), len(HOURS)), dose)
    y = everyone.nodes["y"]["value"]
    train, test = (y[held_out:], dose[held_out:]), (y[:held_out], dose[:held_out])

    print(f"{held_out} held-out patients; nats per patient, {particles} particles")
    print(f"{'':17}{'ELBO':>8}{'effective':>11}{'median k-hat':>14}{'not to trust':>14}")
    guides, elbos, evidence = {}, {}, {}
    for name, family in GUIDES.items():
        guide = family(model, MLP(len(HOURS), [64, 64]), inputs=lambda y, dose: (y / dose.unsqueeze(1)).log() + 4)
        fit(
            *(model, guide, train),
            num_epochs=epochs,
            learning_rate=3e-3,
            scheduler=lambda optim: torch.optim.lr_scheduler.CosineAnnealingLR(optim, epochs),
            clip_norm=10.0,
            seed=options.seed,
        )
        guides[name] = guide
        pyro.clear_param_store()
    guides["refined"] = refined = refine(model, guide, *test, seed=options.seed)
    for name, guide in guides.items():
        with torch.no_grad():
            elbos[name] = draw_particles(model, guide, *test, num_particles=500).log_weight.mean(0)
        evidence[name] = importance_sampling(model, guide, *test, num_particles=particles, seed=options.seed)
    evidence["adaptive"] = adaptive_importance_sampling(
        model, refined, *test, num_particles=particles, seed=options.seed
    )
    for name, found in evidence.items():
        elbo = f"{elbos[name].mean():8.3f}" if name in elbos else " " * 8
        effective = found.effective_sample_size.median() / particles
        print(
            f"{name:17}{elbo}{effective:>11.1%}{found.pareto_khat.median():14.2f}{found.doubtful.double().mean():14.1%}"
        )
    for better, worse in (("full covariance", "mean field"), ("refined", "full covariance")):
        gain = elbos[better] - elbos[worse]
        print(f"ELBO, {better} − {worse}: {gain.mean():.3f} ± {gain.std() / len(gain) ** 0.5:.3f} (patients, paired)")
    draw_figure(test, everyone, guides, evidence, options)


def draw_figure(test: tuple, everyone: Trace, guides: dict, found: dict, options: argparse.Namespace) -> None:
    y, dose = (part[:3] for part in test)
    hours = torch.linspace(0.1, 40.0, 200)
    settings = {"num_samples": 2000, "seed": options.seed}
    draws = {name: guides[name].sample_posterior(y, dose, **settings) for name in GUIDES}
    draws["posterior"] = exact = draw_posterior(model, guides["refined"], y, dose, **settings)
    log_c = log_concentration(exact["clearance"], exact["volume"], exact["shares"], dose, hours)
    figure, axes = plt.subplots(2, 3, figsize=(11, 6.6))
    for n, ax in enumerate(axes[0]):
        truth = [everyone.nodes[name]["value"][n] for name in ("clearance", "volume", "shares")]
        for values, shade, label in (
            (log_c[:, n] + NOISE * torch.randn(log_c[:, n].shape), "0.88", "90 % of measurements"),
            (log_c[:, n], "0.7", "90 % of curves"),
        ):
            low, high = values.exp().quantile(torch.tensor([0.05, 0.95]), 0)
            ax.fill_between(hours, low, high, color=shade, linewidth=0, label=label)
        ax.plot(hours, log_concentration(*truth, dose[n], hours).exp(), "k", linewidth=1, label="truth")
        ax.plot(HOURS, y[n], "o", color="C0", markersize=4, label="measured")
        ax.set(title=f"patient {n + 1}, {dose[n]:.0f} mg", xlabel="hours", ylim=(0, None))
    axes[0, 0].set_ylabel("mg per litre")
    axes[0, 2].legend(frameon=False)
    for ax, name in zip(axes[1, :2], GUIDES, strict=True):
        for which, colour in (("posterior", "0.6"), (name, COLOURS[name])):
            z = draws[which]
            ax.plot(z["volume"][:, 0], z["shares"][:, 0, 2], ".", color=colour, markersize=2, alpha=0.5, label=which)
        ax.set(xlabel="volume, litres", ylabel="share of the slow layer", title=f"patient 1, {name}")
        ax.legend(frameon=False, markerscale=5)
    ax = axes[1, 2]
    for name, e in found.items():
        share = e.effective_sample_size / e.num_particles
        ax.plot(share, e.pareto_khat, ".", color=COLOURS[name], markersize=4, alpha=0.5, label=name)
    ax.axhline(e.threshold, color="k", linewidth=1, linestyle="--")
    ax.set(xlabel="effective share of the draws", ylabel="Pareto k-hat", title="weights of each patient")
    ax.set_ylim(top=2.2)  # room for the legend
    ax.legend(frameon=False, markerscale=3, ncols=2, loc="upper center")
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
    save(figure, options, "pharmacokinetics")


if __name__ == "__main__":
    main()
