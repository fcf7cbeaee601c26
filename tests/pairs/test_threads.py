"""One thread at a time: who is refused, who is not, and that no public function that runs a pair is left out."""

import doctest
import importlib
import inspect
import os
import pkgutil
import random
import signal
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vae
from pyro_vae import VAE, fit, importance_sampling, sandwich
from pyro_vae.distributions import ConditionalNormal, StandardNormal
from pyro_vae.networks import MLP
from pyro_vae.pairs import threads
from pyro_vae.pairs.threads import one_thread

NO_DOORS = {
    "arguments",
    "checkpoint",
    "distributions",
    "pairs",
}  # the last is what the doors open to, the others know no pair
PARTS_OF_ARVIZ = ("arviz_", "sampler_")  # names of modules that `integrations.arviz` is made of
NEED_NO_DOOR = {
    "VAE.model": "the pair itself, which the functions with a door run",
    "VAE.guide": "the pair itself",
    "VAE.sample_model": "a part of a pair",
    "VAE.sample_guide": "a part of a pair",
    "VAE.likelihood_given": "a part of a pair",
    "VAE.posterior_given": "a part of a pair",
    "VAE.frozen": "copies a VAE",
    "VAE.train": "a mode of a module",
    "stack": "makes a VAE",
    "compare": "takes estimates",
    "pareto_khat": "takes weights",
    "leave_one_out": "takes log-likelihoods",
    "log_predictive": "takes log-likelihoods",
    "linear": "a schedule",
    "cyclical": "a schedule",
    "gaussian_noise": "of tensors",
    "masking_noise": "of tensors",
    "salt_and_pepper_noise": "of tensors",
    "CompiledELBO.find": "a part of `fit` and of the losses, which have one",
    "CompiledELBO.run": "a part of `fit` and of the losses, which have one",
    "BetaELBO.set_step": "takes a number",
    "BetaELBO.not_a_bound": "gives a text",
    "Calibration.ecdf_bands": "looks at ranks",
    "Calibration.plot": "draws ranks",
    "Calibration.to_arviz": "takes ranks",
    "Coverage.bands": "looks at ranks",
    "Coverage.plot": "draws ranks",
    "InferenceGaps.plot": "draws gaps",
    "CombinedELBO.set_step": "takes a number",
    "CombinedELBO.not_a_bound": "gives a text",
    "FitResult.add_epoch": "takes losses",
    "FitResult.stalled": "looks at losses",
} | {
    f"{guide}.{part}": "a part of a pair"
    for guide in ("AmortizedNormal", "AmortizedMultivariateNormal", "AmortizedFlow", "RefinedGuide")
    for part in ("forward", "set_up", "register", "make_chain", "make_head", "chain_of", "family", "load_state_dict")
    if (guide, part) != ("AmortizedFlow", "family")
    and (guide != "RefinedGuide" or part in ("forward", "set_up", "register", "make_chain", "load_state_dict"))
}


def public_functions():
    """{name: function} of all that packages export, and of the public methods of classes among these."""
    rooms = [name for _, name, package in pkgutil.iter_modules(pyro_vae.__path__) if package and name not in NO_DOORS]
    found = {}
    for room in rooms:
        package = importlib.import_module(f"pyro_vae.{room}")
        modules = [package]
        if not hasattr(package, "__all__"):
            names = [
                name for _, name, _ in pkgutil.iter_modules(package.__path__) if not name.startswith(PARTS_OF_ARVIZ)
            ]
            modules = [importlib.import_module(f"{package.__name__}.{name}") for name in names]
        for module in modules:
            for name in getattr(module, "__all__", ()):
                value = getattr(module, name)
                if inspect.isfunction(value):
                    found[name] = value
                if inspect.isclass(value):
                    found |= {
                        f"{name}.{n}": f
                        for n, f in inspect.getmembers(value, inspect.isfunction)
                        if not n.startswith("_") and f.__module__.partition(".")[0] in ("pyro_vae", "pyro")
                    }
    return found


@contextmanager
def somebody_inside():
    """Another thread, inside a function called `elsewhere`."""
    entered, leave = threading.Event(), threading.Event()

    @one_thread
    def elsewhere():
        entered.set()
        leave.wait(60)

    with ThreadPoolExecutor(1, "other") as pool:
        done = pool.submit(elsewhere)
        assert entered.wait(60)
        try:
            yield
        finally:
            leave.set()
            done.result()


@one_thread
def seen():
    return "seen"


def seen_elsewhere():
    with ThreadPoolExecutor(1, "other") as pool:
        return pool.submit(seen).result()


def make_vae(seed):
    torch.manual_seed(seed)
    return VAE(StandardNormal(1), ConditionalNormal(MLP(1, [4]), 3, scale=1.0), ConditionalNormal(MLP(3, [4]), 1))


FUNCTIONS = public_functions()


def test_the_list_of_those_without_a_door_has_no_strangers():
    assert NEED_NO_DOOR.keys() <= FUNCTIONS.keys()
    top = {n for n in pyro_vae.__all__ if inspect.isfunction(getattr(pyro_vae, n))}
    assert top <= FUNCTIONS.keys()
    assert {
        "fit",
        "VAE.generate",
        "from_pyro",
        "VAETransformer.fit",
        "BetaELBO.differentiable_loss",
    } <= FUNCTIONS.keys()


