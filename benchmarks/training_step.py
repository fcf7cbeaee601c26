"""Time of one training step: this package against Pyro, torch, NumPyro and pythae, in turns on the same machine.

    pip install jax numpyro pythae matplotlib        # those that are there are measured
    python benchmarks/training_step.py

Every system trains the same VAE (`peers.py`) by Adam on a batch that stays where it is; "fit, whole epoch" also draws
batches, as all the others would have to. Medians of rounds, in milliseconds; the table and a picture go to
benchmark_output/training_step.md and .png.
"""

from __future__ import annotations

import queue
from typing import Any

import peers
import rounds
import torch
from rounds import Run

NETWORKS = ("784-400-50", "784-200-200-50", "conv")
BATCHES = (16, 128, 1024)


def pyro_svi(network: str, batch: int, covariance: str, loss: str = "Trace_ELBO") -> Run:
    import pyro
    import pyro.infer

    pyro.enable_validation(False)
    if covariance == "full":
        vae = peers.ours(network, covariance)
        model, guide = vae.model, vae.guide
    else:
        model, guide = peers.pyro_pair(peers.Networks(network))
    x = peers.images(network, batch)
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), loss=getattr(pyro.infer, loss)())

    def run(n: int) -> None:
        for _ in range(n):
            svi.step(x)

    return run


def pyro_jit(network: str, batch: int, covariance: str) -> Run:
    return pyro_svi(network, batch, covariance, "JitTrace_ELBO")


def pyro_compiled_elbo(network: str, batch: int, covariance: str) -> Run:
    import pyro
    import pyro.infer

    import pyro_vae

    pyro.enable_validation(False)
    model, guide = peers.pyro_pair(peers.Networks(network))
    x = peers.images(network, batch)
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), loss=pyro_vae.CompiledELBO())

    def run(n: int) -> None:
        for _ in range(n):
            svi.step(x)

    run(3)
    return run


def torch_eager(network: str, batch: int, covariance: str, compiled: bool = False) -> Run:
    networks = peers.Networks(network)
    loss = torch.compile(networks.loss) if compiled else networks.loss
    optimizer = torch.optim.Adam(networks.parameters(), lr=1e-3, fused=compiled)
    x = peers.images(network, batch)

    def run(n: int) -> None:
        for _ in range(n):
            optimizer.zero_grad()
            value = loss(x)
            value.backward()
            optimizer.step()

    return run


def torch_compiled(network: str, batch: int, covariance: str) -> Run:
    return torch_eager(network, batch, covariance, compiled=True)


def numpyro_svi(network: str, batch: int, covariance: str, loop: bool = False) -> Run:
    import jax
    import jax.numpy as jnp
    import numpyro

    x = jnp.asarray(peers.images(network, batch).numpy())
    model, guide = peers.numpyro_pair(network, x.shape)
    svi = numpyro.infer.SVI(model, guide, numpyro.optim.Adam(1e-3), numpyro.infer.Trace_ELBO())
    state = svi.init(jax.random.PRNGKey(0), x)
    update = jax.jit(svi.update)
    steps = jax.jit(lambda n, state: jax.lax.fori_loop(0, n, lambda _, s: svi.update(s, x)[0], state))

    def run(n: int) -> None:
        nonlocal state
        if loop:
            state = steps(n, state)
        else:
            for _ in range(n):
                state, _ = update(state, x)
        jax.block_until_ready(state)

    return run


def numpyro_loop(network: str, batch: int, covariance: str) -> Run:
    return numpyro_svi(network, batch, covariance, loop=True)


def pythae_step(network: str, batch: int, covariance: str) -> Run:
    model = peers.pythae_model(network)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    x = {"data": peers.images(network, batch)}

    def run(n: int) -> None:
        for _ in range(n):
            optimizer.zero_grad()
            loss = model(x).loss
            loss.backward()
            optimizer.step()

    return run


def ours_step(network: str, batch: int, covariance: str) -> Run:
    from pyro.infer import Trace_ELBO

    from pyro_vae.compiled.elbo import CompiledELBO
    from pyro_vae.pairs.pair import Pair
    from pyro_vae.training.data import Batches
    from pyro_vae.training.parameters import Weights
    from pyro_vae.training.steps import Steps

    vae = peers.ours(network, covariance)
    batches = Batches(peers.images(network, batch), batch)
    one = next(iter(batches))
    pair = Pair(vae.model, vae.guide, one.inputs, cut=False)
    weights = Weights(*pair.participants)
    optimizer = torch.optim.Adam(weights.parameters, lr=1e-3, fused=True)  # as in `fit`
    steps = Steps(pair, weights, batches, Trace_ELBO(), optimizer, None, CompiledELBO())
    steps.begin_epoch()

    def run(n: int) -> None:
        for _ in range(n):
            steps(one)

    run(3)
    return run


