"""ArviZ: Pyro models and their inference as `InferenceData` (ArviZ 0.2x) or `xarray.DataTree` (ArviZ 1.x).

Both hold the same groups, variables, dimensions and coordinates, and can be saved to netCDF and zarr. The dimensions
are (chain, draw), then one named after each plate, then those of the event, which the user names or which are
`site_dim_0`, ….

Draws of a guide are independent, so that R-hat and MCMC's effective sample size say nothing about them. `sample_stats`
does: it holds the importance weights of the draws, the evidence, its effective sample size and k-hat.

`log_likelihood` is what `az.loo` and `az.compare` need: log p(x_n|θ), with the latents that belong to data point n
integrated out. With the terms log p(x_n|z_n, θ), of sample_stats, leave-one-out fails: one data point is all that is
known of its z_n (`pyro_vae.evidence.moments`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from pyro_vae.arguments import checked
from pyro_vae.integrations.arviz_arguments import called_with
from pyro_vae.integrations.arviz_groups import Dims, Groups
from pyro_vae.integrations.arviz_mcmc import MCMCRuns
from pyro_vae.integrations.arviz_sites import find_plate
from pyro_vae.integrations.arviz_statistics import put_draws, put_statistics
from pyro_vae.integrations.arviz_svi import Sampled
from pyro_vae.pairs.modes import evaluation_mode
from pyro_vae.pairs.pair import Pair
from pyro_vae.pairs.seeds import seeded
from pyro_vae.pairs.threads import one_thread
from pyro_vae.pairs.validity import check_density
from pyro_vae.particles.sampler import ParticleSampler
from pyro_vae.progress import progress_bar

__all__ = ["from_pyro", "from_pyro_svi"]


@one_thread
@checked
@seeded
def from_pyro_svi(
    model: Callable,
    guide: Callable,
    *args: Any,
    num_samples: int = 1000,
    num_particles: int = 100,
    plate: str | None = "auto",
    parallel: bool | str = "auto",
    resample: bool = False,
    seed: int | None = None,
    predictions: Any = None,
    coords: Mapping[str, Any] | None = None,
    dims: Dims | None = None,
    stack: Mapping[str, str] | None = None,
    progress: bool = True,
    **kwargs: Any,
) -> Any:
    """Converts a Pyro model and guide that are trained by SVI.

    Groups:

    - posterior: draws of the guide, of latents inside the plate of data points and outside of it (globals θ);
      `pyro.deterministic` sites, and latents that were reparametrised by their original names; discrete latents that
      the guide leaves to enumeration are drawn given the others, by `pyro.infer.infer_discrete`.
    - log_likelihood: log p(x_n|θ) at each draw of θ, with the latents of the data point integrated out, by importance
      sampling with `num_particles` draws (`log_likelihood_error` in sample_stats has the standard error of each point,
      as root mean square over draws of θ). Without θ it is log p(x_n), for each draw estimated from all others. So
      `az.loo` leaves out data points with all that belongs to them, and `az.compare` compares models. Without θ, it
      gives Σ log p(x_n), with the k-hats of the weights.
    - sample_stats: for each draw `log_p`, `log_q` and `log_weights`, their difference; and by importance sampling with
      these draws `log_evidence`, its `log_evidence_error`, `ess` and `pareto_khat`. Without θ they are log p(x_n, z_n),
      log q(z_n|x_n) and log p(x_n) of each data point. With θ they are log p(x, θ), log q(θ) and the joint log p(x),
      with the latents of data points integrated out; or log p(x, z, θ) and log q(z, θ), where a guide draws all latents
      together. For each observed site x, `log_p_x_given_latents` has log p(x|z, θ) per element of the innermost plates.
    - log_prior: of each latent, in its own coordinates, for `az.psense`.
    - posterior_predictive (x ~ p(x|z, θ) for each draw), prior, prior_predictive, observed_data, and constant_data:
      tensors that the model was called with, and does not observe.

    All log-probabilities are in nats. The attribute `data_plate` of each group names the plate of data points.

    Args:
        model: a Pyro model.
        guide: its guide.
        *args: what both are called with.
        num_samples: S, number of draws.
        num_particles: draws of the latents of a data point for each draw of θ, that integrate them out.
        plate: name of the plate of data points. "auto": "data", or the one that all observed sites are in; of several
            the one that has latents in it, or else the outermost, with a warning. None, or no such plate: all data are
            one point, which has no log_likelihood.
        parallel: whether many draws run at once: True; False, one at a time; or "auto", at once where the pair allows
            it, and otherwise one at a time with a warning.
        resample: draw posterior and what follows from it anew from the S draws, by their weights: of each data point,
            or with θ of all latents together. About `ess` of them are different ones, and they are no better than
            `pareto_khat` says.
        seed: of the draws; None draws on from torch's generator.
        predictions: arguments of the model with new data: a tuple, or a dict by name. Adds predictions (new data drawn
            from the model at the draws of θ) and predictions_constant_data.
        coords: {dimension: labels}; default 0, 1, 2, …
        dims: {site: names of its event dimensions, or of all that follow (chain, draw)}.
        stack: {name: dimension}: the sites name_0, name_1, … of a loop become one variable, with this dimension.
        progress: show a progress bar, if on a terminal.
        **kwargs: what both are called with.

    ArviZ takes the draws for draws of the posterior, and has no place for weights of θ: with a guide that is narrower,
    as mean-field ones are, `az.loo` is too good, and its k-hats do not tell. `ess` in sample_stats does. Try
    `resample=True` where it is not small, or `integrated_log_likelihood` at draws of `draw_posterior`.

    Returns:
        `arviz.InferenceData` on ArviZ 0.2x, `xarray.DataTree` on 1.x; one chain.

    Raises:
        ValueError: as in `draw_particles`; also if `coords`, `dims` or `stack` do not fit.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...         pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x[:, None] / 3, 0.8).expand([len(x), 2]).to_event(1))
        >>> tree = from_pyro_svi(model, guide, torch.randn(5), num_samples=50, dims={"z": ["latent"]})
        >>> tree["posterior"]["z"].dims
        ('chain', 'draw', 'data', 'latent')
    """
    if plate == "auto":
        plate = find_plate(Pair(model, guide, args, kwargs).look.model)
    outside = plate is not None
    sampler = ParticleSampler(
        model, guide, args, kwargs, plate=plate, parallel=parallel, outside=outside, computed=True
    )
    check_density(sampler.pair)
    groups = Groups(coords, dims, stack=stack)
    groups.rows = plate
    groups.everywhere["data_plate"] = "none" if plate is None else plate
    with torch.no_grad(), evaluation_mode(model, guide):
        sampled = Sampled(groups, sampler, num_samples, num_particles)
        sampled.put(progress, resample)
        observed = sampled.put_arguments()
        if predictions is not None:
            sampled.put_predictions(called_with(predictions), observed)
    return groups.tree()


@one_thread
@checked
@seeded
def from_pyro(
    mcmc: Any,
    *,
    predictions: Any = None,
    num_particles: int = 100,
    seed: int | None = None,
    coords: Mapping[str, Any] | None = None,
    dims: Dims | None = None,
    stack: Mapping[str, str] | None = None,
    progress: bool = True,
) -> Any:
    """Converts a run of Pyro's MCMC, which ArviZ 1.x no longer does.

    The model runs once for each draw, exactly as MCMC ran it. Groups:

    - posterior: latents, `pyro.deterministic` sites, and latents that were reparametrised by their original names;
      discrete latents that MCMC summed out are drawn given the others, by `pyro.infer.infer_discrete`.
    - sample_stats: `diverging`; `lp`, the log-joint at the draw in the unconstrained coordinates that MCMC moves in,
      with the log-determinants of their transformations; `log_p_x_given_latents` for each observed site x, per element
      of the innermost plates. Energy, acceptance rate, steps and tree depth are there if the kernel kept them:
      `MCMC(with_statistics(NUTS(model)), …)`.
    - log_likelihood: the same terms; or, if latents are in the plate of the data points x_n, log p(x_n|θ) with these
      integrated out, by importance sampling with `num_particles` draws for each draw of θ (`log_likelihood_error` in
      sample_stats has the standard error of each point), or summed, if they are discrete. So `az.loo` leaves out data
      points with all that belongs to them.
    - log_prior: of each latent, in its own coordinates, for `az.psense`.
    - posterior_predictive, prior, prior_predictive (as many draws as one chain has), observed_data, and constant_data:
      tensors that the model was called with, and does not observe.

    A kernel that was made from a potential function has no model, and gives only posterior and sample_stats.

    Args:
        mcmc: a `pyro.infer.MCMC` after `run`.
        predictions: arguments of the model with new data: a tuple, or a dict by name. Adds predictions (new data drawn
            given the latents that are no data point's own) and predictions_constant_data.
        num_particles: draws of the latents of a data point, that integrate them out. 0 leaves log_likelihood as given
            these latents: where each data point has its own, `az.loo` then has too small errors, or none (k-hat).
        seed: of the draws; None draws on from torch's generator.
        coords: {dimension: labels}; default 0, 1, 2, …
        dims: {site: names of its event dimensions, or of all that follow (chain, draw)}.
        stack: {name: dimension}: the sites name_0, name_1, … of a loop become one variable, with this dimension.
        progress: show a progress bar, if on a terminal.

    Returns:
        `arviz.InferenceData` on ArviZ 0.2x, `xarray.DataTree` on 1.x.

    Raises:
        TypeError: `mcmc` is not an MCMC run.
        ValueError: `coords`, `dims` or `stack` do not fit; a latent that MCMC did not draw and that cannot be
            enumerated; a site that is not in every run of the model.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> from pyro.infer import MCMC, NUTS
        >>> def model(y):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(mean, 1.0), obs=y)
        >>> mcmc = MCMC(NUTS(model), num_samples=20, warmup_steps=20, disable_progbar=True)
        >>> mcmc.run(torch.randn(5))
        >>> from_pyro(mcmc)["log_likelihood"]["y"].dims
        ('chain', 'draw', 'data')
    """
    if getattr(mcmc, "_samples", None) is None:
        raise TypeError(
            f"from_pyro: expected a pyro.infer.MCMC after run(…), got {type(mcmc).__name__}. Try mcmc.run(x)."
        )
    samples = mcmc.get_samples(group_by_chain=True)
    groups = Groups(coords, dims, next(iter(samples.values())).shape[0], stack)
    put_statistics(groups, mcmc, samples)
    with torch.no_grad():
        if mcmc.kernel.model is None:
            put_draws(groups, mcmc, samples)
            return groups.tree()
        runs, new = MCMCRuns(mcmc, samples), None if predictions is None else called_with(predictions)
        with progress_bar(len(runs), "draws for ArviZ", progress) as bar:
            for i in range(len(runs)):
                runs.draw(i, new)
                bar.update()
        integrated = runs.integrate(num_particles)
    runs.put(groups, integrated, new)
    return groups.tree()
