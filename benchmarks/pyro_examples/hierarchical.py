"""Pairs with latents that all data share, and regressions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pyro
import pyro.contrib.gp as gp
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    init_to_feasible,
)
from pyro.nn import PyroModule, PyroSample

from pyro_examples.example import Example, Namespace, digits, load

__all__ = ["EXAMPLES"]


def _sparse_gamma(checkout: Path, how: str) -> Example:
    module = load(checkout, "sparse_gamma_def.py")
    family = module.SparseGammaDEF()
    family.top_width, family.mid_width, family.bottom_width, family.image_size = 3, 2, 2, 9
    family.alpha_z = family.alpha_w = torch.tensor(0.5)
    x = torch.poisson(torch.full((6, 9), 2.0))
    guides = {
        "custom": family.guide,
        "auto": AutoDiagonalNormal(family.model, init_loc_fn=init_to_feasible),
        "easy": module.MyEasyGuide(family.model),
    }
    elbo = TraceMeanField_ELBO() if how == "custom" else Trace_ELBO()
    return Example(family.model, guides[how], (x,), joint=True, elbo=elbo)


def _lda(checkout: Path, how: str) -> Example:
    module = load(checkout, "lda.py")
    sizes = {"num_topics": 2, "num_words": 6, "num_docs": 8, "num_words_per_doc": 5}
    args = Namespace(**sizes, layer_sizes="8")
    data = module.model(args=args)[2]
    if how == "own":
        guide: Callable = partial(module.parametrized_guide, module.make_predictor(args))
    else:
        guide = AutoNormal(poutine.block(module.model, hide=["word_topics"]))
    common = {"plate": "documents", "joint": True, "summed": 2, "steps": 100}
    return Example(module.model, guide, (data,), {"args": args}, elbo=TraceEnum_ELBO(max_plate_nesting=2), **common)


def eight_schools(checkout: Path) -> Example:
    module = load(checkout, "eight_schools/svi.py")
    return Example(module.model, module.guide, (module.data,), steps=1000, learning_rate=0.05)


def eight_schools_mcmc(checkout: Path) -> Example:
    module = load(checkout, "eight_schools/mcmc.py")
    args = (module.model, module.data.sigma, module.data.y)
    guide = AutoDiagonalNormal(module.conditioned_model)
    return Example(module.conditioned_model, guide, args, plate=None, joint=True, steps=500)


def _baseball(checkout: Path, model: str, guide: type) -> Example:
    function = getattr(load(checkout, "baseball.py"), model)
    at_bats = torch.full((18,), 45.0)
    hits = dist.Binomial(45, dist.Beta(10.0, 27.0).sample((18,))).sample()
    joint = model != "not_pooled"
    return Example(function, guide(function), (at_bats, hits), plate="num_players", joint=joint, steps=400)


def _sparse_regression(checkout: Path, guide: type) -> Example:
    module = load(checkout, "sparse_regression.py")
    x, y, _, _ = module.get_data(N=20, P=6, S=3, Q=2)
    names = ("alpha1", "beta1", "alpha2", "beta2", "alpha3", "c")
    hypers = {"expected_sparsity": 1.0, **dict(zip(names, (3.0, 1.0, 3.0, 1.0, 1.0, 1.0), strict=True))}
    own = guide(module.model, init_loc_fn=module.init_loc_fn)
    return Example(module.model, own, (x, y, hypers), plate=None, joint=True, steps=300)


def toy_mixture(checkout: Path) -> Example:
    module = load(checkout, "toy_mixture_model_discrete_enumeration.py")
    prior, _, data = module.generate_data(20)
    obs = {name: data[name] for name in "AC"}
    common = {"plate": "data_plate", "joint": True, "summed": 1}
    return Example(module.model, module.guide, (prior, obs, 20), elbo=TraceEnum_ELBO(max_plate_nesting=1), **common)


def _sv_dkl(checkout: Path, classes: int) -> Example:
    module = load(checkout, "contrib/gp/sv-dkl.py")
    x, y = digits(12), torch.arange(12) % classes
    kernel = gp.kernels.Warping(gp.kernels.RBF(input_dim=10, lengthscale=torch.ones(10)), iwarping_fn=module.CNN())
    binary = classes == 2
    likelihood = gp.likelihoods.Binary() if binary else gp.likelihoods.MultiClass(num_classes=classes)
    shape = torch.Size([] if binary else [classes])
    options = {"likelihood": likelihood, "latent_shape": shape, "num_data": 12, "whiten": True, "jitter": 1e-4}
    y = y.float() if binary else y
    process = gp.models.VariationalSparseGP(X=x, y=y, kernel=kernel, Xu=x[:4].clone(), **options)
    common = {"plate": None, "joint": True, "elbo": TraceMeanField_ELBO(), "steps": 100}
    return Example(process.model, process.guide, **common)


def lkj(checkout: Path) -> Example:
    model = load(checkout, "lkj.py").model
    y = torch.randn(20, 3, dtype=torch.double)
    return Example(model, AutoMultivariateNormal(model), (y,), plate="observations", joint=True, steps=400)


class _Regression(PyroModule):
    """y ~ N(w·x + b, σ), with priors of the weights by `PyroSample`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = PyroModule[torch.nn.Linear](width, 1)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, width]).to_event(2))
        self.linear.bias = PyroSample(dist.Normal(0.0, 10.0).expand([1]).to_event(1))

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        sigma = pyro.sample("sigma", dist.Uniform(0.0, 10.0))
        mean = self.linear(x).squeeze(-1)
        with pyro.plate("data", x.shape[0]):
            pyro.sample("obs", dist.Normal(mean, sigma), obs=y)
        return mean


def _regression(checkout: Path, guide: type) -> Example:
    model, x = _Regression(2), torch.randn(20, 2)
    y = x @ torch.tensor([1.0, -0.5]) + 0.3 + 0.5 * torch.randn(20)
    return Example(model, guide(model), (x, y), joint=True, steps=500)


def _baseballs() -> dict[str, Callable[[Path], Example]]:
    pairs = [
        ("fully_pooled", AutoNormal),
        ("not_pooled", AutoNormal),
        ("partially_pooled", AutoNormal),
        ("partially_pooled_with_logit", AutoNormal),
        ("partially_pooled_with_logit", AutoLowRankMultivariateNormal),
        ("partially_pooled_with_logit", AutoIAFNormal),
    ]
    return {f"baseball {m}, {g.__name__}": partial(_baseball, model=m, guide=g) for m, g in pairs}


EXAMPLES: dict[str, Callable[[Path], Example]] = {
    **{f"sparse_gamma_def, {how} guide": partial(_sparse_gamma, how=how) for how in ("custom", "auto", "easy")},
    "lda, its own guide": partial(_lda, how="own"),
    "lda, AutoNormal": partial(_lda, how="AutoNormal"),
    "eight_schools svi": eight_schools,
    "eight_schools mcmc, AutoDiagonalNormal": eight_schools_mcmc,
    **_baseballs(),
    "sparse_regression, AutoDelta": partial(_sparse_regression, guide=AutoDelta),
    "sparse_regression, AutoNormal": partial(_sparse_regression, guide=AutoNormal),
    "toy_mixture": toy_mixture,
    "sv-dkl, two classes": partial(_sv_dkl, classes=2),
    "sv-dkl, three classes": partial(_sv_dkl, classes=3),
    "lkj, AutoMultivariateNormal": lkj,
    **{f"PyroSample, {g.__name__}": partial(_regression, guide=g) for g in (AutoNormal, AutoMultivariateNormal)},
}
