"""Statistics of HMC and NUTS, against counts of the model's own runs and what Hamiltonian dynamics say."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import HMC, MCMC, NUTS
from trees import dims

from pyro_vae import from_pyro
from pyro_vae.integrations.sampler_statistics import with_statistics

DIM = 5


def gaussian():
    pyro.sample("z", dist.Normal(torch.zeros(DIM), torch.arange(1.0, DIM + 1)).to_event(1))


class Counted:
    """A model that counts its runs."""

    def __init__(self):
        self.count, self.after = 0, []

    def __call__(self):
        self.count += 1
        return gaussian()

    def hook(self, kernel, params, stage, i):
        """After each draw: how often the model has run, U(z), the step size and the mean acceptance."""
        rate = float(kernel.logging()["acc. prob"])
        self.after.append((stage, self.count, float(kernel.potential_fn(params)), kernel.step_size, rate))
        self.count = 0


def sampled(kernel, hook=None, num_samples=100, warmup_steps=50, **options):
    given = {"num_samples": num_samples, "warmup_steps": warmup_steps, "hook_fn": hook, "disable_progbar": True}
    mcmc = MCMC(kernel, **given, **options)
    mcmc.run()
    return mcmc


@pytest.mark.parametrize(
    "kernel", [lambda model: NUTS(model), lambda model: NUTS(model, use_multinomial_sampling=False),
               lambda model: HMC(model, step_size=0.5, num_steps=4)],
    ids=["NUTS", "NUTS by slices", "HMC"],
)  # fmt: skip
def test_statistics(kernel):
    pyro.set_rng_seed(0)
    model = Counted()
    mcmc = sampled(with_statistics(kernel(model)), model.hook)
    tree = from_pyro(mcmc)
    stats = {name: torch.tensor(tree["sample_stats"][name].values[0]) for name in dims(tree, "sample_stats")}
    draws = [after for stage, *after in model.after if stage.startswith("Sample")]
    runs, potential, step_size, mean = (
        torch.tensor(column, dtype=torch.float64) for column in zip(*draws, strict=True)
    )
    assert torch.equal(stats["n_steps"].double(), runs)  # one run of the model for each leapfrog step
    torch.testing.assert_close(stats["lp"].double(), -potential, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(stats["step_size"].double(), step_size)
    assert stats["acceptance_rate"].mean().item() == pytest.approx(mean[-1].item(), abs=1e-3)
    assert ((stats["acceptance_rate"] >= 0) & (stats["acceptance_rate"] <= 1)).all()
    kinetic = stats["energy"] + stats["lp"]  # ½ rᵀr of D standard normal momenta
    assert (kinetic > 0).all()
    assert kinetic.mean().item() == pytest.approx(DIM / 2, abs=5 * math.sqrt(DIM / 2 / 100))
    if "tree_depth" in stats:
        depth = stats["tree_depth"]
        assert ((2**depth - 1 <= stats["n_steps"]) & (stats["n_steps"] <= 2 ** (depth + 1) - 1)).all()
        assert not stats["reached_max_treedepth"].any()


def test_energy_is_kept_by_small_steps():
    """With tiny steps H is conserved: the kinetic energy makes up for what the potential has changed."""
    pyro.set_rng_seed(0)
    kernel = with_statistics(HMC(gaussian, step_size=0.01, num_steps=50, adapt_step_size=False))
    starts = []
    sample = kernel._sample_r

    def noting(name):
        found = sample(name)
        starts.append(0.5 * sum(float(r.dot(r)) for r in found[1].values()))
        return found

    kernel._sample_r = noting
    potentials = []
    hook = lambda kernel, params, stage, i: potentials.append(float(kernel.potential_fn(params)))  # noqa: E731
    mcmc = sampled(kernel, hook, num_samples=20, warmup_steps=5)
    energy = torch.tensor(from_pyro(mcmc)["sample_stats"]["energy"].values[0])
    before = torch.tensor(potentials[-21:-1]) + torch.tensor(starts[-20:])
    torch.testing.assert_close(energy.double(), before.double(), atol=2e-3, rtol=2e-3)


def test_draws_are_those_without_statistics():
    found = []
    for make in (lambda kernel: kernel, with_statistics):
        pyro.set_rng_seed(0)
        found.append(sampled(make(NUTS(gaussian)), num_samples=20, warmup_steps=20).get_samples()["z"])
    assert torch.equal(*found)


def test_a_deep_tree_and_divergences():
    pyro.set_rng_seed(0)
    fixed = {"adapt_step_size": False, "adapt_mass_matrix": False}
    mcmc = sampled(with_statistics(NUTS(gaussian, max_tree_depth=1, step_size=0.1, **fixed)), num_samples=20)
    stats = from_pyro(mcmc)["sample_stats"]
    assert stats["reached_max_treedepth"].values.any()
    assert (stats["n_steps"].values == 1).all()

    mcmc = sampled(with_statistics(NUTS(gaussian, step_size=100.0, **fixed)), num_samples=20)
    stats = from_pyro(mcmc)["sample_stats"]
    assert stats["diverging"].values.any()
    assert (stats["tree_depth"].values[stats["diverging"].values] == 0).all()


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_chains_in_processes(monkeypatch):
    monkeypatch.setattr(torch.multiprocessing, "cpu_count", lambda: 3)
    mcmc = sampled(with_statistics(NUTS(gaussian)), num_samples=10, warmup_steps=20, num_chains=2)
    tree = from_pyro(mcmc)
    assert tree["sample_stats"]["energy"].shape == (2, 10)
    assert (tree["sample_stats"]["energy"].values > -tree["sample_stats"]["lp"].values).all()


def test_without_statistics_there_is_what_pyro_keeps():
    mcmc = sampled(NUTS(gaussian), num_samples=10, warmup_steps=20)
    tree = from_pyro(mcmc)
    assert set(dims(tree, "sample_stats")) == {"diverging", "lp", "step_size"}
    assert tree["sample_stats"].attrs["fraction_accepted"] == mcmc.diagnostics()["acceptance rate"]["chain 0"]


def test_other_kernels_are_refused():
    with pytest.raises(TypeError, match=r"with_statistics: expected a pyro.infer.NUTS or HMC, got function"):
        with_statistics(gaussian)
