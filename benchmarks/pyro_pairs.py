"""Pyro's own pairs through every estimator: the semi-supervised VAE of its examples, and CEVAE of its contrib.

    python benchmarks/pyro_pairs.py

Neither was written for this package: the first has a plate without a size and a one-hot label that is drawn, or summed
out where `config_enumerate` marks it; the second observed sites in its guide. With two latents the first is also
integrated on a grid. The table goes to benchmark_output/pyro_pairs.md as well.
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import TraceEnum_ELBO, config_enumerate
from sklearn import datasets
from torch import Tensor, nn

from pyro_vae import (
    Evidence,
    adaptive_importance_sampling,
    annealed_importance_sampling,
    fit,
    importance_sampling,
    sandwich,
)


class SemiSupervised(nn.Module):
    """The model of Kingma et al. (2014) with the sites and plates that Pyro's examples give it."""

    def __init__(self, pixels: int = 64, classes: int = 10, latent: int = 2, hidden: int = 64) -> None:
        super().__init__()
        self.classes, self.latent = classes, latent

        def network(inputs: int, outputs: int) -> nn.Module:
            return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, outputs))

        self.decoder = network(latent + classes, pixels)
        self.classifier = network(pixels, classes)
        self.encoder = network(pixels + classes, 2 * latent)

    @staticmethod
    def join(*tensors: Tensor) -> Tensor:
        shape = torch.broadcast_shapes(*(t.shape[:-1] for t in tensors))
        return torch.cat([t.expand(shape + t.shape[-1:]) for t in tensors], -1)

    def model(self, xs: Tensor, ys: Tensor | None = None) -> None:
        pyro.module("semi_supervised", self)
        with pyro.plate("data"):
            zs = pyro.sample("z", dist.Normal(xs.new_zeros(len(xs), self.latent), 1.0).to_event(1))
            ys = pyro.sample("y", dist.OneHotCategorical(xs.new_ones(len(xs), self.classes) / self.classes), obs=ys)
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(self.join(zs, ys))).to_event(1), obs=xs)

    def guide(self, xs: Tensor, ys: Tensor | None = None) -> None:
        with pyro.plate("data"):
            if ys is None:
                ys = pyro.sample("y", dist.OneHotCategorical(logits=self.classifier(xs)))
            loc, log_scale = self.encoder(self.join(xs, ys)).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    @torch.no_grad()
    def log_joint(self, x: Tensor) -> Tensor:
        """log p(x, y) for each label, (N, classes), by quadrature over two latents."""
        axis = torch.linspace(-6, 6, 241)
        z = torch.cartesian_prod(axis, axis)
        log_prior = dist.Normal(0.0, 1.0).log_prob(z).sum(-1) + 2 * math.log(12 / 240) - math.log(self.classes)
        values = []
        for y in torch.eye(self.classes):
            logits = self.decoder(self.join(z, y))
            rest = nn.functional.softplus(logits).sum(-1)
            values.append(torch.cat([(rows @ logits.T - rest + log_prior).logsumexp(1) for rows in x.split(50)]))
        return torch.stack(values, -1).double()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num-epochs", type=int, default=60)
    parser.add_argument("--limit", type=int, default=100, help="number of test rows (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("benchmark_output"))
    options = parser.parse_args()
    pyro.set_rng_seed(0)
    titles = "| pair | estimator | mean log p(x) | ± particles | median ESS | not to trust |"
    lines = [titles, "|---|---|---|---|---|---|", *semi_supervised(options), *cevae(options)]
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "pyro_pairs.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def semi_supervised(options: Any) -> list[str]:
    x = torch.from_numpy(datasets.load_digits().data >= 8).float()
    net = SemiSupervised()
    enumerated = config_enumerate(net.guide, "parallel", expand=True)
    fit(net.model, enumerated, x[:1500], num_epochs=options.num_epochs, loss=TraceEnum_ELBO(max_plate_nesting=1))
    test, name = x[1500:][: options.limit], "semi-supervised VAE, digits"
    exact = net.log_joint(test).logsumexp(-1)
    lines = [f"| {name} | exact, by quadrature and enumeration | {exact.mean():.3f} | | | |"]
    found = {
        "importance, label drawn": importance_sampling(net.model, net.guide, test),
        "importance, label summed out": importance_sampling(net.model, enumerated, test),
        "adaptive, label summed out": adaptive_importance_sampling(net.model, enumerated, test),
        "annealed, label summed out": annealed_importance_sampling(net.model, enumerated, test, num_temperatures=100),
    }
    for estimator, e in found.items():
        z = ((e.log_evidence - exact).abs() / e.standard_error)[~e.doubtful]
        note = f", largest error {z.max():.1f} standard errors" if len(z) else ""
        lines.append(row(name, estimator + note, e))
    return lines


def cevae(options: Any) -> list[str]:
    from pyro.contrib.cevae import CEVAE

    pyro.clear_param_store()
    n = 500 + options.limit
    z = torch.randn(n)
    x = torch.stack([z + torch.randn(n) for _ in range(5)], -1)
    t = torch.bernoulli(torch.sigmoid(2 * z))
    y = torch.bernoulli(torch.sigmoid(t + z))
    net = CEVAE(feature_dim=5, outcome_dist="bernoulli", latent_dim=5, hidden_dim=20, num_layers=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pyro's JIT
        net.fit(x[:500], t[:500], y[:500], num_epochs=options.num_epochs // 2, batch_size=50, log_every=0)
    pair, test = (net.model, net.guide), (x[500:], t[500:], y[500:])
    estimators: dict[str, Callable[..., Evidence]] = {
        "importance": importance_sampling,
        "adaptive": adaptive_importance_sampling,
        "annealed": annealed_importance_sampling,
    }
    lines = [row("CEVAE", name, estimator(*pair, *test)) for name, estimator in estimators.items()]
    gap, error = sandwich(*pair, *test, num_temperatures=100).mean
    return [*lines, f"| CEVAE | annealed, simulated: upper − lower bound {gap:+.3f} ± {error:.3f} | | | | |"]


def row(pair: str, estimator: str, e: Evidence) -> str:
    mean, _, error = e.mean
    ess = f"{e.effective_sample_size.median():.0f} of {e.num_particles}"
    return f"| {pair} | {estimator} | {mean:.3f} | {error:.3f} | {ess} | {int(e.doubtful.sum())} of {len(e.doubtful)} |"


if __name__ == "__main__":
    main()
