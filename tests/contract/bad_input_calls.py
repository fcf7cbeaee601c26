"""A call that is right of each public function and class: what its arguments are, and of what kind each of them is."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS, Trace_ELBO
from torch import nn

import pyro_vae
from pyro_vae import checkpoint, diagnostics, distributions, evidence, guides, networks, objectives, plots
from pyro_vae import particles as particles_room
from pyro_vae.distributions import gaussians, univariate
from pyro_vae.integrations import arviz as arviz_room
from pyro_vae.integrations.sklearn import VAETransformer

MADE_BY_TOOLS = """Calibration Comparison Coverage DoubtfulRows Evidence FitResult InferenceGaps LatentUsage LeaveOneOut
    LogLikelihood Particles PosteriorDraws RefinedGuide Sandwich Simulation"""
BASES = ["Broadcasting", "Conditional"]  # whose subclasses are here
LIKE_TORCH = """MultivariateNormal LowRankMultivariateNormal Beta ContinuousBernoulli NegativeBinomial Poisson
    StudentT"""  # distributions, which check their parameters as torch's do
NOT_FOR_USERS = ["read", "write"]
ROOMS = [pyro_vae, checkpoint, diagnostics, distributions, evidence, guides, networks, objectives, plots]
ROOMS += [particles_room, pyro_vae.training, pyro_vae.models, pyro_vae.compiled, gaussians, univariate, arviz_room]


class Call(NamedTuple):
    """A function, arguments that are right, and the kinds of these where their names do not tell."""

    function: Callable
    arguments: Callable[[], dict[str, Any]]
    kinds: dict[str, str]

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        return dict(inspect.signature(self.function).parameters)

    def __call__(self, arguments: dict[str, Any]) -> Any:
        rest, named, options = [], dict(arguments), {}
        places = any(named.get(p.name) for p in self.parameters.values() if p.kind is p.VAR_POSITIONAL)
        for p in self.parameters.values():
            if p.kind is p.VAR_POSITIONAL:
                rest += named.pop(p.name, ())
            elif p.kind is p.POSITIONAL_OR_KEYWORD and p.name in named and places:
                rest.append(named.pop(p.name))
            elif p.kind is p.VAR_KEYWORD:
                options = named.pop(p.name, {})
        return self.function(*rest, **named, **options)


def rows() -> torch.Tensor:
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(1))


def vae(size: int = 3, code: int = 2) -> pyro_vae.VAE:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        likelihood = distributions.ConditionalNormal(networks.MLP(code, []), size, scale=1.0)
        posterior = distributions.ConditionalNormal(networks.MLP(size, []), code)
        return pyro_vae.VAE(distributions.StandardNormal(code), likelihood, posterior)


def pair(**more: Any) -> dict[str, Any]:
    v = vae()
    return {"model": v.model, "guide": v.guide, "args": (rows(),), "seed": 0, **more}


def incomplete(**more: Any) -> dict[str, Any]:
    """A pair whose likelihood and encoder take NaN as missing."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        likelihood = distributions.ObservedPart(distributions.ConditionalNormal(networks.MLP(2, []), 3, scale=1.0))
        posterior = distributions.ConditionalNormal(networks.MaskedInput(networks.MLP(6, [])), 2)
        v = pyro_vae.VAE(distributions.StandardNormal(2), likelihood, posterior)
    return {"model": v.model, "guide": v.guide, "args": (rows(),), "seed": 0, **more}


def visits(x):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mean, 1.0))
        pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).expand((*z.shape, 3)).to_event(1), obs=x)


def visits_guide(x):
    pyro.sample("mean", dist.Normal(0.1, 0.5))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x.mean(-1) / 2, 0.7))


def hierarchy(**more: Any) -> dict[str, Any]:
    return {"model": visits, "guide": visits_guide, "args": (rows(),), "seed": 0, **more}


