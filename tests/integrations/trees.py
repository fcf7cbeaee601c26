"""Reading what ArviZ holds, whichever generation is installed."""

import arviz as az

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
