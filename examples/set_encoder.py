"""A guide that reads sets: rows with 1 to 20 readings, in any order, by one network.

Each thing has readings x_1, …, x_n, whose mean and precision are unknown:

    τ ~ Gamma(3, 3),    μ | τ ~ N(0, 1/(κτ)),    x_i | μ, τ ~ N(μ, 1/τ),    κ = ½.

Rows are padded to the same length, and a mask says which readings are there: the model leaves out the others by
`poutine.mask`, and the network embeds each reading, and adds up those that are there (Deep Sets). So q(μ, τ|x) depends
on neither order nor padding, and is at hand for a new thing with any number of readings.

The prior is conjugate: p(μ, τ|x) is a normal-gamma distribution, and log p(x) is known for each set, so that
log p(x) − ELBO is KL(q‖p). Few readings leave τ open, and μ with it: a funnel, which a flow follows and no Gaussian of
(μ, log τ).

    python examples/set_encoder.py

Zaheer, Kottur, Ravanbakhsh, Poczos, Salakhutdinov & Smola (2017), *Deep Sets*
"""

from __future__ import annotations

import math
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from matplotlib import pyplot as plt
from pyro import poutine
from script import parse_options, save
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.optim.lr_scheduler import CosineAnnealingLR

from pyro_vae import draw_particles, fit, importance_sampling
from pyro_vae.guides import AmortizedFlow, AmortizedMultivariateNormal
from pyro_vae.networks import MLP

MOST, KAPPA = 20, 0.5  # readings of a thing
GUIDES = {"Gaussian": AmortizedMultivariateNormal, "flow": AmortizedFlow}


def model(x: Tensor, there: Tensor) -> None:
    """Readings (N, 20), and whether they are there."""
    with pyro.plate("data", len(x), dim=-1):
        precision = pyro.sample("precision", dist.Gamma(3.0, 3.0))
        mean = pyro.sample("mean", dist.Normal(0.0, (KAPPA * precision).rsqrt()))
        with pyro.plate("readings", x.shape[1], dim=-2), poutine.mask(mask=there.T):
            pyro.sample("x", dist.Normal(mean, precision.rsqrt()), obs=x.T)


class SetEncoder(nn.Module):
    """Sum and mean of embedded readings, and their number."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.read = MLP(1, [64, 64]), MLP(2 * 64 + 1, [64])

    def forward(self, x: Tensor, there: Tensor) -> Tensor:
        number = there.sum(1, keepdim=True)
        total = (self.embed(x.unsqueeze(-1)) * there.unsqueeze(-1)).sum(1)
        return self.read(torch.cat([total / MOST, total / number, number.log()], -1))


class Posterior(NamedTuple):
    """p(μ, τ|x) = Gamma(τ; a, b) N(μ; m, 1/(κτ)), and log p(x)."""

    m: Tensor
    kappa: Tensor
    a: Tensor
    b: Tensor
    log_evidence: Tensor

    def moments(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Mean and standard deviation of the latents."""
        log_precision = self.a.digamma() - self.b.log(), torch.polygamma(1, self.a).sqrt()
        return {"mean": (self.m, (self.b / (self.kappa * (self.a - 1))).sqrt()), "log precision": log_precision}

    def log_prob(self, log_precision: Tensor, mean: Tensor) -> Tensor:
        """The density of (log τ, μ)."""
        precision = log_precision.exp()
        log_p = dist.Normal(self.m, (self.kappa * precision).rsqrt()).log_prob(mean) + log_precision
        return log_p + dist.Gamma(self.a, self.b).log_prob(precision)


def exact(x: Tensor, there: Tensor) -> Posterior:
    x, number = x.double() * there, there.sum(1).double()
    kappa, a = KAPPA + number, 3 + number / 2
    m = x.sum(1) / kappa
    b = 3 + (x.square().sum(1) - kappa * m.square()) / 2
    log_evidence = a.lgamma() - math.lgamma(3.0) + 3 * math.log(3.0) - a * b.log() + (KAPPA / kappa).log() / 2
    return Posterior(m, kappa, a, b, log_evidence - number * math.log(2 * math.pi) / 2)


def simulate(size: int) -> tuple[Tensor, Tensor]:
    """Padded readings, and whether they are there."""
    there = torch.arange(MOST) < 1 + torch.arange(size).unsqueeze(-1) % MOST
    precision = dist.Gamma(3.0, 3.0).sample((size, 1))
    mean = torch.randn(size, 1) / (KAPPA * precision).sqrt()
    return (mean + torch.randn(size, MOST) / precision.sqrt()) * there, there


def show_moments(number: Tensor, truth: Posterior, draws: dict[str, Tensor], kl: Tensor) -> None:
    print(f"{'readings':>10}{'KL(q‖p)':>10}{'μ: error':>12}{'sd ratio':>10}{'log τ: error':>16}{'sd ratio':>10}")
    for n in (1, 2, 3, 5, 10, 20):
        rows, columns = number == n, [kl[number == n].mean()]
        for name, (mean, sd) in truth.moments().items():
            q = draws[name][:, rows]
            columns.append(((q.mean(0) - mean[rows]) / sd[rows]).square().mean().sqrt())
            columns.append((q.std(0) / sd[rows]).mean())
        print("{:>10}{:>10.3f}{:>12.2f}{:>10.2f}{:>16.2f}{:>10.2f}".format(n, *columns))


