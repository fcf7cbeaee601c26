r"""Amortized guides: q(u|x) whose parameters a network reads off the rows of the data, for any model.

    h_n = network(inputs_n),    u_n = c + s ∘ v_n,    v_n ~ N(μ(h_n), Σ(h_n)), or a flow,

with c and s the centre and spread of each coordinate under the prior. The scales of v start at 0.1.

The amortized q has one set of weights for all rows, those seen and those to come. The price is the amortization gap
(Cremer, Li & Duvenaud 2018, *Inference Suboptimality in Variational Autoencoders*).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from math import expm1, log
from typing import Any

import pyro
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

from pyro_vae.arguments import checked
from pyro_vae.distributions.conditional import SMALLEST_SCALE, Conditional
from pyro_vae.distributions.continuous import ConditionalNormal
from pyro_vae.distributions.multivariate import ConditionalMultivariateNormal
from pyro_vae.guides.chain import Chain, FlowChain, FullChain, MeanFieldChain
from pyro_vae.guides.flow import SiteFlow
from pyro_vae.guides.guide import RowGuide
from pyro_vae.guides.inputs import PlateRows, features_of, first_tensor
from pyro_vae.guides.latents import Latents
from pyro_vae.pairs.modes import evaluation_mode
from pyro_vae.pairs.names import store_name, trainable

__all__ = ["AmortizedFlow", "AmortizedMultivariateNormal", "AmortizedNormal"]

FIRST_SCALE = 0.1  # of u, in the prior's units, before training
FIRST_RAW_SCALE = log(expm1(FIRST_SCALE - SMALLEST_SCALE)) - log(expm1(1.0 - SMALLEST_SCALE))


class Amortized(RowGuide):
    """Abstract base class: a network gives features of each row, and `head` what q(u|x) needs of these."""

    centre: Tensor
    spread: Tensor
    given_centre: Tensor
    given_spread: Tensor

    @checked
    def __init__(
        self,
        model: Callable,
        network: Callable,
        *,
        plate: str = "data",
        inputs: Callable | None = None,
        outside: Any = AutoNormal,
        given: Sequence[str] = (),
        name: str | None = None,
    ) -> None:
        super().__init__(model, plate=plate, outside=outside, given=given)
        if not callable(network) or isinstance(network, (type, Tensor)):
            raise TypeError(
                f"{self.name}: network: expected a module that maps rows of inputs to features, got {network!r}. Try "
                "pyro_vae.networks.MLP(width of a row, [64, 64])."
            )
        if inputs is not None and not callable(inputs):
            raise TypeError(
                f"{self.name}: inputs: expected a function of the arguments, got {type(inputs).__name__}. Try "
                "inputs=lambda x: x."
            )
        self.network, self.inputs = network, first_tensor if inputs is None else inputs
        self.head: Any = None
        self._given_name = self._registered = type(self).__name__ if name is None else name

    @abstractmethod
    def make_head(self, width: int, latents: Latents) -> nn.Module:
        """What maps features of this width to the parameters of q."""

    @abstractmethod
    def chain_of(self, features: Tensor) -> Chain:
        """The factors of q(u|x) given features (*particles, N, F)."""

    def set_up(self, args: tuple, kwargs: dict[str, Any]) -> Latents:
        if self.latents is not None:
            return self.latents
        rows = self.inputs(*args, **kwargs)
        with torch.no_grad(), evaluation_mode(self):
            features = features_of(self.network, rows, self.name)
        latents = super().set_up(args, kwargs)
        width = features.shape[-1] + len(latents.given_centre)
        try:
            self.head = self.make_head(width, latents).to(features)
        except BaseException:
            self.latents = None
            raise
        self.register_buffer("centre", latents.centre.to(features))
        self.register_buffer("spread", latents.spread.to(features))
        self.register_buffer("given_centre", latents.given_centre.to(features))
        self.register_buffer("given_spread", latents.given_spread.to(features))
        return latents

    def make_chain(self, rows: PlateRows, given: Tensor | None, args: tuple, kwargs: dict[str, Any]) -> Chain:
        if self.inputs is first_tensor:
            rows.check_order(self.name)
        features = features_of(self.network, self.inputs(*args, **kwargs), self.name, rows)
        if given is not None:
            given = (given - self.given_centre) / self.given_spread
            batch = torch.broadcast_shapes(features.shape[:-1], given.shape[:-1])
            features = torch.cat([features.expand(*batch, -1), given.expand(*batch, -1)], -1)
        return self.chain_of(features)

    def register(self) -> None:
        parts = {"network": self.network, "head": self.head}
        self._registered = store_name(parts, "head", self._registered, self._given_name, what="guide")
        for part, module in parts.items():
            for name, parameter in trainable(module):
                pyro.param(f"{self._registered}$$${part}.{name}", parameter)


class _Gaussian(Amortized):
    """Abstract base class of the Gaussian ones."""

    @abstractmethod
    def family(self, width: int, dim: int) -> Conditional:
        """The conditional distribution of v, whose network is left out."""

    def make_head(self, width: int, latents: Latents) -> nn.Module:
        family = self.family(width, latents.dim)
        with torch.no_grad():  # its second parameter is the scale
            family.head.bias[latents.dim : 2 * latents.dim] = FIRST_RAW_SCALE
        return family

    def _of(self, features: Tensor) -> Any:
        return self.head.from_features(features.reshape(-1, features.shape[-1]), features.shape[:-1])


class AmortizedNormal(_Gaussian):
    """A guide with independent coordinates for each data point, u_n ~ N(μ(x_n), diag σ²(x_n)).

    References:
        Kingma & Welling (2014), Auto-Encoding Variational Bayes.

    Latents inside of the plate may have any shape and any support that is the image of R^D (positive, bounded, simplex,
    ordered, Cholesky factors), inner plates, and supports that depend on each other. Discrete latents are left to
    enumeration. The guide may be used before training; the first call makes its weights.

    Each call runs the model too, up to its last latent: what a model counts or averages there (BatchNorm in a prior)
    moves twice in a step. Sites have the masks and scales of the model's, those of handlers around the model included.
    An `AutoGuideList` takes medians of what is no autoguide of Pyro's from a function: append
    `AutoCallable(model, guide, guide.median)`, of a guide with `outside=None`.

    Args:
        model: a Pyro model, with the data points in a plate called `plate`.
        network: maps rows of `inputs` to features (N, F), of any width F: any module, one that pools a set or reads a
            sequence as well. What follows, the guide makes itself.
        plate: name of the plate of data points.
        inputs: a function of the arguments that gives what the network reads, a tensor with a row for each data point
            or a tuple of these; default: the first tensor among the arguments. Integers are read as numbers, unless
            the network embeds them.
        outside: guide of the latents outside of the plate: a class of `pyro.infer.autoguide`, an instance of one (or
            any guide of these latents), or None, where they have a guide elsewhere.
        given: names of latents outside of the plate that locals are conditioned on, q(z|x, θ).
        name: of the weights in Pyro's parameter store; default: that of the class.

    Raises:
        ValueError: at the first call, as a model shows its latents, and `inputs` the width of rows, no sooner than it
            has arguments: no such plate, or a Python loop; a discrete latent that is not marked for enumeration; a site
            that comes and goes; a support without a bijection; a network that does not take the rows, or another number
            of rows than the plate has. At any call, where Pyro validates: features that are not finite.
        TypeError: something that cannot be called.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer import SVI, Trace_ELBO
        >>> from pyro_vae.networks import MLP
        >>> def model(counts):  # a positive rate and a probability for each row
        ...     with pyro.plate("data", len(counts)):
        ...         rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        ...         share = pyro.sample("share", dist.Beta(2.0, 2.0))
        ...         mean = torch.stack([rate * share, rate * (1 - share)], -1)
        ...         pyro.sample("counts", dist.Poisson(mean).to_event(1), obs=counts)
        >>> guide = AmortizedNormal(model, MLP(2, [16]))
        >>> counts = torch.poisson(torch.ones(20, 2))
        >>> loss = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step(counts)
        >>> {name: tuple(value.shape) for name, value in guide.median(counts).items()}
        {'rate': (20,), 'share': (20,)}
    """

    def family(self, width: int, dim: int) -> Conditional:
        return ConditionalNormal(nn.Identity(), dim, features=width)

    def chain_of(self, features: Tensor) -> Chain:
        base = self._of(features).base_dist
        return MeanFieldChain(self.centre + self.spread * base.loc, self.spread * base.scale)


class AmortizedMultivariateNormal(_Gaussian):
    """A guide with full covariance between all latents of a data point, u_n ~ N(μ(x_n), Σ(x_n)).

    Use it where latents of one row are not independent given the data, which the ELBO of `AmortizedNormal` pays for.
    The head has D (D + 3)/2 outputs.

    References:
        Kingma & Welling (2019), An Introduction to Variational Autoencoders, section 2.5.

    Arguments and errors are those of `AmortizedNormal`.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_vae import fit
        >>> from pyro_vae.networks import MLP
        >>> def model(x):  # rows share a mean and a scale, and have a mean of their own
        ...     centre = pyro.sample("centre", dist.Normal(0.0, 3.0))
        ...     with pyro.plate("data", 100, subsample_size=len(x)):
        ...         mean = pyro.sample("mean", dist.Normal(centre, 1.0))
        ...         scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
        ...         obs = dist.Normal(mean.unsqueeze(-1), scale.unsqueeze(-1)).expand([len(x), 5]).to_event(1)
        ...         pyro.sample("x", obs, obs=x)
        >>> guide = AmortizedMultivariateNormal(model, MLP(5, [16]))  # and AutoNormal for `centre`
        >>> result = fit(model, guide, torch.randn(100, 5), num_epochs=2, batch_size=50, seed=0, progress=False)
        >>> guide.get_posterior(torch.zeros(3, 5)).scale_tril.shape  # of u = (mean, log scale)
        torch.Size([3, 2, 2])
    """

    def family(self, width: int, dim: int) -> Conditional:
        return ConditionalMultivariateNormal(nn.Identity(), dim, features=width)

    def chain_of(self, features: Tensor) -> Chain:
        q = self._of(features)
        return FullChain(self.centre + self.spread * q.loc, self.spread.unsqueeze(-1) * q.scale_tril)


class AmortizedFlow(Amortized):
    """A guide with a flow for each site, given the row and the sites before it: posteriors that are no Gaussians.

    Each flow is a monotone spline of every coordinate, an autoregressive map of several, and a location and a scale
    (`pyro_vae.guides.flow`). Draws and their densities take one pass; densities of other values as many as a site has
    coordinates.

    References:
        Durkan, Bekasov, Murray & Papamakarios (2019), Neural Spline Flows.

    Arguments and errors are those of `AmortizedNormal`.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_vae import importance_sampling
        >>> from pyro_vae.networks import MLP
        >>> def model(x):  # x says how long z is, not where it points
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...         pyro.sample("x", dist.Normal(z.norm(dim=-1), 0.1), obs=x)
        >>> guide = AmortizedFlow(model, MLP(1, [16]))
        >>> importance_sampling(model, guide, torch.ones(4), num_particles=100, seed=0).log_evidence.shape
        torch.Size([4])
    """

    def make_head(self, width: int, latents: Latents) -> nn.Module:
        return nn.ModuleList(
            SiteFlow(
                width + latent.start,
                latents.centre[latent.start : latent.stop],
                latents.spread[latent.start : latent.stop],
                first_raw_scale=FIRST_RAW_SCALE,
            )
            for latent in latents.inside
        )

    def chain_of(self, features: Tensor) -> Chain:
        return FlowChain(features, self.head, self.centre, self.spread)
