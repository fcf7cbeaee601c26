r"""The variational autoencoder: three conditional distributions become a Pyro model and its guide.

    model: z ~ p(z), x ~ p(x|z)        guide: z ~ q(z|x)        in plate "data", with sites "z" and "x"

(Kingma & Welling 2014, *Auto-Encoding Variational Bayes*; Rezende, Mohamed & Wierstra 2014.) Both are plain Pyro
functions: everything that takes a (model, guide) pair also takes `vae.model, vae.guide`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.util import is_validation_enabled
from torch import Tensor, nn

from pyro_vae.distributions.structure import condition, expected_value
from pyro_vae.models.registration import condition_registered, store_name
from pyro_vae.pairs.checks import check_support
from pyro_vae.pairs.modes import evaluation_mode
from pyro_vae.pairs.threads import one_thread

__all__ = ["VAE"]

ROWS_AT_ONCE = 4096  # rows in one pass of generate, reconstruct and similar


class VAE(nn.Module):
    """p(z), p(x|z) and an amortized q(z|x), as a Pyro model and guide.

    Anything that returns a distribution can fill a role: a conditional distribution of this package, an `nn.Module` or
    function, a fixed distribution (as prior), a `pyro.distributions.ConditionalDistribution` or a Zuko flow.
    Further arguments of `model` and `guide` are context c, for p(x|z, c) and q(z|x, c); p(z) does not depend on it.

    When the model or guide runs, it registers its weights with Pyro as `name$$$role.parameter`, so that
    `pyro.infer.SVI` trains them. A second VAE with the same name gets its own name there ("vae_2"), so that two VAEs
    never share weights. Frozen parameters (`requires_grad_(False)`) stay frozen. Save weights with
    `pyro_vae.checkpoint.save_weights`, because parameters in Pyro's store cannot be pickled.

    Args:
        prior: p(z), called without arguments, or a fixed distribution.
        likelihood: p(x|z), called with z (and context).
        posterior: the approximate posterior q(z|x), called with x (and context).
        name: prefix of the parameters in Pyro's parameter store.

    Example:
        >>> from pyro_vae.distributions import ConditionalBernoulli, ConditionalNormal, StandardNormal
        >>> from pyro_vae.networks import MLP
        >>> vae = VAE(
        ...     StandardNormal(2),
        ...     ConditionalBernoulli(MLP(2, [32]), (8, 8)),
        ...     ConditionalNormal(MLP((8, 8), [32]), 2),
        ... )
        >>> vae.generate(3).shape, vae.encode(torch.zeros(5, 8, 8)).mean.shape
        (torch.Size([3, 8, 8]), torch.Size([5, 2]))
    """

    def __init__(self, prior: Any, likelihood: Any, posterior: Any, *, name: str = "vae") -> None:
        super().__init__()
        self.prior, self.likelihood, self.posterior = prior, likelihood, posterior
        self.name = name
        self._registered = name  # the name in the parameter store
        self._shape_of: tuple[Any, torch.Size] | None = None

    # -- the two Pyro functions ---------------------------------------------------------------------------------------

    def model(self, x: Tensor | None = None, *context: Tensor, size: int | None = None) -> Tensor:
        """z ~ p(z), x ~ p(x|z, c) in plate "data". It observes `x`, or generates `size` rows if `x` is None.

        Args:
            x: (N, *event), or None.
            *context: c, each (N, *event).
            size: number of rows to generate without x; default: as many as the context has, or one.

        Returns:
            x, (N, *event).
        """
        rows = x if x is not None else context[0] if context else None
        if size is None:
            size = 1 if rows is None else len(rows)
        with pyro.plate("data", size):
            p_z = self._condition("prior")
            z = pyro.sample("z", p_z)
            dims = [p_z.event_dim, *_event_dims(*context)]
            p_x = self._condition("likelihood", z, *context, event_dims=dims)
            if x is not None:
                self._check(p_x, x)
            return pyro.sample("x", p_x, obs=x)

    def guide(self, x: Tensor, *context: Tensor) -> Tensor:
        """z ~ q(z|x, c) in plate "data", for x and c as in `model`. Returns z, (N, *event)."""
        with pyro.plate("data", len(x)):
            try:
                q_z = self._condition("posterior", x, *context, event_dims=_event_dims(x, *context))
            except ValueError as error:
                if not x.isnan().any():
                    raise
                raise ValueError(
                    "posterior: its network cannot take rows with missing values (NaN). Try MaskedInput(network), with "
                    "a network for inputs of twice the width, which sees which elements are missing."
                ) from error
            self._check_posterior(q_z, x)
            return pyro.sample("z", q_z)

    # -- without gradients, in evaluation mode, for any number of rows ------------------------------------------------

    @one_thread
    @torch.no_grad()
    def encode(self, x: Tensor, *context: Tensor) -> Any:
        """q(z|x, c): a distribution with batch shape (N,)."""
        with evaluation_mode():
            q_z = condition(self.posterior, x, *context, event_dims=_event_dims(x, *context), role="posterior")
            self._check_posterior(q_z, x)
            return q_z if q_z.batch_shape == x.shape[:1] else q_z.expand(x.shape[:1])

    @one_thread
    @torch.no_grad()
    def decode(self, z: Tensor, *context: Tensor) -> Any:
        """p(x|z, c): a distribution with batch shape (*batch,), for z of shape (*batch, *event)."""
        with evaluation_mode():
            dims = [len(self._latent_shape()), *_event_dims(*context)]
            return condition(self.likelihood, z, *context, event_dims=dims, role="likelihood")

    @one_thread
    def generate(self, size: int | None = None, *context: Tensor, mean: bool = False) -> Tensor:
        """Generates new data: z ~ p(z), x ~ p(x|z, c).

        Args:
            size: N; default: the number of rows of the context, or one.
            *context: c, each (N, *event).
            mean: return E[x|z] instead of a draw of x.

        Returns:
            (N, *event).
        """
        if size is not None and not isinstance(size, int):
            raise TypeError(
                f"generate: expected an int or None as size, got {type(size).__name__}. Try generate(None, c)."
            )
        size = size if size is not None else len(context[0]) if context else 1

        def rows(start: int, stop: int) -> Tensor:
            with torch.no_grad(), evaluation_mode():
                p_z = condition(self.prior, role="prior")
                return _value(
                    self.decode(p_z.expand((stop - start,)).sample(), *(c[start:stop] for c in context)), mean
                )

        return _in_chunks(rows, size)

    @one_thread
    def reconstruct(self, x: Tensor, *context: Tensor, mean: bool = False) -> Tensor:
        """Encodes x and decodes it again: z ~ q(z|x, c), x' ~ p(x|z, c).

        Args:
            x: (N, *event).
            *context: c, each (N, *event).
            mean: return E[x'|z] at z = E_q[z] instead of draws of z and x'. A distribution without a mean in closed
                form (a flow) gives a draw, and categories give the most probable one.

        Returns:
            (N, *event).
        """

        def rows(start: int, stop: int) -> Tensor:
            c = [c[start:stop] for c in context]
            z = _value(self.encode(x[start:stop], *c), mean)
            return _value(self.decode(z, *c), mean)

        return _in_chunks(rows, len(x))

    @one_thread
    def similar(self, x: Tensor, *context: Tensor, size: int, mean: bool = False) -> Tensor:
        """Generates data like x: it draws z_1, …, z_size ~ q(z|x, c) for each row, and x' ~ p(x|z_s, c) for each z_s.

        Args:
            x: (N, *event).
            *context: c, each (N, *event).
            size: number of draws for each row.
            mean: return E[x'|z_s] instead of draws of x', so that only the codes differ between draws.

        Returns:
            (size, N, *event).
        """

        if size < 1:
            raise ValueError(f"similar: expected at least one draw for each row, got size={size}.")
        draws = [min(ROWS_AT_ONCE, size - i) for i in range(0, size, ROWS_AT_ONCE)]

        def rows(start: int, stop: int) -> Tensor:
            c = [c[start:stop] for c in context]
            q_z = self.encode(x[start:stop], *c)
            return torch.cat([_value(self.decode(q_z.sample((s,)), *c), mean) for s in draws]).movedim(0, 1)

        return _in_chunks(rows, len(x), size).movedim(1, 0)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _latent_shape(self) -> torch.Size:
        """The event shape of z, from the prior."""
        if self._shape_of is None or self._shape_of[0] is not self.prior:
            with poutine.block(), torch.no_grad():
                self._shape_of = self.prior, condition(self.prior, role="prior").event_shape
        return self._shape_of[1]

    def _check_posterior(self, q_z: Any, x: Tensor) -> None:
        if q_z.event_shape != self._latent_shape():
            _mismatch("posterior", q_z, f"event shape {tuple(self._latent_shape())}, that of the prior")
        if q_z.batch_shape not in (x.shape[:1], torch.Size()):
            _mismatch("posterior", q_z, f"batch shape {tuple(x.shape[:1])}, one distribution for each row")

    def _check(self, p_x: Any, x: Tensor) -> None:
        if p_x.event_shape != x.shape[1:]:
            _mismatch("likelihood", p_x, f"event shape {tuple(x.shape[1:])}, that of a row of the data")
        if is_validation_enabled():
            check_support("x", {"fn": p_x, "value": x, "mask": None})

    def _condition(self, role: str, *inputs: Tensor, event_dims: Sequence[int] | None = None) -> Any:
        """The distribution in this role given `inputs`, with its parameters registered with Pyro."""
        parts = {"prior": self.prior, "likelihood": self.likelihood, "posterior": self.posterior}
        name = store_name(parts, role, self._registered, self.name)
        if name != self._registered:
            self._registered = name
        return condition_registered(parts, role, name, *inputs, event_dims=event_dims)


def _event_dims(*rows: Tensor) -> list[int]:
    """The number of event dimensions of each tensor of rows."""
    for x in rows:
        if not isinstance(x, Tensor) or not x.dim():
            got = f"a single number, {x}" if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"VAE: expected tensors of rows, (N, *event), got {got}. Try torch.as_tensor(x).float().")
    return [x.dim() - 1 for x in rows]


def _value(distribution: Any, mean: bool) -> Tensor:
    value = expected_value(distribution) if mean else None
    return distribution.sample() if value is None else value


def _in_chunks(rows: Callable[[int, int], Tensor], size: int, draws: int = 1) -> Tensor:
    if size < 1:
        raise ValueError(f"expected at least one row of data, or one to generate, got {size}.")
    at_once = max(1, ROWS_AT_ONCE // draws)
    return torch.cat([rows(i, min(i + at_once, size)) for i in range(0, size, at_once)])


def _mismatch(role: str, distribution: Any, expected: str) -> None:
    raise ValueError(
        f"{role}: expected {expected}, got event shape {tuple(distribution.event_shape)} and batch shape "
        f"{tuple(distribution.batch_shape)}. Try .to_event({max(1, len(distribution.batch_shape) - 1)}) on the "
        "distribution, or another event_shape."
    )