def show_invariance(guide: AmortizedFlow, x: Tensor, there: Tensor) -> None:
    order = torch.rand(x.shape).argsort(1)
    others = {
        "order, with padding in between": (x.gather(1, order), there.gather(1, order)),
        "ten more elements of padding, 99s": (pad(x, (0, 10), value=99.0), pad(there, (0, 10))),
    }
    u = guide.get_posterior(x, there).sample()
    log_q = guide.get_posterior(x, there).log_prob(u)
    for name, rows in others.items():
        change = (guide.get_posterior(*rows).log_prob(u) - log_q).abs().max()
        print(f"another {name:<36}log q(μ, τ|x) changes by {change:.0e} at most, of {log_q.abs().max():.1f}")


def draw_contours(axes: list[plt.Axes], guide: AmortizedFlow, x: Tensor) -> None:
    """The posterior of one thing as its readings come in: regions with half and nine tenths of the mass."""
    centre = (x[0, 0].item() + x.mean().item()) / 2
    axis = torch.linspace(centre - 3.2, centre + 3.2, 200)
    grid = torch.meshgrid(torch.linspace(-2.5, 1.5, 200), axis, indexing="ij")
    u = torch.stack(grid, -1).flatten(0, 1)
    for ax, n in zip(axes, (1, 3, 20), strict=True):
        there = torch.arange(MOST).unsqueeze(0) < n
        log_p, log_q = exact(x, there).log_prob(*u.T), guide.get_posterior(x, there).log_prob(u.unsqueeze(1))[:, 0]
        for log_density, style in ((log_p, {"colors": "0.75", "linewidths": 5}), (log_q, {"colors": "tab:blue"})):
            mass, places = log_density.softmax(0).sort(descending=True)
            inside = torch.empty_like(mass).scatter(0, places, mass.cumsum(0))
            ax.contour(grid[1], grid[0], inside.reshape(200, 200), levels=[0.5, 0.9], **style)
        ax.plot(x[0, :n], torch.full((n,), -2.3), "|", color="tab:orange", markersize=12)
        ax.set(title=f"{n} reading{'s' * (n > 1)}", xlabel="μ")
    axes[0].set_ylabel("log τ")


def main() -> None:
    options = parse_options(__doc__)
    epochs, draws = (1, 20) if options.quick else (40, 500)
    data, (x, there) = simulate(400 if options.quick else 8000), simulate(2000)
    truth, number = exact(x, there), there.sum(1)
    figure, axes = plt.subplot_mosaic("abc;def", figsize=(10, 6.2))
    for (name, family), color in zip(GUIDES.items(), ("tab:red", "tab:blue"), strict=True):
        pyro.clear_param_store()
        pyro.set_rng_seed(options.seed)
        guide = family(model, SetEncoder(), inputs=lambda x, there: (x, there))
        fit(
            *(model, guide, data),
            num_epochs=epochs,
            batch_size=200,
            learning_rate=5e-3,
            scheduler=lambda optim: CosineAnnealingLR(optim, epochs),
            clip_norm=10.0,
            seed=options.seed,
        )
        with torch.no_grad():
            elbo = draw_particles(model, guide, x, there, num_particles=draws, seed=1).log_weight.double().mean(0)
            found = guide.sample_posterior(x, there, num_samples=draws, seed=1)
        print(f"\n{name}, 2000 new things; errors of the mean are in sds of the posterior, and root mean squares")
        kl = truth.log_evidence - elbo
        show_moments(number, truth, {"mean": found["mean"], "log precision": found["precision"].log()}, kl)
        estimate = importance_sampling(model, guide, x, there, num_particles=draws, seed=2, progress=False)
        error = (estimate.log_evidence - truth.log_evidence).mean()
        print(f"log p(x) {truth.log_evidence.mean():.4f}, by importance sampling {error:+.4f}")
        kls = [kl[number == n].mean() for n in range(1, MOST + 1)]
        axes["f"].plot(range(1, MOST + 1), kls, "o-", color=color, markersize=4, label=name)
    show_invariance(guide, x, there)

    with torch.no_grad():
        draw_contours([axes[a] for a in "abc"], guide, x[number == MOST][:1])
    (_, sd_mean), (_, sd_log_precision) = truth.moments().values()
    axes["d"].plot(sd_mean, found["mean"].std(0), ".", markersize=3)
    axes["d"].axline((0.1, 0.1), (1, 1), color="0.75", linewidth=3, zorder=0)
    axes["d"].set(xscale="log", yscale="log", xlabel="sd of μ, exact", ylabel="sd of μ, flow")
    axes["e"].plot(number + 0.4 * torch.rand(len(number)) - 0.2, found["precision"].log().std(0), ".", markersize=3)
    axes["e"].plot(number[:MOST], sd_log_precision[:MOST], color="0.75", linewidth=3)
    axes["e"].set(xlabel="readings", ylabel="sd of log τ", ylim=(0, None))
    axes["f"].set(xlabel="readings", ylabel="KL(q‖p), nats", ylim=(0, None))
    axes["f"].legend(frameon=False)
    axes["c"].plot([], [], color="0.75", linewidth=5, label="exact")
    axes["c"].plot([], [], color="tab:blue", label="flow")
    axes["c"].legend(frameon=False, loc="upper right")
    save(figure, options, "set_encoder")


if __name__ == "__main__":
    main()
