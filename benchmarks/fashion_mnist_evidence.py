"""Evidence of Fashion-MNIST images by three methods, on the VAE of fashion_mnist_model.py (run that first).

    python benchmarks/fashion_mnist_evidence.py

Plain importance sampling with 5000 particles is what published figures use. Adaptive importance sampling gets as many
calls of the decoder; a gradient counts as three. Annealing gets as many as it wants. On data simulated from the model
the last two are run from both sides. The tables go to benchmark_output/fashion_mnist_evidence.md as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pyro
import torch
from fashion_mnist_model import load_images, parser, trained_vae

from pyro_vae import (
    VAE,
    adaptive_importance_sampling,
    annealed_importance_sampling,
    compare,
    draw_particles,
    importance_sampling,
    sandwich,
)

BUDGET = 5000  # calls of the decoder per image


@contextmanager
def decoder_calls(vae: VAE) -> Iterator[SimpleNamespace]:
    """Counts rows that pass the decoder; a row with gradient counts three times, for its way back."""
    counter = SimpleNamespace(rows=0)

    def count(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        z = inputs[0]
        counter.rows += z.numel() // z.shape[-1] * (3 if z.requires_grad else 1)

    handle = vae.likelihood.register_forward_pre_hook(count)
    try:
        yield counter
    finally:
        handle.remove()


def main() -> None:
    options = parser(__doc__.split("\n")[0])
    options.add_argument("--limit", type=int, default=200, help="number of test images (default: %(default)s)")
    options.add_argument("--num-simulated", type=int, default=100)
    options.add_argument("--num-temperatures", type=int, default=1000, help="of the long annealing from the guide")
    options.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = options.parse_args()
    torch.set_num_threads(options.threads)
    vae, test = trained_vae(options.output, options.data), load_images(options.data)[1][: options.limit]
    lines = real_images(vae, test, options) + simulated_images(vae, test[: options.num_simulated], options)
    path = options.output / "fashion_mnist_evidence.md"
    path.write_text("\n".join(lines) + "\n")
    print("\n".join(lines), f"\nwritten to {path}")


def real_images(vae: VAE, x: torch.Tensor, options: Any) -> list[str]:
    fit_calls = 8 * 64 * 3 + 300 + 2  # of the adaptive method, at 50 latents
    methods: dict[str, tuple[Callable, dict[str, Any]]] = {
        "importance, 5000": (importance_sampling, {"num_particles": BUDGET}),
        "importance, 5000, jackknife": (importance_sampling, {"num_particles": BUDGET, "correction": "jackknife"}),
        "importance, 5000, Pareto smoothed": (importance_sampling, {"num_particles": BUDGET, "smooth": True}),
        "adaptive, same calls": (adaptive_importance_sampling, {"num_particles": BUDGET - fit_calls}),
        "annealed from the adapted, 32 × 100": (
            annealed_importance_sampling,
            {"start": "adapted", "num_temperatures": 100},
        ),
        f"annealed from the guide, 16 × {options.num_temperatures}": (
            annealed_importance_sampling,
            {"num_temperatures": options.num_temperatures, "num_particles": 16},
        ),
    }
    with torch.no_grad():
        elbo = draw_particles(vae.model, vae.guide, x, num_particles=100).log_weight.mean().item()
    lines = [
        f"{len(x)} test images, ELBO {elbo:.2f} nats",
        "",
        "| method | mean log p(x) | ± particles | median ESS | median k-hat | decoder calls per image |",
        "|---|---|---|---|---|---|",
    ]
    found = {}
    for name, (method, settings) in methods.items():
        pyro.set_rng_seed(options.seed)
        with decoder_calls(vae) as counter:
            e = found[name] = method(vae.model, vae.guide, x, **settings)
        calls = counter.rows / len(x)
        mean, _, error = e.mean
        ess, khat = e.effective_sample_size.median(), e.pareto_khat.median()
        lines.append(
            f"| {name} | {mean:.2f} | {error:.3f} | {ess:.0f} of {e.num_particles} | {khat:.2f} | {calls:.0f} |"
        )
        print(lines[-1], flush=True)
    print(compare(found))
    return lines


def simulated_images(vae: VAE, x: torch.Tensor, options: Any) -> list[str]:
    lines = [
        "",
        f"{len(x)} images simulated from the model: lower and upper bound, and their gap",
        "",
        "| method | lower | upper | gap |",
        "|---|---|---|---|",
    ]
    methods = {
        "importance, 5000": {"estimator": importance_sampling},
        "adaptive, 3000": {"estimator": adaptive_importance_sampling},
        "annealed from the adapted, 32 × 100": {"start": "adapted", "num_temperatures": 100},
        "annealed from the prior, 32 × 200": {"start": "prior", "num_temperatures": 200},
    }
    for name, settings in methods.items():
        pyro.set_rng_seed(options.seed)
        s = sandwich(vae.model, vae.guide, x, **settings)
        gap, error = s.mean
        lines.append(f"| {name} | {s.lower.mean[0]:.2f} | {s.upper.mean[0]:.2f} | {gap:.3f} ± {error:.3f} |")
        print(lines[-1], flush=True)
    return lines


if __name__ == "__main__":
    main()
