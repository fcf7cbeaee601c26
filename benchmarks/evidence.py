"""Speed and memory of log p(x) by importance sampling: this package against Pyro, torch, JAX and pythae, in turns.

    pip install jax numpyro pythae matplotlib        # those that are there are measured
    python benchmarks/evidence.py

Every system estimates log p(x) of 64 images with K draws from the same networks (`peers.py`); the rate is in samples ×
points per second, compilation left out. "matrix products" is what oneDNN takes for the decoder's products alone, with
random inputs, and so the limit of them all. Memory is that of a whole process that does nothing else, as it grows with
K, N and the size of the latent space. Tables and a picture go to benchmark_output/evidence.md and .png.
"""

from __future__ import annotations

import math
from typing import Any

import peers
import rounds
import torch
from rounds import Run
from torch import nn

NETWORKS = ("784-400-50", "784-200-200-50")
POINTS = 64


def pyro_one_by_one(network: str, particles: int, points: int) -> Run:
    """Pyro's own means: vectorized particles under one outer plate, for one data point after the other."""
    import pyro
    from pyro import poutine

    pyro.enable_validation(False)
    model, guide = peers.pyro_pair(peers.Networks(network))
    x = peers.images(network, points)

    def log_evidence(x: torch.Tensor) -> float:
        plate = pyro.plate("particles", particles, dim=-2)
        guide_trace = poutine.trace(plate(guide)).get_trace(x)
        model_trace = poutine.trace(poutine.replay(plate(model), guide_trace)).get_trace(x)
        model_trace.compute_log_prob()
        guide_trace.compute_log_prob()
        log_weight = sum(model_trace.nodes[n]["log_prob"] for n in ("z", "x")) - guide_trace.nodes["z"]["log_prob"]
        return (log_weight.logsumexp(0) - math.log(particles)).item()

    def run(n: int) -> None:
        with torch.no_grad():
            for _ in range(n):
                for i in range(points):
                    log_evidence(x[i : i + 1])

    return run


