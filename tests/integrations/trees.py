"""Making trees, and reading what ArviZ holds, whichever generation is installed."""

import arviz as az
import pyro
import torch
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO

ARVIZ_1 = not az.__version__.startswith("0.")
GROUPS = {
    "posterior",
    "posterior_predictive",
    "log_likelihood",
    "log_prior",
    "sample_stats",
    "prior",
    "prior_predictive",
    "observed_data",
}


def groups(tree):
    return {name.strip("/") for name in tree.groups} - {""} if ARVIZ_1 else set(tree.groups())


def dataset(tree, group):
    return tree[group].to_dataset() if ARVIZ_1 else tree[group]


def dims(tree, group):
    return {name: " ".join(map(str, v.dims)) for name, v in dataset(tree, group).data_vars.items()}


def back_from(tree, path, form):
    """A tree that was written to disk and read again."""
    if form == "zarr":
        tree.to_zarr(str(path))
        return az.from_zarr(str(path))
    tree.to_netcdf(str(path), engine="h5netcdf")
    return az.from_netcdf(str(path))


def flat(tree, group, name):
    return torch.tensor(tree[group][name].values[0])


def elpd(tree):
    found = az.loo(tree)
    return (found.elpd, found.p) if hasattr(found, "elpd") else (found.elpd_loo, found.p_loo)


def trained(model, make, *args, steps, together=True, learning_rate=0.02):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide = make(model)
    optimizer = pyro.optim.ClippedAdam({"lr": learning_rate, "lrd": 0.999})
    options = {"num_particles": 10, "vectorize_particles": True, "max_plate_nesting": 1} if together else {}
    svi = SVI(model, guide, optimizer, Trace_ELBO(**options))
    for _ in range(steps):
        svi.step(*args)
    return guide


def sampled(model, *args, num_samples, warmup_steps):
    pyro.set_rng_seed(0)
    mcmc = MCMC(NUTS(model), num_samples=num_samples, warmup_steps=warmup_steps, disable_progbar=True)
    mcmc.run(*args)
    return mcmc


def with_draws(draws, model, *args):
    """MCMC as if it had made these draws, {site: (draw, …)}: what trees say is given them, and NUTS takes seconds."""
    mcmc = sampled(model, *args, num_samples=1, warmup_steps=1)
    mcmc._samples = {name: value[None] for name, value in draws.items()}
    mcmc._diagnostics = [{"divergences": []}]
    return mcmc