@pytest.mark.parametrize("name", sorted(FUNCTIONS.keys() - NEED_NO_DOOR.keys()))
def test_every_public_function_that_runs_a_pair_has_a_door(name):
    parameters = inspect.signature(FUNCTIONS[name]).parameters.values()
    required = [
        p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    with somebody_inside(), pytest.raises(RuntimeError) as error:
        FUNCTIONS[name](*[None] * len(required))
    message = str(error.value)
    assert message.startswith(f"{FUNCTIONS[name].__qualname__}: expected one thread at a time")
    assert "elsewhere runs in thread 'other_0'" in message
    assert "Try one process for each" in message


def test_of_two_fits_in_two_threads_one_trains_as_it_does_alone_and_one_is_refused():
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    options = {"num_epochs": 5, "batch_size": 16, "learning_rate": 0.01, "seed": 1, "progress": False}
    alone = make_vae(0)
    fit(alone.model, alone.guide, x, **options)

    first, second = make_vae(0), make_vae(1)
    before = {name: value.clone() for name, value in second.state_dict().items()}
    inside, tried = threading.Event(), threading.Event()
    calls = []

    def model(x):
        calls.append(1)
        if len(calls) == 10:  # in the middle of a step
            inside.set()
            assert tried.wait(60)
        return first.model(x)

    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(fit, model, first.guide, x, **options)
        assert inside.wait(60)
        other = pool.submit(fit, second.model, second.guide, x, **options)
        error = other.exception()
        tried.set()
        one.result()
    assert isinstance(error, RuntimeError)
    assert str(error).startswith("fit: expected one thread")
    for name, value in alone.state_dict().items():
        assert torch.equal(first.state_dict()[name], value), name
    for name, value in before.items():
        assert torch.equal(second.state_dict()[name], value), name
    fit(second.model, second.guide, x, **options)  # its turn


def model_of(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide_of(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 1.0))


def test_calls_inside_a_call_pass_and_leave_the_door_shut():
    vae, x = make_vae(0), torch.randn(8, 3)
    seen_inside = []

    def scheduler(optimizer):
        seen_inside.append(importance_sampling(vae.model, vae.guide, x, num_particles=10, progress=False))
        with pytest.raises(RuntimeError, match=r"seen: expected one thread .* while fit runs in thread 'MainThread'"):
            seen_elsewhere()
        return torch.optim.lr_scheduler.StepLR(optimizer, 1)

    fit(vae.model, vae.guide, x, num_epochs=1, scheduler=scheduler, progress=False)
    assert len(seen_inside) == 1
    sandwich(model_of, guide_of, torch.zeros(5), estimator=importance_sampling, num_particles=10, progress=False)
    assert seen_elsewhere() == "seen"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit, SystemExit])
def test_the_door_opens_after_an_error(error):
    def model(x):
        raise error

    with pytest.raises(error):
        importance_sampling(model, guide_of, torch.zeros(5), num_particles=10, plate=None)
    assert seen_elsewhere() == "seen"


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers here")
def test_the_door_opens_wherever_an_interrupt_comes():
    def interrupt(*_):
        raise KeyboardInterrupt

    rng = random.Random(0)
    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        with ThreadPoolExecutor(1) as pool:
            for _ in range(300):
                try:
                    signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-5, 5e-4))
                    while True:
                        seen()
                except KeyboardInterrupt:
                    pass
                assert pool.submit(seen).result() == "seen"
    finally:
        signal.signal(signal.SIGALRM, previous)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks here")
@pytest.mark.parametrize("holder", ["another thread", "this thread", "the lock"])
def test_a_forked_child_is_free(holder):
    def fork():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forks beside threads
            pid = os.fork()
        if pid == 0:
            signal.alarm(30)  # rather than wait for a lock for ever
            try:
                both = seen(), seen_elsewhere()
                os._exit(0 if both == ("seen", "seen") else 1)
            except BaseException:
                os._exit(2)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    if holder == "another thread":
        with somebody_inside():
            assert fork() == 0
            with pytest.raises(RuntimeError, match="one thread"):
                seen()
    elif holder == "this thread":
        assert one_thread(fork)() == 0
    else:
        with threads._lock:
            assert fork() == 0


def test_functions_look_as_they_did():
    assert list(inspect.signature(fit).parameters)[:4] == ["model", "guide", "data", "num_epochs"]
    assert (fit.__name__, fit.__qualname__, fit.__module__) == ("fit", "fit", "pyro_vae.training.loop")
    assert fit.__annotations__["return"] == "FitResult"
    for module in ("training.loop", "evidence.importance", "integrations.arviz"):
        module = importlib.import_module(f"pyro_vae.{module}")
        found = {test.name.rpartition(".")[2] for test in doctest.DocTestFinder().find(module) if test.examples}
        assert {n for n in module.__all__ if inspect.isfunction(getattr(module, n))} <= found


def test_functions_that_return_before_they_are_done_are_refused():
    def generate():
        yield 1

    async def wait():
        pass

    for function in (generate, wait):
        with pytest.raises(TypeError, match="one_thread: expected a function that is done"):
            one_thread(function)
