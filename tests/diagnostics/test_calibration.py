"""Calibration of guides that are exact, and of guides that are known to be wrong, on models with known posteriors."""

import math
import time

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from truths import LinearGaussian
from truths.hierarchical import RandomEffects
from truths.one_latent import exact_pair

from pyro_vae.diagnostics import simulation_based_calibration
from pyro_vae.diagnostics.ecdf_bands import uniform_p_values
from pyro_vae.diagnostics.simulated_draws import guide_draws, log_likelihood
from pyro_vae.diagnostics.simulations import Simulator
from pyro_vae.particles.sampler import ParticleSampler

TRUTH = LinearGaussian(2, 3)
ROWS = torch.zeros(100, 3)


def gaussian_guide(widen=1.0, shift=0.0):
    def guide(x):
        with pyro.plate("data", len(x)):
            q = TRUTH.posterior(x, widen)
            loc = q.loc + shift * TRUTH.covariance.diagonal().sqrt().float()
            pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=q.scale_tril))

    return guide


def prior(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))


def all_p_values(found):
    return torch.cat([p.flatten() for p in found.p_values.values()])


# -- exact guides pass at the nominal rate, wrong ones are found ------------------------------------------------------


def test_the_exact_guide_passes_at_the_nominal_rate():
    """P-values are below 0.05 as often as 5 % says, and the ranks of all simulations together are uniform."""
    found = [simulation_based_calibration(TRUTH.model, gaussian_guide(), ROWS, num_simulations=200) for _ in range(20)]
    p = torch.stack([all_p_values(f) for f in found])  # (20, 3), of which those of a run depend on each other
    assert (p < 0.05).double().mean() < 0.05 + 4 * math.sqrt(0.05 * 0.95 / 20)
    assert sum(f.p_value < 0.05 for f in found) <= 4  # of 20: P(more) = 0.0026
    for name in ("z", "log_likelihood"):
        assert uniform_p_values(torch.cat([f.ranks[name] for f in found]), 100).min() > 1e-3


@pytest.mark.parametrize(
    ("guide", "what"),
    [
        (gaussian_guide(1.3), "too wide"),
        (gaussian_guide(1 / 1.3), "too narrow"),
        (gaussian_guide(1.0, 0.3), "too high"),
    ],
)
def test_wrong_guides_are_found_and_their_fault_is_named(guide, what):
    found = simulation_based_calibration(TRUTH.model, guide, ROWS)
    assert found.p_value < 0.001
    assert what in repr(found)
    assert found.num_simulations == 500
    for method in ("adaptive", "importance"):  # which need the guide as a start only
        better = simulation_based_calibration(TRUTH.model, guide, ROWS, num_simulations=300, method=method)
        assert better.p_value > 0.001


def test_the_prior_is_found_by_the_likelihood_only():
    found = simulation_based_calibration(TRUTH.model, prior, ROWS)
    assert found.p_values["z"].min() > 0.001
    assert found.p_values["log_likelihood"] < 1e-10
    assert "explain x worse than z*" in repr(found)
    assert found.contraction["z"].mean().abs() < 4 * math.sqrt(2 / 500 / 2)  # two prior variances of 500 draws


def test_500_simulations_take_no_minute():
    start = time.perf_counter()
    simulation_based_calibration(TRUTH.model, gaussian_guide(), ROWS)
    assert time.perf_counter() - start < 10


def test_z_scores_and_contraction_in_closed_form():
    """z-scores of the exact Gaussian posterior are those of Student's t, nearly; contraction is 1 − C_dd / 1."""
    found = simulation_based_calibration(TRUTH.model, gaussian_guide(), ROWS, num_simulations=2000)
    z, size, draws = found.z_scores["z"], 2000, 100
    variance = (1 + 1 / draws) * (draws - 1) / (draws - 3)
    assert (z.mean(0).abs() < 4 * math.sqrt(variance / size)).all()
    assert ((z.square().mean(0) - variance).abs() < 4 * math.sqrt(2.2 / size)).all()
    expected = 1 - TRUTH.covariance.diagonal()
    error = 4 * math.sqrt(2 / size) * (1 - expected)  # of the prior variance over simulations
    assert ((found.contraction["z"].mean(0) - expected).abs() < error + 0.01).all()


# -- models of all kinds ----------------------------------------------------------------------------------------------


