"""Where a loss or gradient stopped being finite."""

from __future__ import annotations

from typing import Any

import pyro
import torch
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_vae.pairs.checks import ignores_missing
from pyro_vae.training.data import Batch
from pyro_vae.training.parameters import Pair

__all__ = ["diagnosis"]


def diagnosis(pair: Pair, batch: Batch, step: int, value: Tensor, norm: Tensor) -> str:
    """Where a loss or gradient stopped being finite, found by running the step's traces again."""
    with torch.no_grad(), pyro.validation_enabled(False):
        guide, model = pair.run(batch)
        found = _first_bad_site(pair, batch, (("guide", guide), ("model", model)))
    what = f"loss {value.item():.4g}"
    if torch.isfinite(value):
        what += f", but a gradient of norm {norm.item():.4g}"
    return (
        f"fit stopped before step {step}: {what}{found or ''}. The weights are the last finite ones. Try a lower "
        "learning_rate, clip_norm=10.0, or data scaled to about unit size."
    )


def _first_bad_site(pair: Pair, batch: Batch, traces: Any) -> str | None:
    for where, trace in traces:
        for name, site in trace.nodes.items():
            if site["type"] != "sample" or site_is_subsample(site):
                continue
            log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
            event_dim = len(site["fn"].event_shape)
            for what, tensor, right in (("value", site["value"], event_dim), ("log-probability", log_prob, 0)):
                bad = tensor.isinf() if ignores_missing(site) else ~torch.isfinite(tensor)
                if not bad.any():
                    continue
                axes = [f.dim - right + tensor.dim() for f in site["cond_indep_stack"] if f.name == pair.plate]
                text = f", from the {what} of site {name!r} of the {where}"
                if axes and axes[0] >= 0 and tensor.shape[axes[0]] == batch.size:
                    rows = bad.movedim(axes[0], 0).reshape(batch.size, -1).any(1).nonzero().flatten()
                    first = int(rows[0]) if batch.rows is None else int(batch.rows[int(rows[0])])
                    of = "its batch" if batch.rows is None else "the data"
                    text += f" ({len(rows)} of {batch.size} rows of the batch, the first is row {first} of {of})"
                return text
    return None
