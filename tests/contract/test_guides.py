"""The laws that every guide keeps, in every kind of model; a new guide adds its line to `guides.py`."""

import copy
import inspect
import io
import math
import pickle

import pyro
import pytest
import torch
from guides import CASES, GUIDES, make
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal

from pyro_vae import CompiledELBO, guides, importance_sampling
from pyro_vae.evidence.density import LatentDensity
from pyro_vae.pairs.modes import evaluation_mode
from pyro_vae.pairs.sites import sample_sites
from pyro_vae.particles.sampler import ParticleSampler

PAIRS = [(g, c) for g in GUIDES for c in CASES if (g, c) != ("flow", "masked")]
laws = pytest.mark.parametrize(("guide", "case"), PAIRS, ids=[f"{g} {c}" for g, c in PAIRS])
KNOWN = [(g, c) for g, c in PAIRS if c != "groups"]
known = pytest.mark.parametrize(("guide", "case"), KNOWN, ids=[f"{g} {c}" for g, c in KNOWN])
# distributions of the others' models choose elements by their values, which nobody can record
RECORDED = [(g, c) for g, c in KNOWN if c != "conjugates"]


def pair(guide, case):
    case = CASES[case]()
    return case, make(guide, case)


def objective(case):
    enumerates = "enumeration" in (case.model.__doc__ or "")
    return TraceEnum_ELBO(max_plate_nesting=2) if enumerates else Trace_ELBO()


def latent_sites(guide, case):
    trace = poutine.trace(guide).get_trace(*case.args)
    trace.compute_log_prob()
    return sample_sites(trace)


def test_every_guide_is_listed():
    classes = {c for name in guides.__all__ if inspect.isclass(c := getattr(guides, name))}
    assert classes == set(GUIDES.values())


@known
def test_its_density_is_that_of_its_draws(guide, case):
    """E p(x, z)/q(z|x) = p(x), whatever q: log p(x) within its standard errors, which half of the draws from the prior
    keep honest where q is far off."""
    case, guide = pair(guide, case)
    options = {"num_particles": 8000, "defensive": 0.5, "compile": False, "seed": 0}
    found = importance_sampling(case.model, guide, *case.args, **options)
    error = (found.log_evidence - case.log_evidence).abs()
    assert (error < 4.5 * found.standard_error + 1e-4).all(), (error / found.standard_error).max()
    assert found.standard_error.median() < 0.3


@laws
def test_a_value_from_elsewhere_has_the_density_of_the_draw(guide, case):
    case, guide = pair(guide, case)
    sites = latent_sites(guide, case)
    values = {name: site["value"].clone() for name, site in sites.items()}
    again = latent_sites(poutine.condition(guide, values), case)
    for name, site in sites.items():
        torch.testing.assert_close(site["log_prob"], again[name]["log_prob"], rtol=1e-3, atol=1e-3)
        assert site["log_prob"].shape == site["fn"].batch_shape