def beta_binomial():
    """With a count of trials for each row, passed by name, of which the posterior depends."""

    def model(*, n, x):
        with pyro.plate("data", len(x)):
            p = pyro.sample("p", dist.Beta(2.0, 3.0))
            pyro.sample("x", dist.Binomial(n, p), obs=x)

    def guide(*, n, x, factor=1.0):
        with pyro.plate("data", len(x)):
            pyro.sample("p", dist.Beta((2 + x) * factor, (3 + n - x) * factor))

    return model, guide, (), {"n": torch.arange(1.0, 41.0), "x": torch.zeros(40)}, 2.0


def gamma_poisson():
    """With an exposure for each row, and counts in an inner plate."""

    def model(t, x):
        with pyro.plate("data", len(x), dim=-2):
            rate = pyro.sample("rate", dist.Gamma(torch.full((1,), 2.0), 1.0))
            with pyro.plate("counts", 3, dim=-1):
                pyro.sample("x", dist.Poisson(rate * t[:, None]), obs=x)

    def guide(t, x, factor=1.0):
        with pyro.plate("data", len(x), dim=-2):
            shape = 2 + x.sum(-1, keepdim=True)
            pyro.sample("rate", dist.Gamma(shape * factor, (1 + 3 * t[:, None]) * factor))

    return model, guide, (torch.rand(30) + 0.5, torch.zeros(30, 3)), {}, 2.0


def masked_levels():
    """A vector for each row, numbers of an inner plate that are masked with what is observed of them, and a scale."""

    def model(x, mask):
        with pyro.plate("data", len(x), dim=-2), poutine.scale(scale=3.0):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            with pyro.plate("inner", 4, dim=-1), poutine.mask(mask=mask):
                y = pyro.sample("y", dist.Normal(z[..., 0], 1.0))
                pyro.sample("x", dist.Normal(y, 1.0), obs=x)

    def guide(x, mask, factor=1.0):
        precision = 1 + mask.sum(-1, keepdim=True) / 2
        loc = (x * mask).sum(-1, keepdim=True) / 2 / precision
        with pyro.plate("data", len(x), dim=-2):
            scale = torch.stack([precision.rsqrt(), torch.ones_like(precision)], -1)
            z = pyro.sample("z", dist.Normal(torch.stack([loc, 0 * loc], -1), scale).to_event(1))
            with pyro.plate("inner", 4, dim=-1), poutine.mask(mask=mask):
                y = dist.Normal(torch.where(mask, (x + z[..., 0]) / 2, 9.0), math.sqrt(0.5) * factor)
                pyro.sample("y", y)

    return model, guide, (torch.zeros(30, 4), torch.rand(30, 4) < 0.7), {}, 0.6


def mixture(drawn):
    """A component that is summed out in the model, or drawn by the guide."""

    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(0.3))
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + 2 * c, 1.0), obs=x)

    def guide(x, factor=1.0):
        log_joint = [dist.Normal(2.0 * c, math.sqrt(2)).log_prob(x) + math.log([0.7, 0.3][c]) for c in range(2)]
        scale = math.sqrt(0.5) * factor
        with pyro.plate("data", len(x)):
            if drawn:
                c = pyro.sample("c", dist.Bernoulli(logits=log_joint[1] - log_joint[0]))
                pyro.sample("z", dist.Normal((x - 2 * c) / 2, scale))
            else:
                parts = dist.Normal(torch.stack([x / 2, (x - 2) / 2], -1), scale)
                shares = dist.Categorical(logits=torch.stack(log_joint, -1))
                pyro.sample("z", dist.MixtureSameFamily(shares, parts))

    return config_enumerate(model), guide, (torch.zeros(50),), {}, 0.6


