"""The plate of data points in a fit: how many of them a batch counts for, and what is outside of it."""

from __future__ import annotations

from typing import Any

import torch

from pyro_vae.pairs.libraries import warn
from pyro_vae.pairs.pair import Pair
from pyro_vae.pairs.sites import is_inside, plate_frames, sample_sites
from pyro_vae.training.data import Batches

__all__ = ["check_named", "data_frame", "full_size", "warn_of_globals"]


def check_named(pair: Pair) -> None:
    """Raises ValueError where there is no plate of the name that was asked for; nobody may have asked for "data"."""
    if pair.plate != "data" and pair.look.frame(pair.plate) is None:
        found = sorted({f.name for f in plate_frames(*pair.look[:2])})
        raise ValueError(
            f"fit: plate: expected one of the plates in model and guide, {found or 'none'}, got {pair.plate!r}. Try "
            + (f"plate={found[0]!r}." if found else f"with pyro.plate({pair.plate!r}, len(x)).")
        )


def data_frame(pair: Pair, size: int) -> Any:
    """The plate of data points as one of its sites saw it in a batch of `size` rows, or None.

    Where none has the name that was given, it is the one of that size which all observed sites are in.
    """
    named = pair.look.frame(pair.plate)
    if named is not None:
        return named
    observed = [site for site in sample_sites(pair.look.model).values() if site["is_observed"]]
    frames = [f for f in plate_frames(pair.look.model) if size in (f.size, f.full_size)]
    return next((f for f in frames if all(is_inside(site, f.name) for site in observed)), None)


def full_size(pair: Pair, size: int) -> int | None:
    """The size of a data plate that scales the rows of a batch up to more of them; None: it follows its rows."""
    frame = data_frame(pair, size)
    if frame is None or frame.full_size is None or frame.full_size <= 0:
        return None
    sizes = {f.full_size for f in plate_frames(*pair.look[:2]) if f.name == frame.name}
    return None if sizes == {size} else max(sizes)


def warn_of_globals(pair: Pair, batches: Batches, size: int) -> None:
    """Warns of latents, data and factors that belong to all rows, where each batch counts as all rows.

    The loss of a batch of B rows holds the KL term of a global latent once. N/B batches hold it N/B times, next to a
    likelihood that each row enters once: its posterior comes out as wide as from B rows. In several ranks, each of
    which has a share of the rows of a batch, the batch itself would hold it once for each rank.

    Raises:
        ValueError: there are such sites, and several ranks.

    Args:
        pair: looked at with a batch.
        batches: of the training data.
        size: of that batch.
    """
    frame = data_frame(pair, size)
    if frame is None or batches.num_rows is None or not size < batches.num_rows or full_size(pair, size) is not None:
        return
    sites = sample_sites(pair.look.guide) | sample_sites(pair.look.model)
    inside = [site for site in sites.values() if is_inside(site, frame.name)]
    scales = {_scale(site) for site in inside if site["is_observed"]}
    found = [
        name
        for name, site in sites.items()
        if not is_inside(site, frame.name)
        and size not in site["value"].shape  # rows without a plate
        and _scale(site) in scales  # else poutine.scale takes care of it
    ]
    if found:
        n, named = batches.num_rows, ", ".join(map(repr, found[:3])) + (", …" if len(found) > 3 else "")
        if batches.ranks.several:
            raise ValueError(
                f"fit: expected all sites inside of plate {frame.name!r}, or a plate that scales a batch up to all {n} "
                f"rows, in {batches.ranks.size} ranks; got {named} outside of it, which would count once for each "
                f"rank. Try pyro.plate({frame.name!r}, {n}, subsample_size=len(x)) in model and guide, or a VAE's "
                "total= by functools.partial."
            )
        warn(
            f"fit: expected all sites inside of plate {frame.name!r}, or a plate that scales a batch up to all {n} "
            f"rows; got {named} outside of it, in batches of {size} rows that each count as all data: what is outside "
            f"(a prior, data of its own, a factor) weighs {n / size:.3g} times too much. Try "
            f"pyro.plate({frame.name!r}, {n}, subsample_size=len(x)) in model and guide, a VAE's total={n} by "
            f"functools.partial, or batch_size={n}."
        )


def _scale(site: dict) -> float:
    return round(float(torch.as_tensor(site["scale"]).double().mean()), 9)
