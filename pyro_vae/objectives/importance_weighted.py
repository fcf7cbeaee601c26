r"""The importance-weighted bound as an objective.

The bound of a mini-batch of B of N data points, with K draws z_nk ~ q(z|x_n) for each,

    N/B Σ_n log 1/K Σ_k w_nk,    w_nk = p(x_n, z_nk) / q(z_nk|x_n),

takes the mean of the weights of one data point, and multiplies by the plate's scale outside of the logarithm. Like the
ELBO (K = 1), it is a lower bound of log p(x) in expectation; it rises with K. `pyro.infer.RenyiELBO` scales the
log-weights instead, inside of the logarithm, which gives no bound when the plate subsamples.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf, log
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_vae.arguments import checked
from pyro_vae.pairs.modes import is_recording
from pyro_vae.pairs.pair import Pair
from pyro_vae.pairs.sites import sample_sites, site_log_prob
from pyro_vae.pairs.threads import one_thread
from pyro_vae.pairs.validity import check_density, check_masks
from pyro_vae.pairs.vectorized import PARTICLE_PLATE

__all__ = ["ImportanceWeightedELBO"]


class ImportanceWeightedELBO(ELBO):
    """The importance-weighted bound with K particles per data point, as a loss: −bound, in nats, summed over the data.

    Draws are reparameterized where that is possible. Others get a score-function term, whose baseline is the bound of
    the other K − 1 particles (Mnih & Rezende 2016, *Variational inference for Monte Carlo objectives*). Doubly
    reparameterized gradients replace ∂ log q of the guide's parameters by Σ_k (w_k/Σw)² ∂ log w_k/∂z_k ∂z_k/∂φ. They
    are unbiased as well, and their signal does not vanish in noise as K grows.

    References:
        Burda, Grosse & Salakhutdinov (2016), Importance Weighted Autoencoders, equation 8.
        Tucker, Lawson, Gu & Maddison (2019), Doubly Reparameterized Gradient Estimators for Monte Carlo Objectives,
        equation 8.

    Args:
        num_particles: K ≥ 1; 1 gives the value and gradient of `pyro.infer.Trace_ELBO`.
        plate: name of the plate of data points, which must contain all sites.
        doubly_reparameterized: use the gradient of Tucker et al. for the guide.

    Raises:
        ValueError: when called: a site is outside the plate, latents are in the model alone, sites have different
            scales, or doubly reparameterized gradients meet a guide that cannot be reparameterized.

    Example:
        >>> import pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):  # the exact posterior, for which the bound is log p(x)
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
        >>> round(ImportanceWeightedELBO(8).loss(model, guide, torch.zeros(10)), 3)
        12.655
    """

    @checked
    def __init__(self, num_particles: int, *, plate: str = "data", doubly_reparameterized: bool = False) -> None:
        super().__init__(num_particles=num_particles, vectorize_particles=True)
        self.plate, self.doubly_reparameterized = plate, doubly_reparameterized
        self._pair: Pair | None = None  # the last pair that was looked at

    @one_thread
    def loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """−bound, nats."""
        with torch.no_grad():
            scale, log_weight, _ = self._weigh(*self._get_trace(model, guide, args, kwargs))
            return -scale * self._bound(log_weight).sum().item()

    @one_thread
    def loss_and_grads(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """−bound, nats. Adds its gradient to those of the parameters."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward()
        return loss.item()

    @one_thread
    def differentiable_loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Tensor:
        """−bound, nats, as a tensor whose gradient is that of the estimator."""
        if self.doubly_reparameterized:
            return self._doubly_reparameterized(model, guide, args, kwargs)
        scale, log_weight, score = self._weigh(*self._get_trace(model, guide, args, kwargs))
        bound = self._bound(log_weight)
        if score is None:
            return -scale * bound.sum()
        signal = bound.detach() - self._baseline(log_weight.detach())
        surrogate = (signal * score).sum()
        return -scale * (bound.sum() + surrogate - surrogate.detach())

    def _doubly_reparameterized(self, model: Callable, guide: Callable, args: tuple, kwargs: dict) -> Tensor:
        with _Leaves() as latents:
            guide_trace, model_trace = self._get_trace(model, guide, args, kwargs)
        scale, log_weight, _ = self._weigh(guide_trace, model_trace)
        share, leaves = log_weight.detach().softmax(0), list(latents.leaves.values())
        gradients = list(torch.autograd.grad((share.square() * log_weight).sum(), leaves, retain_graph=True))
        # latents that are drawn given others pass their gradient on to these, the last one first
        for i, z in reversed(list(enumerate(latents.draws.values()))):
            if i and z.requires_grad:
                passed = torch.autograd.grad(z, leaves[:i], gradients[i], retain_graph=True, allow_unused=True)
                gradients[:i] = [g if p is None else g + p for g, p in zip(gradients[:i], passed, strict=True)]
        # what is left of log w depends on the parameters of the model alone
        _, log_joint, _ = self._weigh(None, model_trace)
        surrogate = (share * log_joint).sum()
        surrogate = surrogate + sum(
            (g.detach() * z).sum() for g, z in zip(gradients, latents.draws.values(), strict=True)
        )
        return -scale * (self._bound(log_weight.detach()).sum() + surrogate - surrogate.detach())

    # -- traces and weights -------------------------------------------------------------------------------------------

    def _get_trace(self, model: Callable, guide: Callable, args: tuple, kwargs: dict) -> tuple[poutine.Trace, ...]:
        """Traces of the guide and of the model, under the plate of particles."""
        if self._pair is None or (self._pair.model, self._pair.guide) != (model, guide):
            self._pair = self._look(Pair(model, guide, args, kwargs, plate=self.plate, cut=False))
        particles = pyro.plate(PARTICLE_PLATE, self.num_particles, dim=-self._pair.layout.width)
        guide_trace = poutine.trace(particles(guide)).get_trace(*args, **kwargs)
        return guide_trace, poutine.trace(particles(poutine.replay(model, guide_trace))).get_trace(*args, **kwargs)

    @staticmethod
    def _look(pair: Pair) -> Pair:
        if pair.summed:
            raise ValueError(
                f"latent sites {sorted(pair.summed)} are in the model alone. Expected each latent of the model in the "
                "guide, under the same name: nothing is summed out here."
            )
        if not is_recording():  # which compares no values
            check_density(pair)
            check_masks(pair.look.guide, pair.look.model)
            pair.check_vectorized()
        return pair

    def _weigh(
        self, guide_trace: poutine.Trace | None, model_trace: poutine.Trace
    ) -> tuple[Any, Tensor, Tensor | None]:
        """The plate's scale, log w (K, N) (log p(x, z) without a guide), and log q of draws that are no function of
        the guide's parameters, if there are any."""
        traces = [(1, model_trace)] if guide_trace is None else [(1, model_trace), (-1, guide_trace)]
        scales, log_weight, score = [], torch.zeros(()), None
        for sign, trace in traces:
            for name, site in sample_sites(trace).items():
                if sign < 0 and site["is_observed"]:
                    continue
                value = self._pair.layout.sum_to_points(name, site_log_prob(site), None)
                scales.append((f"{name!r} of the {'model' if sign > 0 else 'guide'}", site["scale"]))
                log_weight = log_weight + sign * value
                if sign < 0 and not site["fn"].has_rsample:
                    score = value if score is None else score + value
        return self._scale(scales), log_weight, score

    @staticmethod
    def _scale(scales: list[tuple[str, Any]]) -> Any:
        first, *rest = scales
        for site, scale in rest:
            if scale is not first[1] and not torch.equal(torch.as_tensor(scale), torch.as_tensor(first[1])):
                raise ValueError(
                    f"site {first[0]} is scaled by {first[1]}, site {site} by {scale}; the bound takes one scale "
                    "for all sites of a data point, outside of the logarithm. Try poutine.scale around model and guide."
                )
        if isinstance(first[1], Tensor) and first[1].numel() > 1:
            raise ValueError(f"site {first[0]}: expected one scale for all data points, got {first[1].numel()}.")
        return first[1]

    def _bound(self, log_weight: Tensor) -> Tensor:
        return log_weight.logsumexp(0) - log(self.num_particles)

    def _baseline(self, log_weight: Tensor) -> Tensor | float:
        """The bound of the K − 1 other particles for each one, (K, N)."""
        if self.num_particles == 1:
            return 0.0
        others = ~torch.eye(self.num_particles, dtype=torch.bool, device=log_weight.device).unsqueeze(-1)
        left = log_weight.expand(self.num_particles, *log_weight.shape).masked_fill(~others, -inf)  # (K, K, N)
        return left.logsumexp(1) - log(self.num_particles - 1)


class _Leaves(Messenger):
    """Replaces each draw of a guide by a leaf of the autograd graph, and keeps both.

    Attributes:
        draws: {site: z}, functions of the guide's parameters and of the leaves of earlier sites.
        leaves: {site: z}, without history.
    """

    def __enter__(self) -> Any:
        self.draws: dict[str, Tensor] = {}
        self.leaves: dict[str, Tensor] = {}
        return super().__enter__()

    def _pyro_post_sample(self, msg: dict) -> None:
        name = msg["name"]
        if msg["is_observed"] or site_is_subsample(msg) or name in self.leaves:
            return
        if not msg["fn"].has_rsample:
            raise ValueError(
                f"site {name!r}: {type(msg['fn']).__name__} cannot be reparameterized. Try "
                "doubly_reparameterized=False, which adds a score-function term for it."
            )
        self.draws[name] = msg["value"]
        self.leaves[name] = msg["value"] = msg["value"].detach().requires_grad_()
