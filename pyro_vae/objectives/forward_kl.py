r"""The forward KL divergence on simulated data as an objective: q learns from draws of the model, and from no data.

    L = −E_{p(z, x)} log q(z|x) = E_{p(x)} [KL(p(z|x)‖q(z|x)) + H(p(z|x))],

so that L is lowest where q(z|x) is the posterior of every x that the model makes. The gradient is that of maximum
likelihood: latents need neither be reparameterized nor enumerated, and p(x|z) need not be known, only simulated. Where
the ELBO, which minimises KL(q‖p), leaves out modes that q cannot cover as well, this one spreads q over all of them;
where real data differ from simulated ones, it cares less for these. It goes by the names of sleep phase, inference
compilation and neural posterior estimation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro.infer import ELBO
from torch import Tensor

from pyro_vae.arguments import checked
from pyro_vae.objectives.simulator import Simulator
from pyro_vae.pairs.threads import one_thread

__all__ = ["ForwardKL"]


class ForwardKL(ELBO):
    r"""−E_{p(z, x)} log q(z|x) on data that each call simulates, as a loss in nats, summed over the data.

    The arguments say how many data points are simulated, and in which context: what the model observes is replaced by
    draws, as `simulate` does, and all other arguments stay. A plate that scales B rows up to N scales this loss by N/B
    as well. The estimate is unbiased, and so is its gradient, which is that of log q alone: the model simulates without
    gradients, in evaluation mode, and its parameters are trained by other terms, if at all (`CombinedELBO`).

    Latents outside of the plate, θ, are drawn from the guide as what has been learned of the model, like its
    parameters, and log q(θ) is not a part of the loss: a guide that is no function of a data set would be fitted to the
    prior of θ. The latents inside are then learned as q(z|x, θ) or q(z|x), whichever the guide has. With `plate=None`,
    one call simulates one data set, and all latents are scored.

    Args:
        num_particles: simulated data sets for each call.
        plate: name of the plate of data points; None takes all data as one point.

    Raises:
        ValueError: in the first call of a pair: no such plate; an observed value that is none of the arguments; an
            argument that the model observes and also reads; a guide without latents inside of the plate, with
            auxiliary sites whose values do not follow from the latents, or that does not read what the model observes.

    References:
        Hinton, Dayan, Frey & Neal (1995), The "wake-sleep" algorithm for unsupervised neural networks.
        Papamakarios & Murray (2016), Fast ε-free Inference of Simulation Models with Bayesian Conditional Density
        Estimation.
        Le, Kosiorek, Siddharth, Teh & Wood (2019), Revisiting Reweighted Wake-Sleep, section 3.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):  # the exact posterior, for which the loss is its entropy
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
        >>> pyro.set_rng_seed(0)
        >>> loss = ForwardKL().loss(model, guide, torch.zeros(100_000))
        >>> round(loss / 100_000, 1), round(dist.Normal(0.0, 0.5**0.5).entropy().item(), 1)
        (1.1, 1.1)
    """

    @checked
    def __init__(self, num_particles: int = 1, *, plate: str | None = "data") -> None:
        super().__init__(num_particles=num_particles)
        self.plate = plate
        self._simulators: dict[tuple, Simulator] = {}  # of the last pair, by the kinds of its arguments

    def __copy__(self) -> ForwardKL:  # what is known of a pair is shared: a copy may find it while it is recorded
        new = type(self).__new__(type(self))
        new.__dict__.update(self.__dict__)
        return new

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_simulators": {}}

    @one_thread
    def loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """−log q(z|x) of new draws, nats."""
        with torch.no_grad():
            return self._loss(model, guide, args, kwargs).item()

    @one_thread
    def loss_and_grads(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """−log q(z|x) of new draws, nats. Adds its gradient to those of the guide's parameters."""
        loss = self._loss(model, guide, args, kwargs)
        if loss.requires_grad:
            loss.backward()
        return loss.item()

    @one_thread
    def differentiable_loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Tensor:
        """−log q(z|x) of new draws, nats, as a tensor with a gradient."""
        return self._loss(model, guide, args, kwargs)

    def _loss(self, model: Callable, guide: Callable, args: tuple, kwargs: dict) -> Tensor:
        if any((known.model, known.guide) != (model, guide) for known in self._simulators.values()):
            self._simulators.clear()
        kinds = tuple((key, isinstance(a, Tensor)) for key, a in [*enumerate(args), *kwargs.items()])
        if kinds not in self._simulators:
            self._simulators[kinds] = Simulator(model, guide, args, kwargs, self.plate)
        terms = [self._simulators[kinds].log_prob(args, kwargs) for _ in range(self.num_particles)]
        return -sum(terms[1:], terms[0]) / self.num_particles

    def _get_trace(self, model: Callable, guide: Callable, args: tuple, kwargs: dict) -> tuple:
        raise NotImplementedError  # an abstract method of Pyro's, which nothing here calls