def auxiliary():
    def guide(x, factor=1.0):
        with pyro.plate("data", len(x)):
            u = pyro.sample("u", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
            scale = math.sqrt(0.5) * factor
            pyro.sample("z", dist.Delta(x / 2 + scale * u, log_density=torch.full(x.shape, -math.log(scale))))

    return exact_pair()[0], guide, (torch.zeros(50),), {}, 0.6


def globals_and_locals():
    truth = RandomEffects()
    return truth.model, lambda x, factor=1.0: truth.guide(x, factor), (torch.zeros(6),), {"plate": None}, 2.0


PAIRS = {
    "beta-binomial": beta_binomial,
    "gamma-poisson": gamma_poisson,
    "masked levels": masked_levels,
    "mixture": lambda: mixture(False),
    "mixture, component drawn": lambda: mixture(True),
    "auxiliary": auxiliary,
    "globals": globals_and_locals,
}


@pytest.mark.parametrize("name", PAIRS)
def test_exact_and_wrong_guides_of_all_kinds(name):
    model, guide, args, kwargs, factor = PAIRS[name]()
    options = {"num_simulations": 150 if name == "globals" else 300, "seed": 1}
    found = simulation_based_calibration(model, guide, *args, **kwargs, **options)
    assert found.p_value > 0.01

    def wrong(*a, **k):
        return guide(*a, **k, factor=factor)

    assert simulation_based_calibration(model, wrong, *args, **kwargs, **options).p_value < 1e-4


def test_shapes_and_names():
    model, guide, args, _, _ = masked_levels()
    found = simulation_based_calibration(model, guide, *args, num_simulations=70, num_draws=9, seed=0)
    assert {name: tuple(r.shape) for name, r in found.ranks.items()} == {
        "z": (70, 2),
        "y": (70, 4),
        "log_likelihood": (70,),
    }
    assert 0.6 < (found.ranks["y"] >= 0).double().mean() < 0.8  # −1 where masked
    assert found.pit["y"].isnan().equal(found.ranks["y"].cpu() < 0)
    again = simulation_based_calibration(model, guide, *args, num_simulations=70, num_draws=9, seed=0)
    assert all(torch.equal(r, again.ranks[name]) for name, r in found.ranks.items())
    drawn = simulation_based_calibration(*mixture(True)[:2], torch.zeros(50), num_simulations=20)
    assert set(drawn.ranks) == {"c", "z", "log_likelihood"}
    summed = simulation_based_calibration(*mixture(False)[:2], torch.zeros(50), num_simulations=20)
    assert set(summed.ranks) == {"z", "log_likelihood"}


def test_one_particle_at_a_time_is_the_same():
    model, guide = exact_pair()
    options = {"num_simulations": 200, "num_draws": 9, "parallel": False}
    assert simulation_based_calibration(model, guide, torch.zeros(100), **options).p_value > 0.005


def test_a_likelihood_that_knows_nothing_of_the_latent_has_ties():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(0 * z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0 * x, 1.0))

    assert simulation_based_calibration(model, guide, torch.zeros(50)).p_value > 0.01


def test_the_likelihood_of_a_mixture_has_its_component_summed_out():
    model, guide, args, _, _ = mixture(False)
    sampler = ParticleSampler(model, guide, args)
    with torch.no_grad():
        batch = Simulator(sampler, "a test").draw(torch.arange(30))
        with sampler.rows.using(*batch.arguments):
            draws = guide_draws(sampler, batch, 4)
            found = log_likelihood(sampler, batch, draws)
    z, x = torch.cat([batch.latents["z"], draws["z"]]), batch.arguments[0][0]
    parts = [dist.Normal(z + 2 * c, 1.0).log_prob(x) + math.log([0.7, 0.3][c]) for c in range(2)]
    exact = torch.stack(parts).logsumexp(0)
    torch.testing.assert_close(found, exact)


# -- refused ----------------------------------------------------------------------------------------------------------


def test_what_is_refused():
    model, guide = exact_pair()
    x = torch.zeros(20)
    truth = RandomEffects()
    with pytest.raises(ValueError, match=r"site .m. of the guide is outside plate .data.*plate=None"):
        simulation_based_calibration(truth.model, truth.guide, x)
    with pytest.raises(ValueError, match=r"method: expected one of 'guide', 'adaptive'.*got 'prior'"):
        simulation_based_calibration(model, guide, x, method="prior")
    with pytest.raises(ValueError, match="num_simulations: expected at least 1, got 0"):
        simulation_based_calibration(model, guide, x, num_simulations=0)

    def fails(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.where(x < 3, x, torch.nan), 1.0))

    with pytest.raises(ValueError, match=r"site .z. of the guide: draws that are NaN on simulated data"):
        simulation_based_calibration(model, fails, x, num_simulations=3000)

    def centred(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x - 1)

    with pytest.raises(ValueError, match=r"site .x.: its observed value is none of the arguments"):
        simulation_based_calibration(centred, guide, x)

    def point(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(x / 2))

    assert "too narrow" in repr(simulation_based_calibration(model, point, x))
    with pytest.raises(ValueError, match="is a point"):
        simulation_based_calibration(model, point, x, method="importance")
