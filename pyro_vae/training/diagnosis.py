"""What is wrong with data, with a loss that stopped being finite, or with a scale that collapsed: by site and row."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO
from torch import Tensor
from torch.distributions import Independent, StudentT

from pyro_vae.distributions.protocol import complete, ignores_missing
from pyro_vae.objectives.protocol import annealed
from pyro_vae.pairs.checks import check_roles
from pyro_vae.pairs.look import look
from pyro_vae.pairs.pair import Pair
from pyro_vae.pairs.sites import sample_sites
from pyro_vae.pairs.untouched import Untouched
from pyro_vae.training.data import Batch, Batches
from pyro_vae.training.plates import check_named, warn_of_globals
from pyro_vae.training.rows import check_parameters_of_rows

__all__ = ["check_data", "diagnosis", "look_at", "try_out", "warn_of_collapse", "warn_of_objective"]


def look_at(model: Callable, guide: Callable, batches: Batches, validation: Batches | None, plate: str) -> Pair:
    """Looks at a pair with the first batch; an error of model or guide gets a note on what the data may have to do with
    it. A pair that is refused is left as it was: what it set up for that batch does not stay."""
    batch = batches.first()
    with Untouched(model, guide) as untouched:
        try:
            pair = Pair(model, guide, batch.args, batch.kwargs, plate=plate, cut=False)
            check_roles(model, guide, pair.look)
            check_named(pair)
            _ = pair.participants
        except Exception as error:
            batches.explain(error)
            raise
        check_parameters_of_rows(pair, batch, batches, validation)
        untouched.keep = True
    warn_of_globals(pair, batches, batch.size)
    return pair


def try_out(pair: Pair, batches: Batches) -> None:
    """Runs the pair on the first rows of data other than those that it was looked at with.

    Raises:
        ValueError: it does not take them. Those of a DataLoader cannot be looked at beforehand.
    """
    if not batches.columns:
        return
    batch = batches.first()
    try:
        look(pair.model, pair.guide, batch.args, batch.kwargs)
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        got = ", ".join(str(tuple(x.shape[1:])) for x in (*batch.args, *batch.kwargs.values()))
        refusal = ValueError(
            f"{batches.name}: expected rows that model and guide take as they take those of data, got rows of "
            f"shape {got}. Try data prepared in the same way. The error was: {error}"
        )
        batches.explain(refusal)
        raise refusal from error


def check_data(pair: Pair, batches: Batches) -> None:
    """Raises ValueError for rows that are not finite, and for observed columns with values outside of the support."""
    given = pair.look.model.nodes["_INPUT"]
    arguments = dict(enumerate(given["args"])) | given["kwargs"]
    columns = {key: column for column, key in enumerate(batches.keys)}
    observed = [
        (columns[key], name, site)
        for name, site in sample_sites(pair.look.model).items()
        for key, x in arguments.items()
        if key in columns and site["is_observed"] and x is site["value"]
    ]
    batches.check({column for column, _, site in observed if ignores_missing(site["fn"])}, observed)


def diagnosis(pair: Pair, batch: Batch, step: int, value: Tensor, norm: Tensor) -> str:
    """Says where a loss or gradient stopped being finite, by running the step's traces again."""
    with torch.no_grad(), pyro.validation_enabled(False):
        guide = poutine.trace(pair.guide).get_trace(*batch.args, **batch.kwargs)
        model = poutine.trace(poutine.replay(pair.model, guide)).get_trace(*batch.args, **batch.kwargs)
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
        for name, site in sample_sites(trace).items():
            log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
            event_dim = len(site["fn"].event_shape)
            for what, tensor, right in (("value", site["value"], event_dim), ("log-probability", log_prob, 0)):
                bad = tensor.isinf() if ignores_missing(site["fn"]) else ~torch.isfinite(tensor)
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


def warn_of_collapse(pair: Pair) -> None:
    """Warns of a Normal or Student-t likelihood whose scale has shrunk below a thousandth of the data's spread."""
    sites = sample_sites(look(pair.model, pair.guide, pair.args, pair.kwargs).model)
    for name, site in sites.items():
        elements = complete(site["fn"])
        while isinstance(elements, Independent):
            elements = elements.base_dist
        if not (site["is_observed"] and isinstance(elements, (torch.distributions.Normal, StudentT))):
            continue
        values = site["value"][torch.isfinite(site["value"])]
        spread = values.std() if len(values) > 1 else torch.zeros(())
        small = elements.scale < 1e-3 * spread
        if small.any():
            warnings.warn(
                f"fit: the scale of site {name!r} has collapsed: {small.float().mean():.1%} of it is below a "
                f"thousandth of the data's spread ({spread:.3g}), the smallest {elements.scale.min():.2g}. Its "
                "density, and with it the ELBO, has no largest value there, so that neither says how good the model "
                "is. Try LearnedScale(…) for one scale, smallest=… at the precision of the data, or to leave out "
                "columns that are constant.",
                stacklevel=4,
            )
            return


def warn_of_objective(elbo: ELBO) -> None:
    """Warns of an objective that ended as no bound of log p(x)."""
    objective = annealed(elbo)
    reason = None if objective is None else objective.not_a_bound()
    if reason is not None:
        warnings.warn(
            f"fit ended at {reason}: its losses are no bound of log p(x). Validation losses and evidence are those of "
            "beta = 1 and no capacity.",
            stacklevel=4,
        )
