r"""How the dimensions of a latent variable are used, and which of them have collapsed.

Posterior collapse: q(z_d|x) equals p(z_d) for every x. The dimension then says nothing about x and costs nothing:

    KL_d = mean_n KL(q(z_d|x_n)‖p(z_d)) ≈ 0,        A_d = Var_n(E_q[z_d|x_n]) ≈ 0.

A dimension is active if A_d > 0.01 (Burda, Grosse & Salakhutdinov 2016, *Importance Weighted Autoencoders*).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Independent, LowRankMultivariateNormal, MultivariateNormal, Normal, kl_divergence

from pyro_vae.arguments import checked
from pyro_vae.pairs.modes import evaluation_mode
from pyro_vae.pairs.seeds import seeded
from pyro_vae.pairs.sites import sample_sites
from pyro_vae.pairs.threads import one_thread
from pyro_vae.particles.sampler import ParticleSampler

__all__ = ["LatentUsage", "latent_usage"]


@dataclass(frozen=True)
class LatentUsage:
    """How a latent site of D dimensions is used, over N data points.

    Attributes:
        site: name of the site.
        kl: mean KL(q(z_d|x)‖p(z_d)) of each dimension's marginal, (D,), nats; NaN if it is not known in closed form.
        variance_of_means: A_d = Var_n(E_q[z_d|x_n]), (D,).
        threshold: the value of A_d above which a dimension is active.
    """

    site: str
    kl: Tensor
    variance_of_means: Tensor
    threshold: float

    @property
    def active(self) -> Tensor:
        """Which dimensions are active, (D,)."""
        return self.variance_of_means > self.threshold

    def __repr__(self) -> str:
        active = self.active
        lines = [f"{int(active.sum())} of {len(active)} dimensions of {self.site!r} are active"]
        if self.kl.isfinite().all():
            idle = f", {self.kl[~active].sum():.2f} of them in inactive dimensions" if (~active).any() else ""
            lines.append(f"  KL of the marginals, summed: {self.kl.sum():.2f} nats{idle}")
        if (~active).any():
            lines.append(f"  collapsed {(~active).nonzero().flatten().tolist()}")
        return "\n".join(lines)


@one_thread
@checked
@seeded
def latent_usage(
    model: Callable,
    guide: Callable,
    *args: Any,
    site: str | None = None,
    plate: str = "data",
    threshold: float = 0.01,
    num_particles: int = 100,
    parallel: bool | str = "auto",
    seed: int | None = None,
    **kwargs: Any,
) -> LatentUsage:
    """Computes the KL and the activity of each dimension of a latent site.

    Args:
        model: a Pyro model with the data points in a plate.
        guide: its guide.
        *args: what both are called with, with enough data points to estimate a variance over them.
        site: name of the latent site; default: the only one.
        plate: name of the plate of data points.
        threshold: the variance of posterior means above which a dimension is active, for a prior with variance one.
        num_particles: number of draws that estimate E_q[z_d|x] if the guide's distribution does not know its mean
            (flows). Their noise adds Var_q(z_d)/num_particles to A_d, which is subtracted again.
        parallel: whether many particles run at once: True; False, one at a time; or "auto", at once where the pair
            allows it, and otherwise one at a time with a warning.
        seed: of the draws; None draws on from torch's generator.
        **kwargs: what both are called with.

    Returns:
        A `LatentUsage`. If guide and model are both Normal at this site, KL is in closed form; with a full covariance,
        it is the KL of the marginals. Otherwise it is NaN.

    Raises:
        ValueError: there is no such site, or `site` is not given and there is more than one.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...         pyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=x)
        >>> def guide(x):  # the exact posterior: the second dimension is not used
        ...     with pyro.plate("data", len(x)):
        ...         loc = torch.stack([x / 2, 0 * x], -1)
        ...         pyro.sample("z", dist.Normal(loc, torch.tensor([0.5**0.5, 1.0])).to_event(1))
        >>> latent_usage(model, guide, torch.linspace(-2.0, 2.0, 100))
        1 of 2 dimensions of 'z' are active
          KL of the marginals, summed: 0.27 nats, 0.00 of them in inactive dimensions
          collapsed [1]
    """
    sampler = ParticleSampler(model, guide, args, kwargs, plate=plate, parallel=parallel)
    means, kls = [], []
    noise: Tensor | float = 0.0
    with torch.no_grad(), evaluation_mode(model, guide):
        for rows in sampler.chunks(1)[0]:
            guide_trace, model_trace = sampler.traces(1, rows)
            latents = [n for n, s in sample_sites(guide_trace).items() if not s["is_observed"]]
            if (site is None and len(latents) != 1) or (site is not None and site not in latents):
                raise ValueError(f"site: expected one of {latents}, got {site!r}. Try site={latents[0]!r}.")
            name = latents[0] if site is None else site
            q, p = guide_trace.nodes[name], model_trace.nodes[name]
            marginals = [_marginals(s["fn"]) for s in (q, p)]
            if all(m is not None for m in marginals):
                kl = kl_divergence(*marginals).expand(q["value"].shape)
                kls.append(_vectors(sampler.layout.align(q | {"value": kl}, rows)[0]))  # (N, D)
            try:
                mean = sampler.layout.align(q | {"value": q["fn"].mean.expand(q["value"].shape)}, rows)[0]
            except NotImplementedError:
                draws = sampler.draw(num_particles, rows, check=False).latents[name]  # (K, N, *event)
                mean = draws.mean(0)
                noise = noise + _vectors(draws.var(0)).sum(0) / num_particles / sampler.num_points
            means.append(_vectors(mean))
    mean = torch.cat(means)
    kl = torch.cat(kls).mean(0) if kls else mean.new_full(mean.shape[1:], torch.nan)
    return LatentUsage(name, kl, (mean.var(0) - noise).clamp(min=0.0), threshold)


def _vectors(value: Tensor) -> Tensor:
    """(N, *event) as (N, D)."""
    return value.reshape(len(value), -1)


def _marginals(distribution: Any) -> Normal | None:
    """The distribution of each element of a Normal, over its batch and event shape; None for other distributions."""
    base = distribution
    while isinstance(base, Independent):
        base = base.base_dist
    if isinstance(base, Normal):
        return Normal(base.loc, base.scale)
    if isinstance(base, (MultivariateNormal, LowRankMultivariateNormal)):
        return Normal(base.mean, base.variance.sqrt())
    return None
