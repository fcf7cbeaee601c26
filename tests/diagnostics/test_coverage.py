"""Expected coverage in closed form, its blind spots, figures and ArviZ."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from truths import LinearGaussian
from truths.one_latent import exact_pair

from pyro_vae.diagnostics import expected_coverage, simulation_based_calibration

MODEL, EXACT = exact_pair()
X = torch.zeros(100)


def normal_guide(factor):
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, math.sqrt(0.5) * factor))

    return guide


@pytest.mark.parametrize("factor", [1.0, 1.3, 1 / 1.3])
def test_coverage_of_gaussians_in_closed_form(factor):
    """A region |z − x/2| < c s f of the nominal level 2 Φ(c) − 1 holds z* with the probability 2 Φ(c f) − 1."""
    size = 2000
    found = expected_coverage(MODEL, normal_guide(factor), X, num_simulations=size, num_draws=199)
    normal = dist.Normal(0.0, 1.0)
    expected = 2 * normal.cdf(normal.icdf((1 + found.levels) / 2) * factor) - 1
    error = (expected * (1 - expected) / size).sqrt()
    assert ((found.coverage["highest_density"] - expected).abs() < 4.5 * error + 0.005).all()
    assert all((p < 1e-4) == (factor != 1) for p in found.p_values.values())
    lower, upper = found.bands()
    inside = (found.coverage["tarp"] >= lower) & (found.coverage["tarp"] <= upper)
    assert inside.all() == (found.p_values["tarp"] > 0.05)


def test_several_latents_and_the_prior_which_passes():
    truth = LinearGaussian(3, 4)
    x = torch.zeros(50, 4)
    assert min(expected_coverage(truth.model, truth.guide, x).p_values.values()) > 0.001
    wide = expected_coverage(truth.model, lambda x: truth.guide(x, 1.3), x)
    assert max(wide.p_values.values()) < 0.001

    def prior(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    assert min(expected_coverage(truth.model, prior, x).p_values.values()) > 0.001
    shown = repr(wide).splitlines()
    assert shown[0] == "Coverage over 500 simulations"
    assert "in 49.5%" in shown[1]
    assert shown[2].startswith("  tarp ")


def auxiliary(x):
    """The exact posterior, through one number too many for its density to be known."""
    with pyro.plate("data", len(x)):
        u = pyro.sample("u", dist.Normal(0.0, 0.5), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Normal(x / 2 + u, 0.5))


def test_guides_without_a_density_at_a_point():
    with pytest.raises(ValueError, match=r"(?s)u.*not known.*kinds=\('tarp',\)|integrated over nothing"):
        expected_coverage(MODEL, auxiliary, X)
    assert expected_coverage(MODEL, auxiliary, X, kinds=("tarp",)).p_values["tarp"] > 0.001
    with pytest.raises(ValueError, match=r"kinds: expected some of .*got \('hpd',\)"):
        expected_coverage(MODEL, EXACT, X, kinds=("hpd",))

    def image(x):  # its auxiliary variable follows from z
        with pyro.plate("data", len(x)):
            u = pyro.sample("u", dist.Normal(x / 2, math.sqrt(0.5)), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Delta(u))

    found = expected_coverage(MODEL, image, X, kinds=("highest_density",), seed=0)
    assert found.p_values["highest_density"] > 0.001


def test_figures():
    from matplotlib import pyplot

    found = simulation_based_calibration(MODEL, normal_guide(1.3), X, num_draws=50)
    ax = found.plot()
    band, *lines = ax.get_legend_handles_labels()[1]
    assert (band, lines) == ("calibrated", ["z", "log_likelihood"])
    expected = torch.arange(1, 51) / 51
    drawn = torch.as_tensor(ax.lines[0].get_ydata())
    shares = torch.stack([(found.ranks["z"] < i).double().mean() for i in range(1, 51)])
    torch.testing.assert_close(drawn.double(), shares - expected.double(), atol=1e-6, rtol=0)
    coverage = expected_coverage(MODEL, normal_guide(1.3), X, num_draws=50)
    other = coverage.plot(probability=0.9)
    assert other.get_legend_handles_labels()[1] == ["calibrated", "highest_density", "tarp"]
    assert found.plot(ax, names=["z"]) is ax
    pyplot.close("all")


def test_arviz():
    arviz = pytest.importorskip("arviz")
    found = simulation_based_calibration(MODEL, EXACT, X, num_simulations=200, num_draws=50)
    tree = found.to_arviz()
    group = tree["prior_sbc"]
    assert dict(group.sizes) == {"chain": 1, "draw": 200}
    values = torch.as_tensor(group["z"].values[0])
    assert ((values * 51).long() == found.ranks["z"]).all()
    assert 0 < values.min() < values.max() < 1
    if not arviz.__version__.startswith("0."):
        from matplotlib import pyplot

        arviz.plot_ecdf_pit(tree, group="prior_sbc", method="pot_c", backend="matplotlib")
        pyplot.close("all")
