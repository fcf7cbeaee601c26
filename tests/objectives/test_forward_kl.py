"""The forward KL divergence: its minimum is the posterior, value and gradient are those of closed forms."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, config_enumerate
from pyro.infer.autoguide import AutoNormal

from pyro_vae import CompiledELBO, ForwardKL, fit

X = torch.zeros(50)  # of which only the number counts


def model(x, size=None):
    scale = pyro.param("noise", torch.tensor(0.5))
    with pyro.plate("data", size or len(x), subsample_size=len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, scale), obs=x)


def guide(x, size=None):
    a, b, c = (pyro.param(name, torch.tensor(value)) for name, value in (("a", 0.3), ("b", 0.2), ("c", -0.1)))
    with pyro.plate("data", size or len(x), subsample_size=len(x)):
        pyro.sample("z", dist.Normal(a * x + b, c.exp()))


def closed_form(a, b, c):
    """The loss of a data point, and its gradient: E(z − ax − b)² = 1 − 2a + 1.25a² + b²."""
    square, precision = 1 - 2 * a + 1.25 * a**2 + b**2, math.exp(-2 * c)
    value = c + math.log(2 * math.pi) / 2 + precision * square / 2
    return torch.tensor([value, precision * (1.25 * a - 1), precision * b, 1 - precision * square])


def calls(elbo, args, num=100):
    """Losses and gradients of many calls."""
    found = []
    for _ in range(num):
        with poutine.trace(param_only=True) as seen:
            loss = elbo.loss_and_grads(model, guide, *args)
        params = {name: site["value"].unconstrained() for name, site in seen.trace.nodes.items()}
        assert params["noise"].grad is None  # the model learns nothing
        found.append(torch.stack([torch.tensor(loss), *(params[name].grad.clone() for name in "abc")]))
        for p in params.values():
            p.grad = None
    return torch.stack(found)


def assert_mean(draws, expected, errors=4):
    error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - expected).abs() < errors * error).all()
    assert (error < 0.1).all()  # so that it says something


@pytest.mark.parametrize("how", ["plain", "scaled", "two simulations", "recorded"])
def test_value_and_gradient_are_those_of_the_closed_form(how):
    size = 2000 if how == "scaled" else None
    elbo = ForwardKL(2 if how == "two simulations" else 1)
    elbo = CompiledELBO(elbo, backend="eager") if how == "recorded" else elbo
    draws = calls(elbo, (X, size)) / (size or len(X))
    assert_mean(draws, closed_form(0.3, 0.2, -0.1))
    assert len(set(draws[:, 0].tolist())) == len(draws)  # new data in each call, also where it is a replay
    if how == "recorded":
        assert len(elbo.plans) == 1
        assert not elbo.reasons
    values = torch.tensor([elbo.loss(model, guide, X, size) for _ in range(100)])
    assert_mean(values / (size or len(X)), closed_form(0.3, 0.2, -0.1)[0])


@pytest.mark.parametrize("loss", [ForwardKL(), CompiledELBO(ForwardKL(), backend="eager")], ids=["plain", "recorded"])
def test_the_minimum_is_the_posterior(loss):
    """q(z|x) = N(0.8 x, 0.2), and the loss there is its entropy."""
    scheduler = {"scheduler": lambda optim: torch.optim.lr_scheduler.CosineAnnealingLR(optim, 300)}
    options = {"num_epochs": 300, "batch_size": 4000, "learning_rate": 0.05, "seed": 0} | scheduler
    with pytest.warns(UserWarning, match="the loss does not reach 1 of 4 parameters, which will not train: 'noise'"):
        result = fit(model, guide, torch.zeros(4000), loss=loss, **options)
    a, b, c = (pyro.param(name).item() for name in "abc")
    assert a == pytest.approx(0.8, rel=0.01)
    assert abs(b) < 0.01 * 0.2**0.5
    assert math.exp(c) == pytest.approx(0.2**0.5, rel=0.01)
    assert result.loss[-1] == pytest.approx(dist.Normal(0.0, 0.2**0.5).entropy().item(), abs=0.05)
    assert pyro.param("noise").item() == 0.5


def test_it_covers_what_the_elbo_leaves_out():
    """x tells whether |z| > 1, about: of a Normal guide, KL(p‖q) takes the moments of p, by quadrature."""

    def two_modes(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.5))
            pyro.sample("x", dist.Bernoulli(logits=6 * (z.abs() - 1.5)), obs=x)

    def normal(x):
        loc, scale = pyro.param("loc", torch.tensor([0.1, 1.5])), pyro.param("scale", torch.zeros(2))
        with pyro.plate("data", len(x)):
            pyro.sample(
                "z", dist.Normal(torch.where(x > 0, loc[1], loc[0]), torch.where(x > 0, scale[1], scale[0]).exp())
            )

    z = torch.linspace(-12, 12, 4001)
    weight = dist.Normal(0.0, 1.5).log_prob(z) + torch.nn.functional.logsigmoid(6 * (z.abs() - 1.5))
    second = (weight.softmax(0) * z.square()).sum().item()
    first = (weight.softmax(0) * z.abs()).sum().item()
    options = {"num_epochs": 400, "batch_size": 2000, "learning_rate": 0.05, "seed": 0, "progress": False}
    options["scheduler"] = lambda optim: torch.optim.lr_scheduler.CosineAnnealingLR(optim, 400)
    fit(two_modes, normal, torch.ones(2000), loss=ForwardKL(), **options)
    assert abs(pyro.param("loc")[1].item()) < 0.05
    assert pyro.param("scale")[1].exp().item() == pytest.approx(second**0.5, rel=0.02)
    pyro.clear_param_store()
    fit(two_modes, normal, torch.ones(2000), **options)
    assert abs(pyro.param("loc")[1].item()) == pytest.approx(first, rel=0.1)  # one of two modes
    assert pyro.param("scale")[1].exp().item() < 0.5 * second**0.5


def test_discrete_latents_are_scored_as_they_are():
    """The posterior of a class is logistic: log q(y|x) has the logit log(0.3/0.7) + 2x − 2."""

    @config_enumerate
    def classes(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(2 * y, 1.0), obs=x)

    def logistic(x):
        a, b = pyro.param("a", torch.tensor(0.0)), pyro.param("b", torch.tensor(0.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=a * x + b))

    x = torch.zeros(5000)
    scheduler = {"scheduler": lambda optim: torch.optim.lr_scheduler.CosineAnnealingLR(optim, 200)}
    fit(classes, logistic, x, num_epochs=200, batch_size=5000, learning_rate=0.1, loss=ForwardKL(), seed=0, **scheduler)
    assert pyro.param("a").item() == pytest.approx(2.0, rel=0.02)
    assert pyro.param("b").item() == pytest.approx(math.log(3 / 7) - 2, rel=0.02)


def test_what_is_outside_of_the_plate_comes_from_the_guide_and_is_not_scored():
    """θ ~ N(3, 0.1) of the guide, not N(0, 1) of the prior; z|x, θ as it is without the plate."""

    def shared(x):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(theta, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def local(x):
        loc = pyro.param("loc", torch.tensor(3.0))
        theta = pyro.sample("theta", dist.Normal(loc, 0.1))
        b = pyro.param("b", torch.tensor(0.2))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.8 * x + b * theta, 0.2**0.5))

    values, gradients = [], []
    for _ in range(100):
        loss = ForwardKL().differentiable_loss(shared, local, X)
        loc, b = pyro.param("loc"), pyro.param("b")
        found = torch.autograd.grad(loss, [b, loc], allow_unused=True)
        assert found[1] is None
        values.append(loss.detach() / len(X))
        gradients.append(found[0])
    # at b = 0.2 it is the exact posterior given θ, whatever θ is
    assert_mean(torch.stack(values), dist.Normal(0.0, 0.2**0.5).entropy())
    gradients = torch.stack(gradients)
    assert abs(gradients.mean()) < 4 * gradients.std() / 100**0.5
    with torch.no_grad():
        pyro.param("b").add_(0.1)  # costs (0.1 θ)² / (2 · 0.2)
    values = torch.tensor([ForwardKL().loss(shared, local, X) / len(X) for _ in range(100)])
    assert_mean(values, dist.Normal(0.0, 0.2**0.5).entropy() + 0.01 * 9.01 / 0.4)


def test_an_auxiliary_site_with_its_log_determinant_is_a_density():
    def positive(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(2.0, 1.0))
            pyro.sample("x", dist.Poisson(z), obs=x)

    def log_normal(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.LogNormal((x + 1).log(), 0.7))

    def by_hand(x):
        with pyro.plate("data", len(x)):
            u = pyro.sample("u", dist.Normal((x + 1).log(), 0.7), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Delta(u.exp(), log_density=-u))

    values = []
    for q in (log_normal, by_hand):
        pyro.set_rng_seed(1)
        values.append(ForwardKL().loss(positive, q, torch.ones(1000)))
    assert values[1] == pytest.approx(values[0], rel=1e-6)


def test_what_is_masked_stays_and_is_not_scored():
    """Rows of different length: latents and data beyond their end count neither in the simulation nor in the loss."""
    mask = torch.tensor([[True, True, False], [True, False, False]])

    def padded(x, mask):
        with pyro.plate("steps", 3, dim=-1), pyro.plate("data", len(x), dim=-2), poutine.mask(mask=mask):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    seen = []

    def per_step(x, mask):
        seen.append(x)
        with pyro.plate("steps", 3, dim=-1), pyro.plate("data", len(x), dim=-2), poutine.mask(mask=mask):
            pyro.sample("z", dist.Normal(0.8 * x, 0.2**0.5))

    elbo, x = ForwardKL(), torch.full((2, 3), -99.0)
    values = torch.tensor([elbo.loss(padded, per_step, x, mask) for _ in range(300)])
    assert_mean(values, 3 * dist.Normal(0.0, 0.2**0.5).entropy())
    assert (seen[-1][~mask] == -99).all()
    assert (seen[-1][mask] != -99).all()


def test_statistics_of_the_data_are_none_of_the_simulation():
    """The model simulates in evaluation mode: its batch norm sees nothing of it, and is trained as before."""
    norm = torch.nn.BatchNorm1d(1)

    def normed(x):
        pyro.module("norm", norm)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(norm(5 + z), 0.5).to_event(1), obs=x)

    def linear(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("a", torch.tensor(0.5)) * x, 1.0).to_event(1))

    svi = SVI(normed, linear, pyro.optim.Adam({"lr": 0.01}), ForwardKL())
    for _ in range(3):
        svi.step(torch.zeros(20, 1))
    assert norm.running_mean.item() == 0
    assert norm.training


def test_what_cannot_be_simulated_or_scored_is_refused():
    def transformed(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x + 1)

    def reads(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + x.mean(), 0.5), obs=x)

    def blind(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))

    def auxiliary(x):
        with pyro.plate("data", len(x)):
            u = pyro.sample("u", dist.Normal(x, 1.0), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Normal(u, 1.0))

    def square(x):  # not the map of the support
        with pyro.plate("data", len(x)):
            u = pyro.sample("u", dist.Normal(x, 1.0), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Delta(2 * u + 1, log_density=torch.full_like(u, -math.log(2))))

    def outside(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    x, elbo = torch.randn(20), ForwardKL()
    for m, q, message in (
        (transformed, guide, "site 'x': its observed value is none of the arguments"),
        (reads, guide, "site 'x': its distribution depends on an argument that the model observes"),
        (model, blind, r"expected a guide that is a function of what is observed, \['x'\]"),
        (model, AutoNormal(model), "it would be fitted to the prior"),
        (model, auxiliary, r"a guide whose density at a given point is known, got one that draws \['u'\]"),
        (model, square, r"got one that draws \['u', 'z'\]"),
        (outside, lambda x: pyro.sample("z", dist.Normal(x.mean(), 1.0)), "inside of plate 'data', got .* all outside"),
        (model, lambda x: pyro.sample("w", dist.Normal(x.mean(), 1.0)), "expected latents of the guide"),
    ):
        with pytest.raises(ValueError, match=message):
            elbo.loss(m, q, x)
    with pytest.raises(ValueError, match="no plate 'rows'"):
        ForwardKL(plate="rows").loss(model, guide, x)
    with pytest.raises(ValueError, match="num_particles: expected at least 1, got 0"):
        ForwardKL(0)


def test_a_network_whose_last_layer_is_zero_still_reads_the_data():
    head = torch.nn.Linear(1, 1)
    torch.nn.init.zeros_(head.weight)

    def zero(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(head(x[:, None])[:, 0], 1.0))

    assert math.isfinite(ForwardKL().loss(model, zero, X))


def test_the_joint_posterior_of_a_data_set():
    """plate=None: a guide that is a function of the whole data set, q(θ|x̄) = N(40 x̄ / 41, 1/41) for 10 points."""

    def mean(x):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(theta, 0.5), obs=x)

    def pooled(x):
        pyro.sample("theta", dist.Normal(40 / 41 * x.mean(), 41**-0.5))

    elbo = ForwardKL(plate=None)
    values = torch.tensor([elbo.loss(mean, pooled, torch.zeros(10)) for _ in range(1000)])
    assert_mean(values, dist.Normal(0.0, 41**-0.5).entropy(), errors=4)


def test_a_simulator_that_leaves_torch_runs_as_it_is():
    def numpy(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(torch.from_numpy(z.detach().numpy() * 1.0), 0.5), obs=x)

    def linear(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.8 * x + pyro.param("b", torch.tensor(0.0)), 0.2**0.5))

    elbo = CompiledELBO(ForwardKL(), backend="eager")
    with pytest.warns(UserWarning, match="Pyro runs as it is, not compiled"):
        values = torch.tensor([elbo.loss_and_grads(numpy, linear, X) / len(X) for _ in range(200)])
    assert_mean(values, dist.Normal(0.0, 0.2**0.5).entropy())
