"""What becomes of a pair: its log-weights, evidence and file against draws of one trace at a time."""

from __future__ import annotations

import math
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from scipy.stats import ks_2samp
from torch import Tensor

import pyro_vae
from pyro_examples.example import Example, train
from pyro_examples.reference import Serial, draw_serially

__all__ = ["RIGHT", "examine"]

RIGHT, REFUSED, WRONG, CRASH = "right", "refused", "wrong", "crash"
LARGEST_Z, SMALLEST_P = 4.5, 1e-4
DRAWS, SERIAL_DRAWS, FEW, TIMES = 400, 600, 10, 12
IN_FILE = 200  # draws, and FEW for each of them where latents of data points are integrated out


def examine(build: Callable[[Path], Example], checkout: Path) -> dict[str, Any]:
    """A record of what each tool gives for a pair."""
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    example = build(checkout)
    pyro.set_rng_seed(1)
    train(example)
    pyro.set_rng_seed(2)
    serial = draw_serially(example, SERIAL_DRAWS)
    weights = torch.stack(serial.drawn).double()
    record: dict[str, Any] = {"serial": _describe(weights), "points": weights.shape[1], "draws": len(weights)}
    plate = None if example.joint else example.plate
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        if example.joint and example.plate is not None:
            record["per point"] = _attempt(lambda: _per_point(example))
        record["draw_particles"] = _attempt(lambda: _draw(example, plate, weights))
        record["importance_sampling"] = _attempt(lambda: _evidence(example, plate, serial))
        record["from_pyro_svi"] = _file(example, serial)
    record["warnings"] = sorted({text[:300] for w in heard if "one at a time" in (text := str(w.message))})
    return record


def _attempt(run: Callable[[], tuple[str, str]]) -> dict[str, str]:
    """The verdict and a note; what the project refuses says what to try."""
    try:
        verdict, note = run()
    except Exception as error:
        note = f"{type(error).__name__}: {error}"
        advised = isinstance(error, (ValueError, TypeError, NotImplementedError)) and "try " in str(error).lower()
        if advised:
            return {"verdict": REFUSED, "note": note}
        return {"verdict": CRASH, "note": f"{note[:300]}\n{''.join(traceback.format_exc().splitlines(True)[-16:])}"}
    return {"verdict": verdict, "note": note}


def _draw(example: Example, plate: str | None, serial: Tensor) -> tuple[str, str]:
    with torch.no_grad():
        particles = pyro_vae.draw_particles(
            example.model, example.guide, *example.args, num_particles=DRAWS, plate=plate, **example.kwargs
        )
    return _same(particles.log_weight.double(), serial)


