r"""`RowGuide`: a guide for the latents of data points, of any shape and support, in any model.

    q(θ, z|x) = q(θ) Π_n q(u_n|x_n, θ) |du_n/dz_n|,    z_n the image of u_n ∈ R^D under the bijections of the supports.

It has no sites but the model's, each with a density at any value: q(u|x) is a chain over sites
(`pyro_vae.guides.chain`), and the model is run up to its last latent to say where each site is
(`pyro_vae.guides.walk`). q(θ), of the latents outside of the plate, is another guide.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_vae.arguments import checked
from pyro_vae.distributions.structure import picklable_state
from pyro_vae.guides.chain import Chain
from pyro_vae.guides.inputs import PlateRows
from pyro_vae.guides.latents import Latents
from pyro_vae.guides.prototype import find_latents
from pyro_vae.guides.summaries import quantiles, sample_posterior
from pyro_vae.guides.walk import Capture, Walk
from pyro_vae.pairs.checks import check_function
from pyro_vae.pairs.modes import evaluation_mode, fork_random_state
from pyro_vae.pairs.threads import one_thread

__all__ = ["RowGuide"]


class RowGuide(nn.Module):
    """Abstract base class: a subclass has `make_chain`, the factors of q(u|x) for the rows of a call.

    The first call runs the model some more times, without changing anything, to find its latents, as Pyro's autoguides
    do.

    Args:
        model: a Pyro model. It should give each call the same latents.
        plate: name of the plate of data points.
        outside: guide of the latents outside of the plate: a class of Pyro's autoguides, an instance of one (or any
            guide of these latents), or None, where they have a guide elsewhere.
        given: names of latents outside of the plate that q(z|x, θ) is conditioned on.
    """

    def __init__(self, model: Callable, *, plate: str, outside: Any, given: Sequence[str]) -> None:
        super().__init__()
        check_function("model", model)
        self._model = (model,)  # in a tuple: its parameters are none of the guide's
        self.plate, self.given = plate, tuple(given)
        self.latents: Latents | None = None
        self._make_outside = outside
        self.outside: Any = None

    @property
    def model(self) -> Callable:
        return self._model[0]

    @property
    def name(self) -> str:
        return type(self).__name__

    @abstractmethod
    def make_chain(self, rows: PlateRows, given: Tensor | None, args: tuple, kwargs: dict[str, Any]) -> Chain:
        """q(u|x) of the rows of a call, as factors.

        Args:
            rows: of the plate.
            given: coordinates of the latents in `given`, (*particles, 1, G); None without any.
            args: of the call.
            kwargs: of the call.
        """

    def set_up(self, args: tuple, kwargs: dict[str, Any]) -> Latents:
        """Finds the latents of the model, on the first call."""
        if self.latents is not None:
            return self.latents
        latents = find_latents(
            *(self.model, args, kwargs, self.plate, self.name),
            outside=self._make_outside is not None,
            given=self.given,
        )
        if latents.outside and isinstance(self._make_outside, type):
            self.outside = self._make_outside(Exposed(self.model, latents.outside))
        elif latents.outside:
            self.outside = self._make_outside
        if self.given and self.outside is None:
            raise ValueError(f"{self.name}: given={list(self.given)} needs a guide for these. Try outside=AutoNormal.")
        self.latents = latents
        return latents

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        latents = self.set_up(args, kwargs)
        self.register()
        with Capture(latents.outside) as capture:
            if self.outside is not None:
                self.outside(*args, **kwargs)
        _check_outside(self, capture.values)
        walk = Walk(
            *(latents, self.plate, capture.values, self.given),
            lambda rows, given: self.make_chain(rows, given, args, kwargs),
            self.name,
        )
        values = walk.run(self.model, args, kwargs)
        return {name: capture.values[name] for name in latents.outside if name in capture.values} | values

    def __getstate__(self) -> dict[str, Any]:
        return picklable_state(self, super())

    def __deepcopy__(self, memo: dict[int, Any]) -> RowGuide:
        """A copy of the guide for the same model, or for the model's copy if both are copied together."""
        memo.setdefault(id(self.model), self.model)
        memo[id(self)] = new = type(self).__new__(type(self))
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return new

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As of any module; the first call makes what is loaded into.

        Raises:
            ValueError: the guide has not been called yet.
        """
        if self.latents is None:
            raise ValueError(
                f"{self.name}: it has no weights before its first call, which looks at the model. Try guide(*args) "
                "once, then load_state_dict."
            )
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def register(self) -> None:
        """Declares what trains to Pyro."""

    # -- what is known of q -------------------------------------------------------------------------------------------

    @one_thread
    @checked
    def get_posterior(self, *args: Any, **kwargs: Any) -> Any:
        """q(u|x) of the unconstrained latents of each row, of batch shape (N,) and event shape (D,).

        The order of coordinates is that of the model's sites; latents that q is conditioned on (`given`) are at their
        median.
        """
        latents, found = self.set_up(args, kwargs), []

        def make(rows: PlateRows, given: Tensor | None) -> Chain:
            chain = self.make_chain(rows, given, args, kwargs)
            found.append(chain.joint([z.size for z in latents.inside]))
            return chain

        with poutine.block(), torch.no_grad(), fork_random_state():
            values = self._medians_outside(args, kwargs)
        # the walk draws, and the draws are not used
        with poutine.block(), fork_random_state(), evaluation_mode(self, self.model):
            Walk(latents, self.plate, values, self.given, make, self.name).run(self.model, args, kwargs)
        return found[0]

    @one_thread
    @checked
    def sample_posterior(
        self, *args: Any, num_samples: int = 1000, seed: int | None = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Draws of q, {site: (S, N, *inner plates, *event)}; without N for latents outside of the plate."""
        return sample_posterior(self, num_samples, args, kwargs, seed=seed)

    @one_thread
    @checked
    def quantiles(self, levels: Sequence[float], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Quantiles of q of each element, {site: (len(levels), N, *inner plates, *event)}.

        Those of a Gaussian under a bijection of single elements are exact; others are of 10 000 draws.
        """
        return quantiles(self, levels, args, kwargs)

    @one_thread
    @checked
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The median of q of each element, {site: (N, *inner plates, *event)}."""
        return {name: value[0] for name, value in self.quantiles([0.5], *args, **kwargs).items()}

    def _medians_outside(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Tensor]:
        if self.outside is None:
            return {}
        if hasattr(self.outside, "median"):
            if getattr(self.outside, "prototype_trace", self) is None:  # Pyro's know nothing before their first call
                with torch.enable_grad():
                    self.outside(*args, **kwargs)
            return self.outside.median(*args, **kwargs)
        with Capture(self.latents.outside) as capture:
            self.outside(*args, **kwargs)
        return capture.values


def _check_outside(guide: RowGuide, values: dict[str, Tensor]) -> None:
    expected = guide.latents.outside
    missing = [name for name in expected if name not in values]
    if missing and guide.outside is not None:
        raise ValueError(
            f"{guide.name}: outside={type(guide.outside).__name__} did not sample {missing}; expected all latents "
            f"outside of plate {guide.plate!r}: {list(expected)}. Try outside=AutoNormal, or None for a guide "
            "elsewhere."
        )


class Exposed:
    """A model of which only some latents are seen. An object, so that a guide of it can be pickled."""

    def __init__(self, model: Callable, names: tuple[str, ...]) -> None:
        self.model, self.names = model, names

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with poutine.block(expose=list(self.names)):
            return self.model(*args, **kwargs)
