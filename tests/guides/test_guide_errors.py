"""What guides refuse: where, expected, got, try; and that a refusal leaves nothing behind."""

from contextlib import ExitStack
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.contrib.autoname import scope
from pyro.distributions import constraints
from pyro.infer import Trace_ELBO
from pyro.nn import PyroModule, PyroSample
from torch import nn

from pyro_vae.guides import AmortizedFlow, AmortizedMultivariateNormal, AmortizedNormal
from pyro_vae.networks import MLP, MaskedInput

GUIDES = [AmortizedNormal, AmortizedMultivariateNormal, AmortizedFlow]
guides = pytest.mark.parametrize("make", GUIDES)


def rows(x, sample):
    with pyro.plate("data", len(x)):
        z = sample()
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])


def model(x):
    rows(x, lambda: pyro.sample("z", dist.Normal(0.0, 1.0)))


def shared(x):
    centre = pyro.sample("centre", dist.Normal(0.0, 1.0))
    rows(x, lambda: pyro.sample("z", dist.Normal(centre, 1.0)))


def point(x):
    rows(x, lambda: pyro.sample("z", dist.Delta(torch.tensor(1.0))))


def improper(x):
    rows(x, lambda: pyro.sample("z", dist.ImproperUniform(constraints.real, (), ())))


def own_indices(x):
    index = torch.randperm(len(x))[:2]
    with pyro.plate("data", len(x), subsample=index):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[index, 0])


def discrete(x):
    rows(x, lambda: pyro.sample("z", dist.Poisson(2.0)))


def sphere(x):
    rows(x, lambda: pyro.sample("z", dist.ProjectedNormal(torch.ones(2)))[..., 0])


def loop(x):
    for i in pyro.plate("data", len(x)):
        z = pyro.sample(f"z{i}", dist.Normal(0.0, 1.0))
        pyro.sample(f"x{i}", dist.Normal(z, 1.0), obs=x[i, 0])


def without_locals(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])


def sometimes(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        if z.mean() > 0:
            z = pyro.sample("more", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])


def bounded_by_a_discrete_one(x):
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
        z = pyro.sample("z", dist.Uniform(0.0, 1.0 + y))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])


def bounded_by_a_rare_one(x):
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.Bernoulli(1e-4), infer={"enumerate": "parallel"})
        z = pyro.sample("z", dist.Uniform(0.0, 1.0 + y))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])


def masked_inside(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).mask(torch.arange(3) < 2).to_event(1))
        pyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=x[:, 0])