def _evidence(example: Example, plate: str | None, serial: Serial) -> tuple[str, str]:
    """Estimates with few particles, again and again, against the same of the serial weights: with heavy weights their
    mean over repetitions has errors that can be known, where that of one estimate with many has not."""
    reference = torch.stack(serial.summed or serial.drawn).double()
    groups = reference[: len(reference) // FEW * FEW].unflatten(0, (-1, FEW))
    expected = groups.logsumexp(1).sum(1) - math.log(FEW) * groups.shape[2]

    def estimate(count: int) -> pyro_vae.Evidence:
        options = {"num_particles": count, "plate": plate, "progress": False}
        return pyro_vae.importance_sampling(example.model, example.guide, *example.args, **options, **example.kwargs)

    found = torch.stack([estimate(FEW).log_evidence.sum() for _ in range(TIMES)])
    verdict, note = _same(found[:, None], expected[:, None], distribution=False)
    many = estimate(DRAWS)
    total, error = float(many.log_evidence.sum()), float(many.standard_error.square().sum().sqrt())
    own = reference.logsumexp(0).sum() - math.log(len(reference)) * reference.shape[1]
    return verdict, f"{note}; log p {total:.2f} ± {error:.2f}, serial {float(own):.2f}"


def _per_point(example: Example) -> tuple[str, str]:
    options = {"num_particles": FEW, "plate": example.plate, "progress": False}
    pyro_vae.importance_sampling(example.model, example.guide, *example.args, **options, **example.kwargs)
    return WRONG, "gives numbers for each point, though the points share latents"


def _file(example: Example, serial: Serial) -> dict[str, str]:
    """`from_pyro_svi` with the plate; without it where that is refused and points share latents."""
    first = _attempt(lambda: _tree(example, example.plate, serial))
    if first["verdict"] != REFUSED or not example.joint or example.plate is None:
        return first
    second = _attempt(lambda: _tree(example, None, serial))
    return second | {"note": f"{second['note']} (plate=None; {first['note'].partition('.')[0]})"}


def _tree(example: Example, plate: str | None, serial: Serial) -> tuple[str, str]:
    import arviz as az

    options = {"num_samples": IN_FILE, "num_particles": FEW, "plate": plate, "progress": False}
    tree = pyro_vae.from_pyro_svi(example.model, example.guide, *example.args, **options, **example.kwargs)
    posterior, problems = tree["posterior"], []
    smallest = 1.0
    for name, values in serial.latents.items():
        if name not in posterior:
            problems.append(f"no {name!r} in posterior")
            continue
        drawn = np.asarray(posterior[name])[0]
        own = torch.stack(values).double().numpy()
        same_shape = drawn.shape[1:] == own.shape[1:]
        drawn, own = (
            a.reshape(len(a), -1) if same_shape else a.reshape(len(a), -1).sum(1)[:, None] for a in (drawn, own)
        )
        smallest = min(smallest, *(min(1.0, _ks(a, b) * drawn.shape[1]) for a, b in zip(drawn.T, own.T, strict=True)))
    if smallest < SMALLEST_P:
        problems.append(f"draws differ, p = {smallest:.1g}")
    if serial.latents:
        table = az.summary(tree)
        numbers = sum(int(np.prod(posterior[name].shape[2:])) for name in serial.latents if name in posterior)
        if len(table) < numbers or not np.isfinite(np.asarray(table["mean"], dtype=float)).all():
            problems.append(f"az.summary: {len(table)} rows for {numbers} numbers, or means that are not finite")
    verdict, note = _weights(tree["sample_stats"], serial)
    if problems:
        return WRONG, "; ".join([*problems, note])
    return verdict, note


def _weights(stats: Any, serial: Serial) -> tuple[str, str]:
    """The file's log-weights. Where they have the latents of data points integrated out, they are larger on average,
    and have the same evidence, which is compared where the weights allow it."""
    weights = torch.as_tensor(np.asarray(stats["log_weights"])[0]).double().reshape(IN_FILE, -1)
    expected = torch.stack(serial.drawn).double()
    verdict, note = _same(weights, expected)
    if verdict == RIGHT or expected.shape[1] > 1 or "log_likelihood_error" not in stats:
        return verdict, note
    rise = float(weights.mean() - expected[expected.isfinite()].mean())
    error = math.sqrt(float(weights.var() / len(weights) + expected[expected.isfinite()].var() / len(expected)))
    own = expected.logsumexp(0) - math.log(len(expected))
    shares = (2 * expected.logsumexp(0) - (2 * expected).logsumexp(0)).exp()  # effective sample size
    spread = math.hypot(float(stats["log_evidence_error"]), math.sqrt(float(1 / shares)))
    z = (float(stats["log_evidence"]) - float(own)) / spread
    trusted = float(stats["pareto_khat"]) < 0.7 and float(shares) > 20
    note = f"locals integrated out, log p {float(stats['log_evidence']):.2f}, serial {float(own):.2f}"
    right = rise > -LARGEST_Z * error and (abs(z) < LARGEST_Z or not trusted)
    return (RIGHT if right else WRONG), note


def _same(found: Tensor, serial: Tensor, *, distribution: bool = True) -> tuple[str, str]:
    """Whether two samples, (·, N), have the same means, by standard errors, and the same distributions."""
    if serial.shape[1] == 1:
        found = found.sum(1, keepdim=True)
    if not torch.equal(found.isfinite().any(0), serial.isfinite().any(0)):
        return WRONG, "finite in one of the two only"
    finite = [torch.where(a.isfinite(), a, torch.nan) for a in (found, serial)]
    means = [a.nanmean(0) for a in finite]
    spread = [_variance(a) / a.isfinite().sum(0) for a in finite]
    rounding = 2e-5 * means[1].abs() + 1e-4
    z = (means[0] - means[1]) / (spread[0] + spread[1] + rounding.square()).sqrt()
    z_most = float(z.abs().max())
    note = f"z {z_most:.1f}"
    p = 1.0
    if distribution and float(finite[1].nan_to_num(0).std(0).max()) > 1e-3:
        columns = range(found.shape[1])
        p = min(1.0, found.shape[1] * min(_ks(found[:, i].numpy(), serial[:, i].numpy()) for i in columns))
        note += f", p {p:.1g}"
    return (RIGHT if z_most < LARGEST_Z and p > SMALLEST_P else WRONG), note


def _variance(a: Tensor) -> Tensor:
    return (a - a.nanmean(0)).square().nanmean(0)


def _ks(a: Any, b: Any) -> float:
    return float(ks_2samp(a, b).pvalue)


def _describe(weights: Tensor) -> str:
    total = weights.sum(1)
    total = total[total.isfinite()]
    return f"{float(total.mean()):.2f} ± {float(total.std()):.2f}"
