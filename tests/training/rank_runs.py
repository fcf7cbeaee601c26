"""What `test_ranks.py` runs in two processes, and in one: `torchrun … rank_runs.py FOLDER NAME …`.

Nothing is random but where it says so: draws come with the data, so that a share of the rows has a share of the draws,
and two ranks have to end where one process does.
"""

import functools
import os
import signal
import sys
import warnings
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import RenyiELBO
from pyro.infer.autoguide import AutoDelta
from rank_pair import Autoencoder, N
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from pyro_vae import adaptive_importance_sampling, fit, importance_sampling
from pyro_vae.diagnostics import simulation_based_calibration
from pyro_vae.ranks import alone, ranks


def recorded(**options):
    """200 steps and more, clipped, with validation, stopped early."""
    pair = Autoencoder()
    options |= {"num_epochs": 150, "learning_rate": 3e-3, "patience": 9, "clip_norm": 0.2}
    return pair.fit(validation_data=pair.held_out, **options)


def plain():
    return recorded(compile=False)


def ranks_of_their_own_weights():
    """Each rank starts from others, and all go on from the first's."""
    pair = Autoencoder()
    with torch.no_grad():
        pair.decoder.weight += ranks().rank
    return pair.fit(num_epochs=2)


def loader():
    pair = Autoencoder()
    rows = TensorDataset(pair.x[:97], pair.noise[:97])  # the last batch has one row: the second rank has none of it
    return pair.fit(DataLoader(rows, 32, shuffle=True), num_epochs=5)