@guides
@pytest.mark.parametrize(
    ("which", "message"),
    [
        (discrete, r"site 'z' is discrete \(Poisson\); expected continuous latents.*config_enumerate"),
        (point, r"site 'z' is a point \(Delta\), which has no density.*Try pyro.deterministic\('z'"),
        (improper, r"the model cannot be drawn from: ImproperUniform does not support sampling.*Try proper priors"),
        (own_indices, r"gives plate 'data' indices that it draws itself.*Try pyro.plate\(…, subsample_size"),
        (sphere, r"site 'z': ProjectedNormal cannot be mapped.*ProjectedNormalReparam"),
        (loop, r"plate 'data' is a Python loop.*Try pyro.plate"),
        (without_locals, r"no continuous latent inside of plate 'data' \(latents: \['z'\]\). Try one of Pyro's"),
        (sometimes, r"latent sites \['more'\] appear in some runs of the model only.*Try poutine.mask"),
        (bounded_by_a_discrete_one, r"the support of site 'z' depends on \['y'\], which this guide does not draw"),
        (bounded_by_a_rare_one, r"the support of site 'z' depends on \['y'\], which this guide does not draw"),
        (masked_inside, r"site 'z' has a mask under its reinterpreted dimensions.*Try .to_event"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_models_that_it_is_no_guide_for(make, which, message):
    torch.manual_seed(1)
    guide = make(which, MLP(1, [4]))
    names = set(pyro.get_param_store().keys())
    with pytest.raises(ValueError, match=f"(?s){make.__name__}: .*{message}"):
        guide(torch.zeros(3, 1))
    assert guide.latents is None
    assert guide.head is None
    assert set(pyro.get_param_store().keys()) == names


def test_a_plate_that_the_model_has_not():
    with pytest.raises(ValueError, match=r"no plate 'rows' in model and guide \(their plates: 'data' \(3\)\)"):
        AmortizedNormal(model, MLP(1, [4]), plate="rows")(torch.zeros(3, 1))


def test_a_network_of_another_width():
    guide = AmortizedNormal(model, nn.Linear(7, 4))
    message = (
        r"network: it does not take rows of shape \(1,\) \(its first layer takes a width of 7\).*input has the width 1"
    )
    with pytest.raises(ValueError, match=f"(?s){message}"):
        guide(torch.zeros(3, 1))
    assert guide.latents is None


def test_a_network_whose_output_has_no_row_for_each_point():
    class Pooled(nn.Module):
        def forward(self, x):
            return x.mean(0, keepdim=True)

    message = r"network: expected features of shape \(3, width\), a row for each data point, got \(1, 1\)"
    with pytest.raises(ValueError, match=message):
        AmortizedNormal(model, Pooled())(torch.zeros(3, 1))


def test_inputs_with_another_number_of_rows():
    guide = AmortizedNormal(model, MLP(1, [4]), inputs=lambda x: torch.cat([x, x]))
    with pytest.raises(ValueError, match=r"inputs: expected 3 rows, as the plate has, got 6. Try inputs="):
        guide(torch.zeros(3, 1))
    with pytest.raises(ValueError, match=r"inputs: expected a tensor with a row for each data point.*got float"):
        AmortizedNormal(model, MLP(1, [4]), inputs=lambda x: 1.0)(torch.zeros(3, 1))


def test_inner_plates_of_another_size():
    def ragged(x):
        with pyro.plate("data", len(x), dim=-1), pyro.plate("time", x.shape[1], dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x.T)

    guide = AmortizedNormal(ragged, MLP(1, [4]), inputs=lambda x: x.mean(1, keepdim=True))
    guide(torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"inner plates of sizes \(5,\), at the first call \(4,\).*pad rows"):
        guide(torch.zeros(3, 5))


@pytest.mark.parametrize("handler", ["mask", "scale"])
def test_a_flow_over_elements_that_count_differently(handler):
    """Also where a later call has the first mask or scale of its own."""

    def ragged(x, counts=None):
        handlers = [] if counts is None else [getattr(pyro.poutine, handler)(**{handler: counts.T})]
        with ExitStack() as stack:
            plates = pyro.plate("data", len(x), dim=-1), pyro.plate("time", 4, dim=-2)
            for context in (*plates, *handlers):
                stack.enter_context(context)
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x.T)

    x, counts = torch.zeros(3, 4), torch.eye(4)[:3]
    guide = AmortizedFlow(ragged, MLP(4, [4]))
    guide(x)
    with pytest.raises(ValueError, match=r"site 'z' has a mask or scale for each element.*AmortizedMultivariateNormal"):
        guide(x, counts.bool() if handler == "mask" else 1 + counts)


def test_weights_have_no_place_before_the_first_call():
    x = torch.zeros(3, 1)
    first, second = (AmortizedNormal(model, MLP(1, [4])) for _ in range(2))
    first(x)
    with pytest.raises(ValueError, match=r"it has no weights before its first call.*Try guide\(\*args\) once"):
        second.load_state_dict(first.state_dict())
    second(x)
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.median(x)["z"], first.median(x)["z"])


def test_weights_that_the_store_read_from_a_file_are_not_passed_over(tmp_path):
    """They are under the guide's name, and would be trained in place of its own."""
    x = torch.zeros(3, 1)
    AmortizedNormal(model, MLP(1, [4]))(x)
    pyro.get_param_store().save(tmp_path / "store.pt")
    pyro.clear_param_store()
    pyro.get_param_store().load(tmp_path / "store.pt")
    with pytest.raises(ValueError, match=r"already holds 'AmortizedNormal\$\$\$.*load_state_dict to load weights"):
        AmortizedNormal(model, MLP(1, [4]))(x)


def test_names_in_a_scope():
    guide = AmortizedMultivariateNormal(shared, MLP(1, [4]), given=["centre"])
    scoped = [scope(f, prefix="a") for f in (shared, guide)]
    x = torch.zeros(3, 1)
    guide(x)
    losses = []
    for pair in ((shared, guide), scoped):
        torch.manual_seed(0)
        losses.append(Trace_ELBO().loss(*pair, x))
    assert losses[0] == losses[1]


def test_latents_that_it_is_to_be_given():
    with pytest.raises(ValueError, match=r"given=\['nonsense'\] are no continuous latents outside of plate 'data'"):
        AmortizedNormal(model, MLP(1, [4]), given=["nonsense"])(torch.zeros(3, 1))


def test_an_outside_guide_that_lacks_a_latent():
    guide = AmortizedNormal(shared, MLP(1, [4]), outside=lambda x: None)
    with pytest.raises(ValueError, match=r"outside=function did not sample \['centre'\]; expected all latents outside"):
        guide(torch.zeros(3, 1))


def test_what_cannot_be_called():
    with pytest.raises(TypeError, match="model: expected a function, got Tensor"):
        AmortizedNormal(torch.zeros(3), MLP(1, [4]))
    with pytest.raises(TypeError, match="network: expected a module that maps rows of inputs to features"):
        AmortizedNormal(model, 3)
    with pytest.raises(TypeError, match="inputs: expected a function of the arguments, got Tensor"):
        AmortizedNormal(model, MLP(1, [4]), inputs=torch.zeros(3, 1))
    guide = AmortizedNormal(model, MLP(1, [4]))
    with pytest.raises(ValueError, match="quantiles: expected a sequence of levels between 0 and 1"):
        guide.quantiles([0.5, 1.5], torch.zeros(3, 1))


def test_all_rows_in_an_order_of_the_plate():
    """Whether arguments are in this order nobody can tell; with `inputs` they are."""

    def picks(x, index):
        with pyro.plate("data", len(x), subsample=index) as i:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[i, 0])

    x, order = torch.randn(6, 1), torch.tensor([3, 1, 5, 0, 2, 4])
    guide = AmortizedNormal(picks, MLP(1, [4]))
    first = guide.get_posterior(x, torch.arange(6)).mean
    assert torch.equal(guide.get_posterior(x, order[:4]).mean, first[order[:4]])
    with pytest.raises(ValueError, match=r"given all 6 rows in an order of its own.*Try inputs="):
        guide(x, order)
    guide.inputs = lambda x, index: x[index]
    assert torch.equal(guide.get_posterior(x, order).mean, first[order])