@known
def test_one_particle_at_a_time_is_the_same(guide, case):
    """At the same u, the density of model and guide in both ways to run; chunks of rows are parts of the whole."""
    case, guide = pair(guide, case)
    found = []
    for parallel in (True, False):
        sampler = ParticleSampler(case.model, guide, case.args, {}, parallel=parallel)
        with torch.no_grad(), evaluation_mode(guide):
            u = torch.linspace(-1.0, 1.0, 2 * 6 * guide.latents.dim).reshape(2, 6, -1)
            found.append(torch.stack(LatentDensity(sampler).log_all(u)))
            some = slice(2, 5)
            found.append(torch.stack(LatentDensity(sampler, some).log_all(u[:, some])))
    assert found[0].isfinite().all()
    torch.testing.assert_close(found[0], found[2], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[0][:, :, 2:5], found[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[1], found[3], rtol=1e-4, atol=1e-4)


@laws
def test_rows_are_independent_of_each_other(guide, case):
    case, guide = pair(guide, case)
    q, some = guide.get_posterior(*case.args), guide.get_posterior(*(a[2:5] for a in case.args))
    u = q.sample()
    assert q.batch_shape == (6,)
    torch.testing.assert_close(some.log_prob(u[2:5]), q.log_prob(u)[2:5])


@laws
def test_the_joint_posterior_is_the_product_of_its_sites(guide, case):
    """log q(u|x) − log |dz/du| = Σ log q(z_i|…), with the log-determinants of torch's bijections."""
    case, guide = pair(guide, case)
    sites, rows, log_det = latent_sites(guide, case), [], 0.0
    for latent in guide.latents.inside:
        fn, value = sites[latent.name]["fn"], sites[latent.name]["value"]
        transform = torch.distributions.biject_to(fn.support)
        u = transform.inv(value)
        rows.append(latent.to_rows(u))
        jacobian = transform.log_abs_det_jacobian(u, value)
        log_det = log_det + jacobian.sum(-1) if jacobian.dim() > len(fn.batch_shape) else log_det + jacobian
    if guide.latents.nesting > 1:
        return  # sites have different plates: the law above holds them
    inside = sum(sites[latent.name]["log_prob"] for latent in guide.latents.inside)
    scale = sites[guide.latents.inside[0].name]["scale"]
    expected = (guide.get_posterior(*case.args).log_prob(torch.cat(rows, -1)) - log_det) * scale
    torch.testing.assert_close(inside, expected, rtol=1e-3, atol=1e-3)


@laws
def test_gradients_reach_every_parameter(guide, case):
    case, guide = pair(guide, case)
    objective(case).differentiable_loss(case.model, guide, *case.args).backward()
    parameters = {**dict(guide.network.named_parameters()), **dict(guide.head.named_parameters())}
    assert [name for name, p in parameters.items() if p.grad is None] == []
    assert all(p.grad.isfinite().all() for p in parameters.values())


@laws
def test_copies_and_pickles_are_the_same_and_their_own(guide, case):
    case, guide = pair(guide, case)
    u = guide.get_posterior(*case.args).sample()
    expected = guide.get_posterior(*case.args).log_prob(u)
    again = [copy.deepcopy(guide), pickle.loads(pickle.dumps(guide))]
    for other in again:
        torch.testing.assert_close(other.get_posterior(*case.args).log_prob(u), expected)
    file = io.BytesIO()
    torch.save(guide.state_dict(), file)
    with torch.no_grad():
        for p in again[0].parameters():
            p.add_(0.5)
    torch.testing.assert_close(guide.get_posterior(*case.args).log_prob(u), expected)
    file.seek(0)
    again[0].load_state_dict(torch.load(file, weights_only=True))
    torch.testing.assert_close(again[0].get_posterior(*case.args).log_prob(u), expected)


@laws
def test_medians_and_quantiles_are_those_of_the_draws(guide, case):
    case, guide = pair(guide, case)
    levels = [0.1, 0.5, 0.9]
    found = guide.quantiles(levels, *case.args)
    draws = guide.sample_posterior(*case.args, num_samples=1500, seed=5)
    assert found.keys() == draws.keys()
    for name, value in found.items():
        assert value.shape == (3, *draws[name].shape[1:])
        for level, quantile in zip(levels, value, strict=True):
            share = (draws[name] <= quantile).double().mean(0)
            inside = (quantile > draws[name].min(0).values) & (quantile < draws[name].max(0).values)
            noise = math.sqrt(level * (1 - level) * (1 / 1500 + 1 / 10_000))
            assert ((share - level).abs() < 5 * noise)[inside].all(), (name, level)
    medians = guide.median(*case.args)
    assert all(medians[name].shape == draws[name].shape[1:] for name in draws)


@pytest.mark.parametrize(("guide", "case"), RECORDED, ids=[f"{g} {c}" for g, c in RECORDED])
def test_compiled_it_has_the_same_loss(guide, case):
    case, guide = pair(guide, case)
    elbo = objective(case)
    compiled = CompiledELBO(elbo, backend="eager")
    for _ in range(4):
        losses = []
        for loss in (elbo, compiled):
            torch.manual_seed(7)
            losses.append(loss.loss_and_grads(case.model, guide, *case.args))
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("guide", GUIDES)
def test_a_mini_batch_counts_for_all_rows(guide):
    """N/B scales what is inside of the plate, in the guide as in the model, and nothing outside."""
    case, guide = pair(guide, "groups")
    sites = latent_sites(guide, case)
    assert {name: float(site["scale"]) for name, site in sites.items() if name in ("tril", "mean")} == {
        "tril": 2.0,
        "mean": 2.0,
    }
    assert all(float(s["scale"]) == 1.0 for n, s in sites.items() if n not in ("tril", "mean"))


@pytest.mark.parametrize("guide", ["normal", "full"])
def test_a_closed_form_kl_divergence_is_used(guide):
    """TraceMeanField_ELBO has the value of Trace_ELBO, and for Gaussians less noise."""
    case, guide = pair(guide, "vector")
    losses = []
    for elbo in (Trace_ELBO(), TraceMeanField_ELBO()):
        torch.manual_seed(0)
        losses.append(torch.tensor([elbo.loss(case.model, guide, *case.args) for _ in range(150)]))
    error = (losses[0].var() / 150 + losses[1].var() / 150).sqrt()
    assert (losses[0].mean() - losses[1].mean()).abs() < 4 * error
    assert losses[1].std() != losses[0].std()


def test_outside_guides_may_be_of_any_kind():
    case = CASES["groups"]()
    network = torch.nn.Linear(2, 4)
    made = GUIDES["full"](case.model, network, outside=None)
    assert made(*case.args).keys() == {"tril", "mean"}
    hidden = poutine.block(case.model, expose=["centre", "spread"])
    for outside in (AutoNormal, AutoNormal(hidden)):
        pyro.clear_param_store()
        guide = GUIDES["full"](case.model, network, outside=outside)
        assert guide(*case.args).keys() == {"centre", "spread", "tril", "mean"}