def distributed_sampler():
    pair = Autoencoder()
    rows = TensorDataset(pair.x[:96], pair.noise[:96])
    sampler = DistributedSampler(rows, ranks().size, ranks().rank, shuffle=True, seed=1)
    return pair.fit(DataLoader(rows, 32 // ranks().size, sampler=sampler), num_epochs=2)


def globals_of_all_rows():
    """A latent outside of the plate, whose rows are scaled up to all: it counts once."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    x = torch.randn(N) + 3.0

    def model(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 0.1))
        with pyro.plate("data", N, subsample_size=len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    guide = AutoDelta(model)
    result = fit(model, guide, x, num_epochs=60, batch_size=50, learning_rate=0.05, seed=0, progress=False)
    return {"loss": result.loss, "weights": [p.detach().clone() for p in guide.parameters()]}


def random_draws():
    """What each rank draws first in a guide, and after the fit."""
    pyro.clear_param_store()
    torch.manual_seed(5)
    seen = []

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        weight = pyro.param("weight", torch.zeros(()))
        seen.append(torch.randn(2))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(weight, 1.0))

    fit(model, guide, torch.ones(8), num_epochs=3, seed=1, progress=False, compile=False)
    return {"draws": seen[0], "next": torch.randn(2)}


def not_finite():
    """Row 150 overflows in one rank."""
    pair = Autoencoder()
    pair.noise[150] = 1e200
    before = pair.weights
    try:
        pair.fit(num_epochs=2, batch_size=N)
    except ValueError as error:
        return str(error), all(map(torch.equal, before, pair.weights))


def other_data():
    pair = Autoencoder()
    return _message(functools.partial(pair.fit, (pair.x + ranks().rank, pair.noise)))


def other_weights():
    """Of evidence; of a part that does not train; of a data set; of what is calibrated."""
    pair = Autoencoder()
    with torch.no_grad():
        pair.decoder.bias += ranks().rank
    estimate = functools.partial(importance_sampling, num_particles=5, progress=False)
    of_evidence = _message(functools.partial(estimate, pair.model, pair.own_guide, pair.x, pair.noise))
    frozen = (pair := Autoencoder()).decoder.bias
    frozen.requires_grad_(False).add_(ranks().rank)
    pair.fit(num_epochs=1)
    pair = Autoencoder()
    own = TensorDataset(pair.x.roll(ranks().rank, 0), pair.noise)
    of_loader = _message(functools.partial(pair.fit, DataLoader(own, 32)))
    with torch.no_grad():
        pair.decoder.bias += ranks().rank
    simulate = functools.partial(simulation_based_calibration, num_simulations=10, progress=False)
    return (
        of_evidence,
        frozen,
        of_loader,
        _message(functools.partial(simulate, pair.model, pair.own_guide, pair.x, pair.noise)),
    )


def outside_of_the_plate():
    """Latents, data and factors that each rank would count, and an objective that is no sum over rows."""

    def model(x, what):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0)) if what == "latent" else pyro.param("c", torch.zeros(()))
        if what == "data":
            pyro.sample("y", dist.Normal(mean, 1.0), obs=torch.tensor(10.0))
        if what == "factor":
            pyro.factor("f", -mean.square())
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    def message(what, **options):
        pyro.clear_param_store()
        own = functools.partial(model, what=what)
        x = torch.linspace(-1, 1, 8)
        return _message(functools.partial(fit, own, AutoDelta(own), x, num_epochs=1, progress=False, **options))

    return *map(message, ("latent", "data", "factor")), message("", loss=RenyiELBO(num_particles=2))


def error_of_one():
    """Which the other rank gets too, and both go on."""
    pair = Autoencoder()

    def guide(x, noise):
        if ranks().rank == 1 and len(x) == 19:  # a chunk
            raise ValueError("of the second rank")
        pair.own_guide(x, noise)

    options = {"num_particles": 5, "progress": False, "chunk_size": 100, "compile": False}
    message = _message(functools.partial(importance_sampling, pair.model, guide, pair.x, pair.noise, **options))
    ranks().agree("after it", same=True)
    return message


def interrupted():
    """Ctrl-C in one of two, which ends both after the same step."""
    pair = Autoencoder()
    guide, steps = pair.guide, []

    def guide_of_the_second(x, noise):
        steps.append(len(x))
        if ranks().rank == ranks().size - 1 and len(steps) == 25:
            os.kill(os.getpid(), signal.SIGINT)
        guide(x, noise)

    pair.guide = guide_of_the_second
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fit: interrupted")
        found = pair.fit(compile=False)
    return {name: found[name] for name in ("interrupted", "num_steps", "weights")}


def other_calls():
    pair = Autoencoder()
    if ranks().is_first:
        return _message(pair.fit)
    return _message(functools.partial(simulation_based_calibration, pair.model, pair.guide, pair.x, pair.noise))


def few_rows():
    pair = Autoencoder()
    return _message(functools.partial(pair.fit, (pair.x[:1], pair.noise[:1])))


def one_alone():
    """The second rank has gone on meanwhile."""
    if ranks().is_first:
        with alone():
            return Autoencoder().fit(num_epochs=2)
    return None


def calibration():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    pyro.set_rng_seed(ranks().rank)
    found = simulation_based_calibration(model, guide, torch.zeros(50), num_simulations=401, progress=False)
    return {"p": float(found.p_value), "ranks": found.ranks["z"]}


def evidence():
    """In chunks of seven rows, of arguments and of a loader, and in a file that goes on."""
    pair = Autoencoder()
    pyro.set_rng_seed(1)
    options = {"num_particles": 30, "progress": False, "seed": 2, "chunk_size": 210}
    found = {
        estimator.__name__: estimator(pair.model, pair.own_guide, pair.x[:60], pair.noise[:60], **options).log_evidence
        for estimator in (importance_sampling, adaptive_importance_sampling)
    }
    rows = TensorDataset(pair.x[:60], pair.noise[:60])
    of_loader = importance_sampling(pair.model, pair.own_guide, DataLoader(rows, 25), **options)
    path = CHECKPOINT.with_suffix(".evidence")
    kept = [
        importance_sampling(pair.model, pair.own_guide, pair.x[:n], pair.noise[:n], checkpoint=path, **options)
        for n in (20, 60)
    ]
    assert torch.equal(kept[0].log_evidence, kept[1].log_evidence[:20])
    return {**found, "loader": of_loader.log_evidence, "kept": kept[1].log_evidence}


def killed(epoch=4):
    """The second rank dies after some epochs."""
    pair = Autoencoder()

    def scheduler(optimizer):
        def rate(now):
            if now == epoch and ranks().rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return 0.9**now

        return torch.optim.lr_scheduler.LambdaLR(optimizer, rate)

    return pair.fit(num_epochs=8, scheduler=scheduler, checkpoint=CHECKPOINT)


def resumed():
    """The same call, whose second rank lives; a whole run where there is no file yet."""
    return killed(epoch=None)


def resumed_draws():
    """What the ranks draw after a file that one process wrote."""
    path = CHECKPOINT.with_name(f"draws{ranks().size}.checkpoint")
    if ranks().is_first:
        with alone():
            Autoencoder().fit(num_epochs=1, checkpoint=path)
    ranks().gather(0)
    pair = Autoencoder()
    seen, guide = [], pair.guide

    def guide_that_draws(x, noise):
        seen.append(torch.randn(2))
        guide(x, noise)

    pair.guide = guide_that_draws
    pair.fit(num_epochs=2, checkpoint=path, compile=False)
    return seen[-1]


def _message(function):
    try:
        function()
    except ValueError as error:
        return str(error)
    return None


def main(folder, *names):
    global CHECKPOINT
    torch.set_default_dtype(torch.float64)
    CHECKPOINT = Path(folder) / "fit.checkpoint"
    if ranks().several:
        found = {name: globals()[name]() for name in names}
        torch.save(found, Path(folder) / f"{ranks().rank}.pt")
    if ranks().is_first:
        with alone():
            CHECKPOINT = Path(folder) / "of_one.checkpoint"
            torch.save({name: globals()[name]() for name in names}, Path(folder) / "one.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
