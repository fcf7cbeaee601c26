"""Models and guides made at random from a seed, with an objective that suits them."""

from __future__ import annotations

import random
from contextlib import ExitStack
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDelta, AutoLowRankMultivariateNormal, AutoMultivariateNormal, AutoNormal
from torch.distributions import constraints

TRIL = torch.tensor([[0.9, 0.0], [0.3, 0.7]])

# what a family is, given a number f that it depends on
FAMILIES = {
    "Normal": lambda f: dist.Normal(f, 0.8),
    "StudentT": lambda f: dist.StudentT(5.0, f, 1.0),
    "LogNormal": lambda f: dist.LogNormal(f, 0.6),
    "Gamma": lambda f: dist.Gamma(2.0, (-f).exp()),
    "Beta": lambda f: dist.Beta(1.5, 1 + f.exp()),
    "Dirichlet": lambda f: dist.Dirichlet(1 + f.exp().unsqueeze(-1) * torch.tensor([1.0, 2.0, 0.5])),
    "MultivariateNormal": lambda f: dist.MultivariateNormal(f.unsqueeze(-1) + torch.ones(2), scale_tril=TRIL),
    "Independent": lambda f: dist.Normal(f.unsqueeze(-1) + torch.tensor([0.0, 0.5]), 0.9).to_event(1),
    "Bernoulli": lambda f: dist.Bernoulli(logits=f),
    "Categorical": lambda f: dist.Categorical(logits=f.unsqueeze(-1) * torch.tensor([-1.0, 0.0, 0.5])),
    "Poisson": lambda f: dist.Poisson(f.exp()),
    "mixture": lambda f: dist.MixtureSameFamily(
        dist.Categorical(logits=f.unsqueeze(-1) * torch.tensor([0.5, -0.5])),
        dist.Normal(f.unsqueeze(-1) + torch.tensor([-1.0, 1.0]), 0.7),
    ),
}
DISCRETE, COUNTS = ("Bernoulli", "Categorical"), ("Poisson",)
CONTINUOUS = ("Normal", "StudentT", "LogNormal", "Gamma", "Beta", "Dirichlet", "MultivariateNormal", "Independent")
EVENT = {"Dirichlet": 3, "MultivariateNormal": 2, "Independent": 2}
AUTO = (AutoNormal, AutoDelta, AutoMultivariateNormal, AutoLowRankMultivariateNormal)


def as_number(family, value):
    """One real number of a value, for what depends on it."""
    if family in ("LogNormal", "Gamma"):
        return value.log()
    if family == "Beta":
        return value.clamp(1e-4, 1 - 1e-4).logit()
    if family in EVENT:
        return value[..., 0] - value[..., 1]
    return value.float() if family in DISCRETE + COUNTS else value


def data_of(family, shape):
    """Values in the support of a family."""
    if family in ("LogNormal", "Gamma"):
        return torch.rand(shape) + 0.2
    if family == "Beta":
        return 0.1 + 0.8 * torch.rand(shape)
    if family == "Dirichlet":
        return torch.randn(*shape, 3).softmax(-1)
    if family in EVENT:
        return torch.randn(*shape, EVENT[family])
    if family == "Bernoulli":
        return torch.bernoulli(torch.full(shape, 0.4))
    if family == "Categorical":
        return torch.randint(3, shape)
    return torch.poisson(torch.full(shape, 2.0)) if family == "Poisson" else torch.randn(shape)


# what a guide has for a latent, given a number and a width; the second of each kind is another family than the prior
GUIDES = {
    "Normal": lambda f, w: dist.Normal(f, w),
    "StudentT": lambda f, w: dist.StudentT(6.0, f, w),
    "LogNormal": lambda f, w: dist.LogNormal(f, w),
    "Gamma": lambda f, w: dist.Gamma(1 + w, (-f).exp()),
    "Beta": lambda f, w: dist.Beta(1 + w, 1 + f.exp()),
    "Dirichlet": lambda f, w: dist.Dirichlet(1 + w + f.exp().unsqueeze(-1) * torch.tensor([1.0, 1.5, 0.5])),
    "MultivariateNormal": lambda f, w: dist.MultivariateNormal(f.unsqueeze(-1) + torch.zeros(2), scale_tril=w * TRIL),
    "Independent": lambda f, w: dist.Normal(f.unsqueeze(-1) + torch.zeros(2), w).to_event(1),
    "Bernoulli": lambda f, w: dist.Bernoulli(logits=w * f),
    "Categorical": lambda f, w: dist.Categorical(logits=f.unsqueeze(-1) * torch.tensor([-0.5, 0.0, 1.0]) * w),
    "Poisson": lambda f, w: dist.Poisson(w * f.exp()),
}
OTHER = {"Normal": "StudentT", "StudentT": "Normal", "LogNormal": "Gamma", "Gamma": "LogNormal"}
OTHER |= {"MultivariateNormal": "Independent", "Independent": "MultivariateNormal"}