def test_rows_of_another_dtype():
    with pytest.raises(TypeError, match=r"expected rows of torch.float32, the dtype of the network, got torch.float64"):
        AmortizedNormal(model, MLP(1, [4]))(torch.zeros(3, 1, dtype=torch.float64))


@guides
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_rows_that_are_not_finite(make, value):
    """In each call where Pyro validates, before one of its distributions sees them."""
    x = torch.randn(6, 1)
    for called in (False, True):
        guide, bad = make(model, nn.Linear(1, 4)), x.clone()
        if called:
            guide(x)
        bad[3:5] = value
        message = (
            rf"{make.__name__}: network: .*2 of 6 rows, the first at row 3, where its inputs are NaN or infinite.*Try"
        )
        for call in (guide, guide.median, guide.get_posterior, partial(Trace_ELBO().loss, model, guide)):
            with pytest.raises(ValueError, match=message):
                call(bad)
    guide.network = nn.Sequential(MaskedInput(nn.Linear(2, 4)))
    assert guide.get_posterior(torch.full((6, 1), torch.nan)).sample().isfinite().all()


def test_weights_that_are_not_finite():
    guide = AmortizedNormal(model, nn.Linear(1, 4))
    guide(torch.zeros(3, 1))
    with torch.no_grad():
        guide.network.bias[0] = torch.nan
    with pytest.raises(ValueError, match=r"in 3 of 3 rows, the first at row 0. Try a look at the weights"):
        guide(torch.zeros(3, 1))


def test_a_network_that_samples():
    linear = PyroModule[nn.Linear](1, 4)
    linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([4, 1]).to_event(2))
    with pytest.raises(ValueError, match=r"network: it samples 'weight'; expected features that are a function"):
        AmortizedNormal(model, linear)(torch.zeros(3, 1))
