r"""The objective of the β-VAE: an ELBO whose KL term has a weight, which may follow the training steps.

    L(β) = E_q log p(x|z) − β KL(q(z|x)‖p(z)),        L(β, C) = E_q log p(x|z) − β |KL(q(z|x)‖p(z)) − C|.

β > 1 pulls the posterior towards the prior, and is said to disentangle latents. β < 1 spends more nats on the code. A β
that rises from zero to one is the usual warm-up against posterior collapse. A weight w on the reconstruction instead
gives w L(1/w). Only L(1) is a bound of log p(x), so evaluation is always at β = 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from pyro.infer import TraceMeanField_ELBO
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_vae.arguments import checked
from pyro_vae.objectives.schedules import Schedule, value_at
from pyro_vae.pairs.sites import plate_frames, sample_sites
from pyro_vae.pairs.threads import one_thread

__all__ = ["BetaELBO"]


class BetaELBO(TraceMeanField_ELBO):
    r"""The ELBO with the KL term weighted by β, as a loss: −L(β), in nats, summed over the data.

    The KL term is in closed form where torch or this package knows one, and is estimated from draws elsewhere. It
    covers all latent sites of the pair. Observed sites, such as a label, keep a weight of one. At β = 1 this objective
    is `TraceMeanField_ELBO`.

    `loss` evaluates: it always takes β = 1 and no capacity, and so does the validation of `fit`. A fit that ends at
    another β, or with a capacity, warns. `importance_sampling` and all other tools ignore β.

    Args:
        beta: β ≥ 0: a number, or a function of the step (0 for the first one) such as `linear(…)`.
        capacity: C ≥ 0, nats per data point: a number, or a function of the step; default: none.
        plate: name of the plate of data points, over which the capacity is a mean: it has as many points as its size,
            times the `poutine.scale` around the plate. Scales and plates inside of it count in the KL term alone.
        num_particles: number S ≥ 1 of draws for E_q.

    Raises:
        ValueError: β or the capacity is negative. When called: a latent site cannot be reparameterized, or is missing
            in the guide; there is a capacity, but no plate of this name.

    References:
        Higgins et al. (2017), beta-VAE, equation 4; Burgess et al. (2018), Understanding disentangling in β-VAE,
        equation 8.

    Example:
        >>> import pyro.distributions as dist, pyro
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(1.0, 1.0))  # KL = ½
        >>> losses = [BetaELBO(beta).differentiable_loss(model, guide, torch.zeros(10)) for beta in (0.0, 1.0, 4.0)]
        >>> [round(float(loss - losses[0]), 4) for loss in losses]
        [0.0, 5.0, 20.0]
    """

    @checked
    def __init__(
        self,
        beta: float | Schedule,
        *,
        capacity: float | Schedule | None = None,
        plate: str = "data",
        num_particles: int = 1,
    ) -> None:
        super().__init__(num_particles=num_particles)
        self.schedules = {"beta": beta} if capacity is None else {"beta": beta, "capacity": capacity}
        self.plate = plate
        # tensors, so that a compiled loss has them as inputs
        self._now = {name: torch.tensor(value_at("BetaELBO", name, s, 0)) for name, s in self.schedules.items()}
        self._calls = torch.tensor(-1)
        self._driven = False

    def __copy__(self) -> BetaELBO:
        new = type(self).__new__(type(self))
        new.__dict__.update(self.__dict__, _calls=self._calls.clone())
        new._now = {name: value.clone() for name, value in self._now.items()}
        return new

    @property
    def beta(self) -> float:
        """β of the last step."""
        return self._now["beta"].item()

    @property
    def capacity(self) -> float | None:
        """C of the last step, nats per data point; None where there is none."""
        return self._now["capacity"].item() if "capacity" in self._now else None

    def set_step(self, step: int) -> None:
        """Sets β and the capacity to those of a step.

        `fit` and `CompiledELBO` call this. If nobody does, `loss_and_grads` counts its own calls as steps.
        """
        self._driven = True
        self._set(step)

    def not_a_bound(self) -> str | None:
        """Why L(β, C) of the last step is no bound of log p(x): β is not one, or there is a capacity."""
        if self.beta == 1.0 and self.capacity is None:
            return None
        return f"beta = {self.beta:.4g}{'' if self.capacity is None else ' and a capacity'}"

    def _set(self, step: int) -> None:
        for name, schedule in self.schedules.items():
            self._now[name].fill_(value_at("BetaELBO", name, schedule, step))

    @one_thread
    def loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """−ELBO, at β = 1, nats."""
        with torch.no_grad():
            traces = self._get_traces(model, guide, args, kwargs)
            terms = [torch.stack(self._terms(*pair)).sum().item() for pair in traces]
        return sum(terms) / self.num_particles

    @one_thread
    def loss_and_grads(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """−L(β) of the step, nats. Adds its gradient to those of the parameters."""
        if not self._driven:
            self._calls += 1
            self._set(int(self._calls))
        return super().loss_and_grads(model, guide, *args, **kwargs)

    @one_thread
    def differentiable_loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Tensor:
        """−L(β) of the last step, nats, as a tensor with a gradient."""
        return super().differentiable_loss(model, guide, *args, **kwargs)

    def _get_trace(self, model: Callable, guide: Callable, args: tuple, kwargs: dict) -> tuple[Trace, Trace]:
        with _ScaleOfPlate(self.plate) as seen:
            model_trace, guide_trace = super()._get_trace(model, guide, args, kwargs)
        model_trace.scale_of_plate = seen.scale
        return model_trace, guide_trace

    def _differentiable_loss_particle(self, model_trace: Trace, guide_trace: Trace) -> tuple[Tensor, Tensor]:
        distortion, rate = self._terms(model_trace, guide_trace)
        if "capacity" in self._now:
            size = self._num_points(model_trace)
            rate = (rate / size - self._now["capacity"]).abs() * size
        loss = distortion + self._now["beta"] * rate
        return loss.detach(), loss

    def _num_points(self, trace: Trace) -> Tensor | float:
        """How many data points the log-probabilities stand for: the full size of the plate, times the scale around."""
        inside = [
            (frame, _handler_scale(site))
            for site in sample_sites(trace).values()
            for frame in site["cond_indep_stack"]
            if frame.name == self.plate
        ]
        if inside:
            frame, scale = inside[0]
            if trace.scale_of_plate is not None:
                scale = trace.scale_of_plate
            elif any(float(s) != float(scale) for _, s in inside):  # a plate made elsewhere, with scales inside of it
                scale = 1.0
            return (frame.size if frame.full_size is None else frame.full_size) * scale
        found = sorted({repr(f.name) for f in plate_frames(trace)})
        raise ValueError(
            f"BetaELBO: a capacity for each data point expects a plate {self.plate!r} of them, got "
            f"{', '.join(found) or 'none'}. Try BetaELBO(…, plate=…)."
        )

    @staticmethod
    def _terms(model_trace: Trace, guide_trace: Trace) -> tuple[Tensor, Tensor]:
        """−log p(x|z) and KL(q(z|x)‖p(z)), summed over the data."""
        distortion, rate = torch.zeros(()), torch.zeros(())
        for name, site in sample_sites(model_trace).items():
            if site["is_observed"]:
                distortion = distortion - site["log_prob_sum"]
                continue
            if name not in guide_trace.nodes:
                raise ValueError(
                    f"BetaELBO: latent site {name!r} is in the model alone, and BetaELBO sums nothing out. Try a site "
                    "of this name in the guide, or TraceEnum_ELBO."
                )
            q = guide_trace.nodes[name]
            try:
                kl = scale_and_mask(kl_divergence(q["fn"], site["fn"]), q["scale"], q["mask"]).sum()
            except NotImplementedError:
                kl = q["log_prob_sum"] - site["log_prob_sum"]
            rate = rate + kl
        for name, q in sample_sites(guide_trace).items():
            if q["is_observed"]:
                continue
            if not q["fn"].has_rsample:
                raise ValueError(
                    f"BetaELBO: site {name!r}: {type(q['fn']).__name__} cannot be reparameterized. Try a distribution "
                    "that can, or poutine.scale and Trace_ELBO."
                )
            if name not in model_trace.nodes:  # an auxiliary site, of which other sites are functions
                rate = rate + q["log_prob_sum"]
        return distortion, rate


class _ScaleOfPlate(Messenger):
    """Sees the scale that the handlers around a plate set, where the plate is made.

    Attributes:
        scale: of the last run of the plate; None if there was none.
    """

    def __init__(self, plate: str) -> None:
        super().__init__()
        self.plate = plate
        self.scale: Tensor | float | None = None

    def _pyro_post_sample(self, msg: dict) -> None:
        if msg["name"] == self.plate and site_is_subsample(msg):
            self.scale = _handler_scale(msg)


def _handler_scale(site: dict) -> Tensor | float:
    """The mean scale of a site that is not due to subsampling."""
    scale = site["scale"].mean() if isinstance(site["scale"], Tensor) else site["scale"]
    for frame in site["cond_indep_stack"]:
        if frame.full_size is not None:
            scale = scale * frame.size / frame.full_size
    return scale