def amortized(kind: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        guide = kind(vae().model, networks.MLP(3, [4]))
        guide(rows())
    return guide


@cache
def some_evidence() -> dict[str, Any]:
    calls = {name: pair(seed=i, num_particles=4, progress=False) for i, name in enumerate("ab")}
    return {name: Call(pyro_vae.importance_sampling, dict, {})(call) for name, call in calls.items()}


@cache
def chains() -> MCMC:
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    mcmc = MCMC(NUTS(model), num_samples=3, warmup_steps=2, disable_progbar=True)
    mcmc.run(torch.zeros(3))
    return mcmc


def fitted() -> VAETransformer:
    return VAETransformer(2, hidden_sizes=(), num_epochs=1, num_particles=3, random_state=0).fit(rows().numpy())


def saved(module: nn.Module) -> str:
    checkpoint.save_weights(module, "vae.pt")
    return "vae.pt"


CALLS: dict[str, Call] = {}


def add(function: Callable, arguments: Callable[[], dict[str, Any]], name: str = "", /, **kinds: str) -> None:
    CALLS[name or function.__qualname__] = Call(function, arguments, kinds)


few = {"num_particles": 8, "progress": False}
add(pyro_vae.importance_sampling, lambda: pair(**few), correction="choice")
add(pyro_vae.prior_sampling, lambda: pair(**few), model="function", guide="unused")
add(pyro_vae.adaptive_importance_sampling, lambda: pair(**few, num_steps=1), num_steps="count_or_zero")
add(pyro_vae.annealed_importance_sampling, lambda: pair(num_particles=4, num_temperatures=3, num_leapfrog=1))
add(pyro_vae.sandwich, lambda: pair(estimator=pyro_vae.importance_sampling, options={"num_particles": 8}))
add(pyro_vae.draw_particles, lambda: pair(num_particles=3))
add(pyro_vae.draw_posterior, lambda: pair(num_samples=3, **few, method="importance"))
add(
    pyro_vae.integrated_log_likelihood,
    lambda: hierarchy(num_samples=3, **few, adaptive=False),
    guide="needed",
    args="own",
)
add(pyro_vae.refine, lambda: pair(num_steps=1, **few))
add(pyro_vae.simulate, pair)
add(pyro_vae.impute, lambda: incomplete(num_draws=2, num_particles=4), args="incomplete")
add(pyro_vae.latent_usage, lambda: pair(num_particles=4), site="choice", threshold="not_negative")
add(pyro_vae.from_pyro_svi, lambda: pair(num_samples=3, num_particles=4, progress=False), plate="plate_or_auto")
add(
    pyro_vae.from_pyro,
    lambda: {"mcmc": chains(), "num_particles": 3, "seed": 0, "progress": False},
    mcmc="module",
    predictions="skip",
    num_particles="count_or_zero",
)
add(pyro_vae.compare, lambda: {"evidence": some_evidence()}, evidence="evidence")
add(evidence.pareto_khat, lambda: {"log_weight": torch.randn(20, 3)}, log_weight="weights")
add(
    pyro_vae.fit,
    lambda: {"model": (v := vae()).model, "guide": v.guide, "data": rows(), "num_epochs": 1, "seed": 0,
             "validation_data": rows(), "progress": False, "compile": False},
    learning_rate="not_negative", clip_norm="positive", validation_data="rows", plate="plate_of_fit", data="data",
)  # fmt: skip
add(
    pyro_vae.fit_layers,
    lambda: {"layers": [vae(3, 2), vae(2, 1)], "data": rows(), "options": {"num_epochs": 1, "seed": 0}},
    data="data",
)
add(pyro_vae.stack, lambda: {"layers": [vae(3, 2), vae(2, 1)]})
add(
    pyro_vae.VAE,
    lambda: {"prior": (v := vae()).prior, "likelihood": v.likelihood, "posterior": v.posterior},
    **dict.fromkeys(("prior", "likelihood", "posterior"), "distribution"),
)
for name in ("model", "guide", "encode", "reconstruct", "similar", "sample_guide", "posterior_given"):
    more = {"size": 2} if name == "similar" else {}
    add(getattr(vae(), name), lambda more=more: {"x": rows(), **more}, f"VAE.{name}", x="vae_rows", total="total")
add(vae().decode, lambda: {"z": rows()[:, :2]}, "VAE.decode", z="codes")
add(vae().likelihood_given, lambda: {"z": rows()[:, :2]}, "VAE.likelihood_given", z="codes")
add(vae().generate, lambda: {"size": 3}, "VAE.generate")
add(vae().sample_model, lambda: {"x": rows()}, "VAE.sample_model", x="vae_rows", prior="distribution")
for tool, more in {
    diagnostics.simulation_based_calibration: {"num_simulations": 20, "num_draws": 3, "num_particles": 4},
    diagnostics.posterior_calibration: {"num_simulations": 4, "num_draws": 3, "num_particles": 8},
    diagnostics.expected_coverage: {"num_simulations": 20, "num_draws": 3},
    diagnostics.inference_gaps: {"num_particles": 8, "num_steps": 1},
    diagnostics.doubtful_rows: {"num_particles": 8, "num_simulated": 8},
}.items():
    add(tool, lambda more=more: pair(**more, progress=False), family="choice", num_steps="count_or_zero")
for tool in (diagnostics.leave_one_out, diagnostics.log_predictive):
    add(tool, lambda: {"log_likelihood": torch.randn(20, 3)}, log_likelihood="weights", log_weight="log_weight")


def family(**more: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {"network": networks.MLP(2, []), "event_shape": 3, **more}


for name in distributions.__all__:
    kind = getattr(distributions, name)
    if name.startswith("Conditional") and name not in ("Conditional", "ConditionalProduct", "ConditionalFlow"):
        more = {"num_categories": 3} if name == "ConditionalCategorical" else {}
        more |= {"rank": 1} if "LowRank" in name else {}
        arguments = family(**more)
        if name == "ConditionalOneHotCategorical":
            arguments = lambda: {"network": networks.MLP(2, []), "num_categories": 3}  # noqa: E731
        add(kind, arguments, network="network")
add(
    distributions.ConditionalFlow,
    lambda: {"base": distributions.StandardNormal(3), "transforms": []},
    base="distribution", transforms="parts", network="network",
)  # fmt: skip
add(
    distributions.ConditionalProduct,
    lambda: {"parts": (distributions.ConditionalNormal(networks.MLP(2, []), 3),)},
    parts="parts",
)
add(distributions.GaussianMixture, lambda: {"num_components": 2, "event_shape": 3}, spread="positive")
add(distributions.StandardNormal, lambda: {"event_shape": 3})
add(distributions.LearnedScale, lambda: {"shape": (3,)}, init="positive")
add(distributions.ObservedPart, lambda: {"likelihood": vae().likelihood}, likelihood="distribution")
add(distributions.VampPrior, lambda: {"posterior": vae().posterior, "pseudo_inputs": rows()}, posterior="distribution")
add(
    distributions.condition,
    lambda: {"conditional": vae().posterior, "inputs": (rows(),), "event_dims": [1]},
    conditional="distribution", inputs="skip",
)  # fmt: skip
add(networks.MLP, lambda: {"in_shape": 3, "hidden_sizes": [4]})
add(networks.ConvEncoder, lambda: {"in_shape": (1, 4, 4), "channels": [2], "out_features": 3}, in_shape="sizes")
add(networks.ConvDecoder, lambda: {"in_features": 3, "channels": [2, 1], "out_size": (4, 4)}, out_size="sizes")
add(networks.MaskedInput, lambda: {"network": networks.MLP(6, [])}, network="module")
add(objectives.BetaELBO, lambda: {"beta": 1.0}, beta="weight", capacity="weight", plate="name")
add(objectives.CombinedELBO, lambda: {"parts": [(Trace_ELBO(), 1.0)]}, parts="parts")
add(objectives.DenoisingELBO, lambda: {"corruption": objectives.gaussian_noise(0.1)}, corruption="maker")
add(objectives.ForwardKL, dict, plate="name")
add(objectives.ImportanceWeightedELBO, lambda: {"num_particles": 3}, plate="name")
add(objectives.linear, lambda: {"num_steps": 3}, num_steps="count", start="number", stop="number")
add(objectives.cyclical, lambda: {"period": 3}, rising="share", start="number", stop="number")
add(objectives.gaussian_noise, lambda: {"scale": 0.1}, scale="not_negative")
add(objectives.masking_noise, lambda: {"probability": 0.1})
add(objectives.salt_and_pepper_noise, lambda: {"probability": 0.1}, values="numbers")
add(pyro_vae.CompiledELBO, lambda: {"elbo": Trace_ELBO()})
for kind in (guides.AmortizedNormal, guides.AmortizedMultivariateNormal, guides.AmortizedFlow):
    add(kind, lambda: {"model": vae().model, "network": networks.MLP(3, [])}, model="kept_function",
        network="kept_function", plate="name", given="names")  # fmt: skip
AMORTIZED = amortized(guides.AmortizedNormal)
add(AMORTIZED.sample_posterior, lambda: {"args": (rows(),), "num_samples": 3, "seed": 0}, "guide.sample_posterior")
add(AMORTIZED.quantiles, lambda: {"levels": [0.5], "args": (rows(),)}, "guide.quantiles", levels="levels")
add(AMORTIZED.median, lambda: {"args": (rows(),)}, "guide.median")
add(checkpoint.save_weights, lambda: {"module": vae(), "path": "new.pt"}, module="module")
add(checkpoint.load_weights, lambda: {"module": (v := vae()), "path": saved(v)}, module="module")


def fit_transformer(
    X: Any,
    n_components: int = 2,
    hidden_sizes: tuple = (),
    build: Any | None = None,
    num_epochs: int = 1,
    batch_size: int = 4,
    learning_rate: float = 0.1,
    num_particles: int = 3,
    random_state: int | None = 0,
) -> Any:
    """A transformer checks its parameters when it is fitted, as scikit-learn's do."""
    options = dict(locals())
    X = options.pop("X")
    transformer = VAETransformer(**options).fit(X)
    return transformer.score_samples(X)


add(fit_transformer, lambda: {"X": rows().numpy()}, "VAETransformer", X="table", learning_rate="not_negative",
    build="maker", random_state="random_state")  # fmt: skip
FITTED = fitted()
for name in ("transform", "score_samples"):
    add(getattr(FITTED, name), lambda: {"X": rows().numpy()}, f"VAETransformer.{name}", X="table")
add(FITTED.inverse_transform, lambda: {"Z": rows()[:, :2].numpy()}, "VAETransformer.inverse_transform", Z="table")
add(plots.plot_training, lambda: {"loss": [1.0, 2.0]}, loss="series", validation_loss="skip")
add(plots.plot_images, lambda: {"images": torch.zeros(2, 2, 3, 3)}, images="picture", limits="numbers")
add(plots.plot_khat, lambda: {"khat": torch.rand(5)}, khat="series", threshold="skip")
add(plots.plot_latent_usage, lambda: {"kl": torch.rand(3), "active": torch.ones(3) > 0}, kl="series", active="skip")
add(plots.plot_embedding, lambda: {"points": torch.rand(5, 2)}, points="picture", classes="skip")
PICTURES = {"decode": lambda z: torch.zeros(*z.shape[:-1], 3, 3)}
add(plots.plot_interpolation, lambda: PICTURES | {"start": torch.zeros(1, 2), "stop": torch.ones(1, 2), "num": 3},
    decode="function", start="skip", stop="skip")  # fmt: skip
add(plots.plot_traversal, lambda: PICTURES | {"z": torch.zeros(2)}, decode="function", z="skip", steps="skip")