def ours_fit(network: str, batch: int, covariance: str, steps: int = 100) -> Run:
    """`fit` itself, which waits after every epoch: repetitions are steps, in epochs of a hundred."""
    from pyro_vae import fit

    vae, x = peers.ours(network, covariance), peers.images(network, steps * batch)
    asked, done = queue.Queue(), queue.Queue()

    class Turn:
        """A learning-rate scheduler that does nothing but wait."""

        def step(self) -> None:
            done.put(None)
            asked.get()

    def main() -> None:
        asked.get()
        options: dict[str, Any] = {"num_epochs": 10**6, "batch_size": batch, "scheduler": lambda _: Turn()}
        fit(vae.model, vae.guide, x, compile=True, progress=False, **options)

    def run(n: int) -> None:
        for _ in range(n):
            asked.put(None)
            done.get()

    run.steps, run.main = steps, main
    return run


SYSTEMS = {
    "Pyro SVI, Trace_ELBO": pyro_svi,
    "Pyro SVI, JitTrace_ELBO": pyro_jit,
    "Pyro SVI, CompiledELBO": pyro_compiled_elbo,
    "torch eager, Adam": torch_eager,
    "torch compiled, fused Adam": torch_compiled,
    "NumPyro, jit(update)": numpyro_svi,
    "NumPyro, fori_loop": numpyro_loop,
    "pythae": pythae_step,
    "pyro_vae, step": ours_step,
    "pyro_vae, fit's epoch": ours_fit,
}
OURS = "pyro_vae, step"
FULL = ["Pyro SVI, Trace_ELBO", "pyro_vae, step"]


def table(results: dict[tuple[str, int], dict[str, dict]], systems: list[str]) -> list[str]:
    """Milliseconds, and in brackets ours as a share of them."""
    lines = ["| | " + " | ".join(f"{n}, {b}" for n, b in results) + " |", "|---" * (len(results) + 1) + "|"]
    for system in systems:
        cells = []
        for found in results.values():
            own, here = found.get(OURS, {}), found.get(system, {})
            if "seconds" not in here:
                cells.append("not installed" if "missing" in here else "–")
                continue
            cell = f"{here['seconds'] * 1e3:.2f}"
            cells.append(cell if system == OURS else f"{cell} ({own['seconds'] / here['seconds']:.2f})")
        lines.append(f"| {system} | " + " | ".join(cells) + " |")
    return lines


def picture(results: dict[tuple[str, int], dict[str, dict]], path: Any) -> None:
    """Bars, one panel for each network and batch size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = list(dict.fromkeys(n for n, _ in results))
    columns = list(dict.fromkeys(b for _, b in results))
    figure, axes = plt.subplots(
        len(rows), len(columns), figsize=(4 * len(columns), 2.6 * len(rows)), squeeze=False, layout="constrained"
    )
    for (network, batch), found in results.items():
        ax = axes[rows.index(network)][columns.index(batch)]
        names = [name for name in found if "seconds" in found[name]]
        colors = ["tab:orange" if name.startswith("pyro_vae") else "tab:blue" for name in names]
        ax.barh(names, [found[name]["seconds"] * 1e3 for name in names], color=colors)
        ax.invert_yaxis()
        ax.set_title(f"{network}, batch {batch}", fontsize=9)
        ax.tick_params(labelsize=7, labelleft=batch == columns[0])
        ax.spines[["top", "right"]].set_visible(False)
        if network == rows[-1]:
            ax.set_xlabel("ms per step", fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = rounds.arguments(__doc__)
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS))
    options = parser.parse_args()
    timing = {"threads": options.threads, "rounds": options.rounds, "seconds": options.seconds}
    diagonal, full = {}, {}
    for network in options.networks:
        for batch in options.batches:
            config = {"network": network, "batch": batch, "covariance": "diagonal"}
            diagonal[network, batch] = rounds.measure(__file__, options.systems, config, **timing)
            print("\n".join(table({(network, batch): diagonal[network, batch]}, options.systems)), flush=True)
            if network != "conv":
                pair = [s for s in FULL if s in options.systems]
                both = rounds.measure(__file__, pair, config | {"covariance": "full"}, **timing)
                full[network, batch] = {f"{name}, full covariance": found for name, found in both.items()}
                own = full[network, batch].get(f"{OURS}, full covariance")
                if own:
                    full[network, batch][OURS] = diagonal[network, batch][OURS]
                    ratio = own["seconds"] / diagonal[network, batch][OURS]["seconds"]
                    print(f"full / diagonal covariance: {ratio:.2f}", flush=True)
    lines = [
        f"{rounds.machine(options.threads)}. Median of {options.rounds} rounds in turns; milliseconds per step, in "
        "brackets what this package's step takes of it.\n",
        *table(diagonal, options.systems),
        "\nFull covariance, and in brackets the diagonal one's share of it:\n",
        *table(full, [f"{s}, full covariance" for s in FULL]),
    ]
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "training_step.md").write_text("\n".join(lines) + "\n")
    picture(diagonal, options.output / "training_step.png")


if __name__ == "__main__":
    rounds.worker(SYSTEMS)
    main()