@dataclass
class Site:
    """A sample site of a random pair."""

    name: str
    family: str
    plates: tuple
    parents: list  # sites that its distribution depends on
    observed: bool = False
    scale: float | None = None
    mask: torch.Tensor | None = None  # of the shape of its plates
    enumerated: str | None = None  # in the "model" or the "guide"
    in_guide: str | None = None  # its family there
    follows: Site | None = None  # what it depends on in the guide


class RandomPair:
    """A model and a guide. `args()` makes new data for both, `elbo` is an objective that suits them."""

    def __init__(self, seed):
        self.seed, self.random = seed, random.Random(seed)
        torch.manual_seed(seed)
        r = self.random
        self.objective = r.choice(["Trace", "Trace", "MeanField", "Graph", "Enum", "Enum", "Renyi"])
        self.sizes = {"data": r.choice([1, 4, 6]), "inner": r.choice([2, 3]), "other": 5}
        self.auto = r.choice(AUTO) if r.random() < 0.25 and self.objective != "MeanField" else None
        self.subsample = r.randint(1, self.sizes["data"]) if r.random() < 0.3 and self.auto is None else None
        self.whole_scale = r.choice([None, None, 0.3, 7.0])
        self.latents = self._latents()
        if all(s.enumerated for s in self.latents):
            self.auto = None  # these refuse pairs without continuous latents
        self.sites = [*self.latents, *self._observed()]
        self.elbo, self.particles = self._elbo()
        self.guide = self._guide if self.auto is None else self.auto(self._without_enumerated())

    def __repr__(self):
        of = [
            f"{s.name}: {s.family} in {s.plates} given {[p.name for p in s.parents]}"
            + "".join(f", {n}" for n in ("observed", "scale", "enumerated", "in_guide") if getattr(s, n))
            + ", mask" * (s.mask is not None)
            for s in self.sites
        ]
        auto = self.auto and self.auto.__name__
        how = f"{type(self.elbo).__name__} {self.particles}, guide {auto}, {self.subsample} of {self.sizes}"
        return f"RandomPair({self.seed}): {how}, scale {self.whole_scale}; {'; '.join(of)}"

    def args(self):
        """New data."""
        return tuple(data_of(s.family, self._shape(s)) for s in self.sites if s.observed)

    def model(self, *data):
        shift, data, values = pyro.param("shift", torch.tensor(0.2)), iter(data), {}
        with poutine.scale(scale=self.whole_scale or 1.0):
            plates = self._plates(self.sites)
            for site in self.sites:
                with ExitStack() as stack:
                    self._enter(stack, site, plates)
                    f = shift + sum(0.4 * as_number(p.family, values[p.name]) for p in site.parents)
                    obs = self._cut(site, next(data), plates) if site.observed else None
                    infer = {"enumerate": "parallel"} if site.enumerated == "model" else {}
                    values[site.name] = pyro.sample(site.name, FAMILIES[site.family](f), obs=obs, infer=infer)

    def _guide(self, *_):
        values, sites = {}, [s for s in self.latents if s.enumerated != "model"]
        with poutine.scale(scale=self.whole_scale or 1.0):
            plates = self._plates(sites)
            for site in sites:
                with ExitStack() as stack:
                    self._enter(stack, site, plates)
                    loc = pyro.param(f"{site.name}.loc", lambda s=site: 0.3 * torch.randn(self._shape(s)))
                    width = pyro.param(f"{site.name}.width", torch.tensor(0.7), constraint=constraints.positive)
                    f = self._cut(site, loc, plates, 0)
                    if site.follows is not None:
                        f = f + 0.3 * as_number(site.follows.family, values[site.follows.name])
                    infer = {"enumerate": "parallel"} if site.enumerated else {}
                    fn = GUIDES[site.in_guide or site.family](f, width)
                    values[site.name] = pyro.sample(site.name, fn, infer=infer)

    # -- how it is made -----------------------------------------------------------------------------------------------

    def _latents(self):
        r, families = self.random, list(CONTINUOUS)
        where = "model" if self.auto else r.choice(["model", "guide"])  # Pyro knows few mixtures of both
        if self.objective == "Enum":
            families = [*DISCRETE * 4, *families]
        elif self.objective != "MeanField" and self.auto is None:
            families += [*DISCRETE, *COUNTS]
        found = []
        places = sorted(
            r.choices([(), ("data",), ("data", "inner")], weights=[1, 2, 1], k=r.choice([1, 1, 1, 2, 2, 3]))
        )
        for i, plates in enumerate(places):
            family = r.choice(families)
            if family in DISCRETE and self.objective == "Enum" and self.subsample and not plates:
                family = "Normal"  # Pyro wants one scale around all that depends on an enumerated site
            site = Site(f"z{i}", family, plates, self._parents(found, plates))
            if family in DISCRETE and self.objective == "Enum":
                site.enumerated = where
            elif r.random() < 0.3:
                site.in_guide = OTHER.get(family)
            known = [s for s in self._parents(found, plates) if not s.enumerated]
            site.follows = r.choice(known) if known and not site.enumerated and r.random() < 0.4 else None
            found.append(self._handled(site))
        return found

    def _observed(self):
        r = self.random
        places = [r.choice([("data",), ("data", "inner")])] + [r.choice([("data",), ("other",)])] * (r.random() < 0.3)
        families = sorted(FAMILIES)
        return [
            self._handled(Site(f"x{i}", r.choice(families), plates, self._parents(self.latents, plates), observed=True))
            for i, plates in enumerate(places)
        ]

    def _parents(self, sites, plates):
        return [s for s in sites if set(s.plates) <= set(plates) and self.random.random() < 0.7]

    def _handled(self, site):
        if self.objective != "Enum" and self.random.random() < 0.2:
            site.scale = self.random.choice([0.5, 3.0])
        if site.plates and self.random.random() < 0.25:
            site.mask = torch.rand(self._shape(site)) < 0.6
        return site

    def _elbo(self):
        r, nesting = self.random, {"max_plate_nesting": 2}
        particles = {"num_particles": r.choice([1, 1, 1, 1, 2, 3]), "vectorize_particles": r.random() < 0.8}
        if self.objective == "Renyi":
            particles["num_particles"] = r.choice([2, 3])
            return RenyiELBO(alpha=r.choice([0.0, 0.5, 2.0]), **particles, **nesting), particles
        if self.objective == "MeanField":
            return TraceMeanField_ELBO(**particles, **nesting), particles
        kinds = {"Trace": Trace_ELBO, "Graph": TraceGraph_ELBO, "Enum": TraceEnum_ELBO}
        return kinds[self.objective](**particles, **nesting), particles

    def _without_enumerated(self):
        return poutine.block(self.model, hide=[s.name for s in self.latents if s.enumerated])

    # -- how it runs --------------------------------------------------------------------------------------------------

    def _shape(self, site):
        """Of the plates' sizes; "inner" is left of "data"."""
        return tuple(self.sizes[name] for name in reversed(site.plates))

    def _plates(self, sites):
        dims = {"data": -1, "inner": -2, "other": -1}
        used = {name for site in sites for name in site.plates}
        return {
            name: pyro.plate(name, self.sizes[name], subsample_size=self.subsample if name == "data" else None, dim=dim)
            for name, dim in dims.items()
            if name in used
        }

    def _enter(self, stack, site, plates):
        for name in site.plates:
            stack.enter_context(plates[name])
        if site.scale is not None:
            stack.enter_context(poutine.scale(scale=site.scale))
        if site.mask is not None:
            stack.enter_context(poutine.mask(mask=self._cut(site, site.mask, plates, 0)))

    def _cut(self, site, value, plates, event_dim=None):
        """The rows of a subsample."""
        if self.subsample is None or "data" not in site.plates:
            return value
        event_dim = int(site.family in EVENT) if event_dim is None else event_dim
        return value.index_select(-1 - event_dim, plates["data"].indices)