def torch_eager(network: str, particles: int, points: int) -> Run:
    networks, x = peers.Networks(network), peers.images(network, points)
    at_once = max(1, 2000 // particles)

    def run(n: int) -> None:
        with torch.no_grad():
            for _ in range(n):
                for rows in x.split(at_once):
                    networks.log_weight(rows, particles).logsumexp(0) - math.log(particles)

    return run


def jax_jit(network: str, particles: int, points: int) -> Run:
    import jax
    import jax.numpy as jnp

    encoder, decoder, latent = peers.jax_networks(network)
    keys = jax.random.split(jax.random.PRNGKey(0), 2)
    weights = encoder[0](keys[0], None)[1], decoder[0](keys[1], None)[1]
    x = jnp.asarray(peers.images(network, points).numpy())

    def log_evidence(key: Any, x: Any, weights: Any) -> Any:
        loc, log_scale = jnp.split(encoder[1](weights[0], x[None])[0], 2)
        noise = jax.random.normal(key, (particles, latent))
        z = loc + jnp.exp(log_scale) * noise
        logits = decoder[1](weights[1], z)
        log_likelihood = (x * logits - jax.nn.softplus(logits)).sum(-1)
        log_weight = log_likelihood + (0.5 * noise**2 - 0.5 * z**2 + log_scale).sum(-1)
        return jax.nn.logsumexp(log_weight) - math.log(particles)

    every = jax.jit(lambda key, weights, x: jax.lax.map(
        lambda row: log_evidence(row[0], row[1], weights), (jax.random.split(key, points), x)
    ))  # fmt: skip

    def run(n: int) -> None:
        for i in range(n):
            jax.block_until_ready(every(jax.random.PRNGKey(i), weights, x))

    return run


def pythae_nll(network: str, particles: int, points: int) -> Run:
    model, x = peers.pythae_model(network), peers.images(network, points)

    def run(n: int) -> None:
        with torch.no_grad():
            for _ in range(n):
                model.get_nll(x, n_samples=particles, batch_size=min(particles, 500))

    return run


def ours(network: str, particles: int, points: int) -> Run:
    """`importance_sampling` with compile=True, its kernel kept from one call to the next."""
    from pyro_vae.evidence.collect import collect
    from pyro_vae.evidence.compiled import CompiledLogWeight
    from pyro_vae.evidence.importance import PASSES
    from pyro_vae.particles.sampler import ParticleSampler

    vae, x = peers.ours(network), peers.images(network, points)
    sampler = ParticleSampler(vae.model, vae.guide, (x,))
    kernel = CompiledLogWeight(sampler, generate_code=True)

    def run(n: int) -> None:
        for _ in range(n):
            sampler.check()
            collect(
                sampler, lambda rows: lambda count: kernel(count, rows), particles, method="", progress=False, **PASSES
            )

    return run


def products(network: str, particles: int, points: int) -> Run:
    decoder = [m for m in peers.Networks(network).decoder if isinstance(m, nn.Linear)]
    size = min(2000, particles * points)
    inputs = [torch.randn(size, m.in_features) for m in decoder]

    def run(n: int) -> None:
        with torch.no_grad():
            for _ in range(n * particles * points // size):
                for m, x in zip(decoder, inputs, strict=True):
                    torch.ops.mkldnn._linear_pointwise(x, m.weight, m.bias, "none", [], "")

    return run


def memory(network: str, particles: int, points: int) -> Run:
    """`importance_sampling`, once, in a process of its own."""
    from pyro_vae import importance_sampling

    vae, x = peers.ours(network), peers.images(network, points)

    def run(n: int) -> None:
        importance_sampling(vae.model, vae.guide, x, num_particles=particles, progress=False)

    return run


SYSTEMS = {
    "Pyro, point by point": pyro_one_by_one,
    "torch eager": torch_eager,
    "JAX, jit": jax_jit,
    "pythae, get_nll": pythae_nll,
    "pyro_vae": ours,
    "matrix products": products,
}
OURS = "pyro_vae"
GROWTH = [("784-400-50", k, 100) for k in (500, 5000, 50_000)]
GROWTH += [("784-400-50", 500, n) for n in (1000, 10_000)]
GROWTH += [(f"784-400-{latent}", 500, 100) for latent in (10, 50, 200)]


def main() -> None:
    parser = rounds.arguments(__doc__)
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    parser.add_argument("--particles", nargs="+", type=int, default=(500, 5000))
    options = parser.parse_args()
    timing = {"threads": options.threads, "rounds": options.rounds, "seconds": options.seconds}
    results = {}
    for network in options.networks:
        for particles in options.particles:
            config = {"network": network, "particles": particles, "points": POINTS}
            found = rounds.measure(__file__, list(SYSTEMS), config, **timing)
            results[network, particles] = {
                name: particles * POINTS / r["seconds"] if "seconds" in r else None for name, r in found.items()
            }
            print(network, particles, results[network, particles], flush=True)
    lines = [
        f"{rounds.machine(options.threads)}. Median of {options.rounds} rounds in turns; thousands of samples × points "
        "per second, in brackets how many times as fast this package is.\n",
        "| | " + " | ".join(f"{n}, K = {k}" for n, k in results) + " |",
        "|---" * (len(results) + 1) + "|",
    ]
    for name in SYSTEMS:
        cells = [
            "not installed" if r[name] is None else f"{r[name] / 1e3:.0f} ({r[OURS] / r[name]:.2f})"
            for r in results.values()
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["\n| network | K | N | seconds | peak memory, MiB |", "|---|---|---|---|---|"]
    for network, particles, points in GROWTH:
        config = {"network": network, "particles": particles, "points": points}
        (r,) = rounds.measure(__file__, ["memory"], config, threads=options.threads, rounds=1, seconds=0).values()
        lines.append(f"| {network} | {particles} | {points} | {r['seconds']:.2f} | {r['peak'] / 1024:.0f} |")
        print(lines[-1], flush=True)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "evidence.md").write_text("\n".join(lines) + "\n")
    picture(results, options.output / "evidence.png")


def picture(results: dict[tuple[str, int], dict[str, float | None]], path: Any) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(3.6 * len(results), 2.8), squeeze=False, layout="constrained")
    for ax, ((network, particles), found) in zip(axes[0], results.items(), strict=True):
        names = [name for name, rate in found.items() if rate is not None]
        colors = {OURS: "tab:orange", "matrix products": "lightgray"}
        ax.barh(names, [found[n] / 1e3 for n in names], color=[colors.get(n, "tab:blue") for n in names])
        ax.invert_yaxis()
        ax.set_title(f"{network}, K = {particles}", fontsize=9)
        ax.set_xlabel("thousand samples × points / s", fontsize=8)
        ax.tick_params(labelsize=8, labelleft=ax is axes[0][0])
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    rounds.worker(SYSTEMS | {"memory": memory})
    main()
