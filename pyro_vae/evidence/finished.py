"""Results of rows that are done, kept in a file, so that hours of evidence can be interrupted and go on.

A row is known by its values, in whatever order and call it comes: by a hash of its bytes in all arguments that have
rows, and by how often it came before, as twins have draws of their own. Where no argument has rows, it is known by its
place. Each pass draws from a seed of its own, made from that of the file and the rows in it, so that an estimate that
was interrupted ends as it would have ended.

Weights and code cannot be compared. But what they do can be: some rows are kept in the file, with the log-weight of a
draw for each of them, which has to come out again.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor

from pyro_vae.checkpoint.container import read, write
from pyro_vae.checkpoint.held import hold
from pyro_vae.checkpoint.plain import bytes_of
from pyro_vae.pairs.arrays import slices
from pyro_vae.pairs.modes import fork_random_state
from pyro_vae.pairs.seeds import from_seed
from pyro_vae.particles.sampler import ParticleSampler
from pyro_vae.ranks import Ranks

__all__ = ["Finished", "fingerprint"]

SECONDS_BETWEEN = 10.0  # writes, but for the first and the last one
KEY = 16  # bytes
RESULTS = 5  # numbers of a row
PROBED, PROBED_BYTES = 16, 2**23  # rows whose log-weights are kept, at most
TOLERANCE = {"rtol": 1e-6, "atol": 1e-3}  # of log-weights: what another processor rounds otherwise
ENTRIES = {"arguments", "seed", "keys", "results", "probe"}


class Finished:
    """What is known of an estimate, and the file that it is kept in.

    Args:
        path: of the file; None keeps nothing.
        arguments: of the estimate, plain values by name, which have to be the same when it goes on.
        sampler: of the pair, with the first rows.
        ranks: that share out the rows; the first of them writes.
        several: whether rows come in several portions.

    Raises:
        ValueError: the file is of other arguments, of another model or guide, or none of these. It is not changed then.
    """

    def __init__(
        self,
        path: str | Path | None,
        arguments: Mapping[str, Any],
        sampler: ParticleSampler,
        ranks: Ranks,
        several: bool = False,
    ) -> None:
        self.path, self.ranks = None if path is None else Path(path).absolute(), ranks
        self.arguments, self.sampler, self.several = dict(arguments), sampler, several
        self._written, self._count = -math.inf, 0
        self._seen: Counter[bytes] = Counter()
        self._order = np.empty(0, f"S{KEY}"), np.empty(0, int)  # keys that are known from the start, and their places
        self._known = torch.zeros(0, RESULTS, dtype=torch.double)  # what is known of these
        self._parts: list[tuple[np.ndarray, Tensor]] = []  # keys and results of these and of new ones
        self._held = ExitStack()
        if self.path is None:
            return
        try:
            saved = ranks.first_does(self._open)
            if saved is None:
                self._seed = ranks.from_first(int(torch.randint(2**62, ())))
                self._probe = _kept_rows(sampler)
                self._probe["log_weight"] = _log_weight(sampler, self._probe)
            else:
                self._go_on_from(saved)
            ranks.first_does(lambda: write(self._entries(), self.path, "evidence", trial=True))
        except BaseException:
            self._held.close()
            raise

    def __enter__(self) -> Finished:
        return self

    def __exit__(self, *error: Any) -> None:
        with self._held:
            self._write()  # also what was done before an error, or before somebody interrupted it

    # -- rows ---------------------------------------------------------------------------------------------------------

    def complete(
        self,
        rows: list[slice],
        start: int,
        estimate: Callable[[slice], Tensor],
        skip: Callable[[int], Any] = lambda _: None,
    ) -> Tensor:
        """Results of all rows at hand, (N, 5), of which those that are not known are estimated.

        Args:
            rows: of the passes that all of them would take.
            start: how many rows came before those at hand.
            estimate: slice of rows -> results (n, 5).
            skip: told how many rows are known.
        """
        keys = self._keys_of_rows(start)
        place = np.searchsorted(self._order[0], keys).clip(max=max(0, len(self._order[0]) - 1))
        done = torch.from_numpy(self._order[0][place] == keys if len(self._order[0]) else np.zeros(len(keys), bool))
        found = torch.full((len(keys), RESULTS), math.nan, dtype=torch.double)
        found[done] = self._known[self._order[1][place[done.numpy()]]]
        left = (~done).nonzero().flatten()
        skip(len(keys) - len(left))
        if not len(left):
            return found
        if self.sampler.rows.separable:
            parts = left.split(size := rows[0].stop - rows[0].start)
            passes = [(slice(i * size, i * size + len(places)), places) for i, places in enumerate(parts)]
            with self.sampler.rows.only(left):
                self._estimate(passes, found, keys, estimate)
        else:
            passes = [(r, torch.arange(r.start, r.stop)) for r in rows if not done[r].all()]
            self._estimate(passes, found, keys, estimate)
        return found

    def _estimate(
        self, passes: list[tuple[slice, Tensor]], found: Tensor, keys: np.ndarray, estimate: Callable[[slice], Tensor]
    ) -> None:
        def run(one: tuple[slice, Tensor]) -> Tensor:
            with from_seed(self._seed, keys[one[1].numpy()].tobytes()):
                return estimate(one[0]).cpu()

        for (_, places), results in self.ranks.in_turns(passes, run):
            found[places] = results
            self._parts.append((keys[places.numpy()], results))
            if time.monotonic() - self._written >= SECONDS_BETWEEN:
                self._write()

    def _keys_of_rows(self, start: int) -> np.ndarray:
        """What the rows at hand are known by, (N,), of `KEY` bytes each."""
        keys = np.fromiter(_hashes(self.sampler, start), f"S{KEY}", self.sampler.num_points)
        order = keys.argsort(kind="stable")
        first = np.flatnonzero(np.append(True, keys[order][1:] != keys[order][:-1]))  # of each that are the same
        times = np.empty(len(keys), int)  # that a key came before
        times[order] = np.arange(len(keys)) - np.repeat(first, np.diff(np.append(first, len(keys))))
        if self.several:
            names = keys.tolist()
            times += [self._seen[name] for name in names]
            self._seen.update(names)
        for twin in np.flatnonzero(times):
            keys[twin] = _hash(keys[twin].item(), int(times[twin]))
        return keys

    # -- file ---------------------------------------------------------------------------------------------------------

    def _write(self) -> None:
        """Writes all results, if there are new ones."""
        if len(self._parts) == self._count or not self.ranks.is_first:
            return
        write(self._entries(), self.path, "evidence")
        self._written, self._count = time.monotonic(), len(self._parts)

    def _entries(self) -> dict[str, Any]:
        keys = [keys for keys, _ in self._parts] or [np.empty(0, f"S{KEY}")]
        results = [results for _, results in self._parts] or [self._known]
        if len(keys) > 1:
            self._parts = [(np.concatenate(keys), torch.cat(results))]
            return self._entries()
        return {
            "arguments": self.arguments,
            "seed": self._seed,
            "keys": torch.from_numpy(keys[0].view(np.uint8).reshape(-1, KEY)),
            "results": results[0],
            "probe": self._probe,
        }

    def _open(self) -> Any:
        """Holds the file; what is in it, or None."""
        self._held.enter_context(hold(self.path))
        try:
            return read(self.path, "evidence") if self.path.exists() else None
        except ValueError as error:
            raise ValueError(f"checkpoint: {error}") from error

    def _go_on_from(self, saved: Any) -> None:
        if not (isinstance(saved, dict) and saved.keys() == ENTRIES):
            raise ValueError(f"checkpoint: {self.path} has not what an estimate of evidence writes. Try another name.")
        was, now = saved["arguments"], self.arguments
        differ = sorted(name for name in was.keys() | now.keys() if was.get(name) != now.get(name))
        if differ:
            written, given = (", ".join(f"{name}={values.get(name)!r}" for name in differ) for values in (was, now))
            raise ValueError(
                f"checkpoint: {self.path} was written with {written}; this call has {given}. Try the same arguments, "
                "or another file."
            )
        self._seed, self._probe = saved["seed"], saved["probe"]
        keys, self._known = saved["keys"].numpy().reshape(-1).view(f"S{KEY}"), saved["results"]
        self._parts, self._count = [(keys, self._known)], 1
        order = keys.argsort()
        self._order = keys[order], order
        try:
            again = _log_weight(self.sampler, self._probe)
            same = torch.allclose(again, self._probe["log_weight"], **TOLERANCE, equal_nan=True)
        except (RuntimeError, TypeError, ValueError, KeyError, IndexError):  # rows that this pair does not take
            same = False
        if not same:
            raise ValueError(
                f"checkpoint: {self.path} is of another model or guide, or of other weights: the rows that it keeps "
                "have other log-weights now. Try the model and guide that it was written with, or another file."
            )


def fingerprint(sampler: ParticleSampler) -> list[str]:
    """Digests of some rows, and of a log-weight of each, which tell other data, models and weights apart."""
    probe = _kept_rows(sampler)
    rows = probe["rows"] or {}
    return [_hash(*map(bytes_of, values)).hex() for values in (rows.values(), [_log_weight(sampler, probe)])]


def _hash(*parts: Any) -> bytes:
    found = blake2b(digest_size=KEY)
    for part in parts:
        found.update(part if isinstance(part, bytes) else repr(part).encode())
    return found.digest()


def _hashes(sampler: ParticleSampler, start: int) -> Iterator[bytes]:
    """A hash of each row at hand."""
    rows = sampler.rows
    if not rows.separable:
        shared = _hash(*(bytes_of(a) for a in (*rows.args, *rows.kwargs.values()) if isinstance(a, Tensor)))
        yield from (_hash(shared, start + n) for n in range(sampler.num_points))
        return
    one = _own(sampler, slice(0, 1))
    names = [f"{key} {tuple(x.shape[1:])} {x.dtype}" for key, x in one.items()]
    for some in slices([x.expand(sampler.num_points, *x.shape[1:]) for x in one.values()]):
        columns = [x.cpu() for x in _own(sampler, some).values()]
        for i in range(some.stop - some.start):
            yield _hash(*names, *(bytes_of(x[i]) for x in columns))


def _own(sampler: ParticleSampler, rows: slice) -> dict[Any, Tensor]:
    """The arguments that have rows, cut to some of them."""
    args, kwargs = sampler.rows.cut(rows)
    return {key: x for key, x in (*enumerate(args), *kwargs.items()) if key in sampler.rows.cut_keys}


def _kept_rows(sampler: ParticleSampler) -> dict[str, Any]:
    """Some rows from all over the data, to look at the pair with again."""
    if not sampler.rows.separable:
        return {"rows": None}
    weight = sum(x.nbytes for x in _own(sampler, slice(0, 1)).values())
    count = max(1, min(PROBED, sampler.num_points, PROBED_BYTES // max(1, weight)))
    with sampler.rows.only(torch.linspace(0, sampler.num_points - 1, count).round().long()):
        return {"rows": {key: x.detach().cpu().clone() for key, x in _own(sampler, slice(0, count)).items()}}


def _log_weight(sampler: ParticleSampler, probe: Mapping[str, Any]) -> Tensor:
    """The log-weight of a draw for each of the rows that are kept, on the same random numbers each time."""
    own = probe["rows"]
    with fork_random_state():
        pyro.set_rng_seed(0)
        if own is None:
            return sampler.log_weight(1, sampler.chunks(1)[0][0], check=False).cpu()
        args, kwargs = sampler.rows.cut(slice(0, 1))
        device = sampler.layout.device
        args = tuple(own[i].to(device) if i in own else a for i, a in enumerate(args))
        kwargs = {name: own[name].to(device) if name in own else a for name, a in kwargs.items()}
        with sampler.rows.using(args, kwargs):
            return sampler.log_weight(1, slice(0, len(next(iter(own.values())))), check=False).cpu()
