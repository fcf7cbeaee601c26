"""`Pair`: what a model and its guide are, found by looking at them once, quietly.

Everything here that takes a (model, guide) pair asks this one description of it: which sites there are and in which
roles, which plate holds the data points, which arguments have a row for each of them, which parameters and modules take
part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_vae.arguments import refuse_unusual
from pyro_vae.pairs.arrays import as_tensor, device_of, each, unless_on_disk
from pyro_vae.pairs.checks import check_function, check_latents, check_plate, check_roles, check_sites
from pyro_vae.pairs.layout import Layout
from pyro_vae.pairs.look import Look, look
from pyro_vae.pairs.parameters import Participants, participants
from pyro_vae.pairs.rows import WINDOW, Rows, find_rows
from pyro_vae.pairs.sites import enumerates, find_sites, is_inside, sample_sites
from pyro_vae.pairs.vectorized import check_vectorized

__all__ = ["Pair"]


class Pair:
    """A model and its guide with their arguments, looked at once.

    A look runs both, on a few rows where these can be told apart, without gradients, in evaluation mode, and changes
    neither random states nor modes, objects, Pyro's parameter store or its validation setting. Only a guide that sets
    itself up on its first run (an autoguide, `pyro.param` with an initial value of the data's size) is set up, by a run
    on all rows, exactly as the first step of `pyro.infer.SVI` on these arguments would set it up.

    Args:
        model: a Pyro model.
        guide: its guide.
        args: what both are called with.
        kwargs: what both are called with.
        plate: name of the plate of data points; None takes all data as one point, N = 1.
        cut: whether the arguments may be cut into rows; False looks at all of them at once, as at a mini-batch.

    Attributes:
        model, guide, plate: as given.
        args, kwargs: as given, with NumPy arrays as tensors.
        look: traces of guide and model.
        sites: {name: `Site`}.
        rows: how to run on some of the rows.
        latents: names of the latent sites of the model.
        summed: those of them that the guide lacks, and that are marked for enumeration: they are summed out.
        enumerated: those of them that the guide has and that are marked for enumeration.

    Raises:
        TypeError: something that cannot be called.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
        >>> pair = Pair(model, guide, (torch.zeros(10),))
        >>> pair.sites["z"].role, pair.sites["x"].role, pair.rows.num_points
        ('latent', 'observed', 10)
    """

    def __init__(
        self,
        model: Callable,
        guide: Callable,
        args: tuple = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        plate: str | None = "data",
        cut: bool = True,
    ) -> None:
        check_function("model", model)
        check_function("guide", guide)
        self.model, self.guide, self.plate = model, guide, plate
        self._device = device_of(model, guide, args, kwargs or {})
        self._args, self._kwargs = each(unless_on_disk, args, kwargs or {}, self._device)
        try:
            self.look, self.rows = self._find(cut)
        except Exception as error:
            _refuse_unusual(self, error)
            raise
        _check_log_probs(self)
        self.sites = find_sites(self.look.guide, self.look.model)
        drawn, own = (self._latents(trace) for trace in self.look[:2])
        self.latents = set(own)
        self.summed = {name for name in own.keys() - drawn.keys() if enumerates(own[name])}
        self.enumerated = {name for name in own.keys() & drawn.keys() if enumerates(drawn[name])}

    @property
    def args(self) -> tuple:
        return each(as_tensor, self._args, self._kwargs, self._device)[0]

    @property
    def kwargs(self) -> dict[str, Any]:
        return each(as_tensor, self._args, self._kwargs, self._device)[1]

    @cached_property
    def layout(self) -> Layout:
        """Where data points are among a tensor's dimensions, of a pair that is all inside the plate of these."""
        return self.find_layout()

    def find_layout(self, outside: str = "") -> Layout:
        """Where data points are among a tensor's dimensions, of a pair whose draws can be weighed for each of them.

        Args:
            outside: which sites may be outside of the data plate: none (""), "observed" ones, or "any".

        Raises:
            ValueError: no such plate; a site outside of it; latents that differ between model and guide; a plate that
                subsamples where `plate` is None.
        """
        check_plate(self.look, self.plate)
        check_roles(self.model, self.guide, self.look)
        check_sites(self.look, self.plate, outside=outside)
        layout = Layout(self.look, self.plate, self.rows)
        check_latents(self._latents(self.look.guide), self.latents - self.summed)
        return layout

    def outside(self, trace: poutine.Trace) -> dict[str, dict]:
        """The sites of a trace that are outside of the data plate."""
        return {name: site for name, site in sample_sites(trace).items() if not is_inside(site, self.plate)}

    @staticmethod
    def _latents(trace: poutine.Trace) -> dict[str, dict]:
        return {name: site for name, site in sample_sites(trace).items() if not site["is_observed"]}

    @property
    def has_locals(self) -> bool:
        """Whether the guide draws latents inside of the data plate."""
        drawn = sample_sites(self.look.guide).items()
        return any(is_inside(site, self.plate) for _, site in drawn if not site["is_observed"])

    @cached_property
    def participants(self) -> Participants:
        """Parameters and modules that take part in the log-probabilities of model and guide."""
        return participants(self.model, self.guide, self.args, self.kwargs)

    def check_vectorized(self, layout: Layout | None = None, *, computed: bool = False) -> None:
        """Raises ValueError if many particles at once do not give what each of them gives alone."""
        args, kwargs = self.rows.cut(slice(0, WINDOW))
        subsamples = self.look.subsamples()  # the same in all runs: others would make a difference of their own
        width, pair = (layout or self.layout).width, (self.guide, self.model)
        check_vectorized(pair, args, kwargs, self.look[:2], width, subsamples, computed=computed)

    # -- the look -----------------------------------------------------------------------------------------------------

    def _find(self, cut: bool) -> tuple[Look, Rows]:
        set_up = False

        def run(args: tuple, kwargs: Mapping[str, Any], **options: Any) -> Look:
            nonlocal set_up
            found = look(self.model, self.guide, args, kwargs, **options)
            set_up |= found.set_up
            return found

        for _ in range(2):
            found = None
            if cut and self.plate is not None:
                found = find_rows(run, self._args, self._kwargs, self.plate, self._device)
            if not set_up:
                break
            # as its first call sets it up; what is made for all rows may not be run on a few of them
            look(self.model, self.guide, self.args, self.kwargs, keep=True)
            set_up = False
        if found is not None:
            first, keys = found
            return first, self._rows(0, keys)
        whole = run(self.args, self.kwargs)
        if set_up:
            whole = look(self.model, self.guide, self.args, self.kwargs, keep=True)
        return whole, self._all_rows(whole)

    def _all_rows(self, whole: Look) -> Rows:
        """Rows that have to pass together; only a plate that subsamples by itself can be told which ones to take."""
        if self.plate is None:
            return self._rows(1)
        frame = whole.frame(self.plate)
        if frame is None:
            return self._rows(1)
        if self.plate in whole.subsamples() and self._chooses_rows(whole):
            return self._rows(frame.full_size, fixed=frame.size)
        return self._rows(whole.size(self.plate) or 1)

    def _rows(self, num_points: int, cut_keys: frozenset = frozenset(), fixed: int | None = None) -> Rows:
        return Rows(self._args, self._kwargs, num_points, cut_keys, fixed, self._device)

    def _chooses_rows(self, whole: Look) -> bool:
        """Whether the indices that the data plate draws choose the rows of a pass: then other ones give other
        log-probabilities to the same latents. A plate of a mini-batch may draw indices that nobody uses."""
        frame = whole.frame(self.plate)
        values = {n: s["value"] for trace in whole[:2] for n, s in self._latents(trace).items()}
        ends = torch.arange(frame.size), torch.arange(frame.full_size - frame.size, frame.full_size)
        looks = [
            look(self.model, self.guide, self.args, self.kwargs, values=values, subsamples={self.plate: indices})
            for indices in ends
        ]
        if not all(torch.equal(f.subsamples()[self.plate].cpu(), i) for f, i in zip(looks, ends, strict=True)):
            return False  # they are given, not drawn
        first, last = (found.log_probs[1] for found in looks)
        both = [(first[name], last[name]) for name in first.keys() & last.keys()]
        if any(a is not None and b is not None and not torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in both):
            return True
        # nobody uses them, or the rows are all the same: what is as long as a pass is taken for its rows
        tensors = [a for a in (*self.args, *self.kwargs.values()) if isinstance(a, Tensor) and a.dim()]
        return frame.size not in {len(a) for a in tensors}


def _refuse_unusual(pair: Pair, error: Exception) -> None:
    """Raises an error that says so if one of the arguments is of a kind that hardly any model takes."""
    for i, x in (*enumerate(pair.args), *pair.kwargs.items()):
        refuse_unusual(f"argument {i!r}", x, error)


def _check_log_probs(pair: Pair) -> None:
    for name, log_prob in (item for found in pair.look.log_probs for item in found.items()):
        if log_prob is None:
            _refuse_unusual(pair, RuntimeError(f"there is no log-probability of site {name!r}"))
        elif log_prob.is_complex():
            raise TypeError(
                f"site {name!r}: expected real values, got a log-probability of {log_prob.dtype}. Try "
                "torch.view_as_real(x)."
            )
