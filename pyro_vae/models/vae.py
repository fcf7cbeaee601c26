r"""The variational autoencoder: three conditional distributions become a Pyro model and its guide.

    model: z ~ p(z), x ~ p(x|z)        guide: z ~ q(z|x)        in plate "data", with sites "z" and "x"

(Kingma & Welling 2014, *Auto-Encoding Variational Bayes*; Rezende, Mohamed & Wierstra 2014.) Both are plain Pyro
functions: everything that takes a (model, guide) pair also takes `vae.model, vae.guide`. Inside a larger model stand
`vae.sample_model` and `vae.sample_guide`, the same sites in the caller's plate, or `vae.likelihood_given(z)` and
`vae.posterior_given(x)`, the distributions alone.
"""

from __future__ import annotations

import copy
from typing import Any

import pyro
import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor, nn

from pyro_vae.arguments import check_count, check_name, checked
from pyro_vae.distributions.structure import picklable_state
from pyro_vae.models.inputs import (
    ROWS_AT_ONCE,
    check_contexts,
    check_parts,
    check_posterior,
    check_rows_and_contexts,
    data_plate,
    event_dims_of,
    event_dims_of_rows,
    in_chunks,
    rows_to_generate,
    value_of,
)
from pyro_vae.models.registration import Declared, random_attributes
from pyro_vae.models.sites import declared, explained, latent_shape, likelihood_at, model_sites, posterior_of
from pyro_vae.pairs.modes import evaluation_mode
from pyro_vae.pairs.seeds import seeded
from pyro_vae.pairs.threads import one_thread

__all__ = ["VAE"]


class VAE(nn.Module):
    """p(z), p(x|z) and an amortized q(z|x), as a Pyro model and guide.

    Anything that returns a distribution can fill a role: a conditional distribution of this package, an `nn.Module` or
    function, a fixed distribution (as prior), a `pyro.distributions.ConditionalDistribution` or a Zuko flow.
    Further arguments of `model` and `guide` are context c, for p(x|z, c) and q(z|x, c); p(z) does not depend on it.

    When the model or guide runs, it registers its weights with Pyro as `name$$$role.parameter`, so that
    `pyro.infer.SVI` trains them. A second VAE with the same name gets its own name there ("vae_2"), so that two VAEs
    never share weights. Frozen parameters (`requires_grad_(False)`) stay frozen. Weights may be random: those that
    `pyro.poutine.lift` or `pyro.nn.PyroSample` gives a prior are latents outside of all plates, one set for all rows.
    `torch.save` and `pickle` take a VAE; `pyro_vae.checkpoint.save_weights` writes the weights alone.

    Args:
        prior: p(z), called without arguments, or a fixed distribution.
        likelihood: p(x|z), called with z (and context).
        posterior: the approximate posterior q(z|x), called with x (and context).
        name: prefix of the parameters in Pyro's parameter store.

    Example:
        >>> from pyro_vae.distributions import ConditionalBernoulli, ConditionalNormal, StandardNormal
        >>> from pyro_vae.networks import MLP
        >>> vae = VAE(
        ...     StandardNormal(2),
        ...     ConditionalBernoulli(MLP(2, [32]), (8, 8)),
        ...     ConditionalNormal(MLP((8, 8), [32]), 2),
        ... )
        >>> vae.generate(3).shape, vae.encode(torch.zeros(5, 8, 8)).mean.shape
        (torch.Size([3, 8, 8]), torch.Size([5, 2]))

        A Bayesian decoder, w ~ N(0, 1), with a Normal guide for its weights and the encoder for the codes:

        >>> import pyro.distributions as dist
        >>> from pyro import poutine
        >>> from pyro.infer.autoguide import AutoNormal
        >>> weights = {f"likelihood.{name}": w for name, w in vae.likelihood.named_parameters()}
        >>> priors = {name: dist.Normal(0.0, 1.0).expand(w.shape).to_event(w.dim()) for name, w in weights.items()}
        >>> model = poutine.lift(vae.model, priors)
        >>> guide_of_weights = AutoNormal(poutine.block(model, hide=["z", "x", "data"]))
        >>> def guide(x, total=None):
        ...     guide_of_weights(x, total=total)
        ...     vae.guide(x, total=total)
        >>> svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), pyro.infer.Trace_ELBO())
        >>> loss = svi.step(torch.zeros(5, 8, 8), total=100)  # a mini-batch of 5 of 100 rows
    """

    @checked
    def __init__(self, prior: Any, likelihood: Any, posterior: Any, *, name: str = "vae") -> None:
        super().__init__()
        self.prior, self.likelihood, self.posterior = check_parts(prior, likelihood, posterior)
        self.name = name
        self._registered = name  # the name in the parameter store
        self._shape_of: tuple[Any, Size] | None = None
        self._frozen = False

    # -- the two Pyro functions ---------------------------------------------------------------------------------------

    def model(
        self, x: Tensor | None = None, *context: Tensor, size: int | None = None, total: int | None = None
    ) -> Tensor:
        """z ~ p(z), x ~ p(x|z, c) in plate "data". It observes `x`, or generates `size` rows if `x` is None.

        Args:
            x: (N, *event), or None.
            *context: c, each (N, *event).
            size: number of rows to generate without x; default: as many as the context has, or one.
            total: number of rows of all data, of which these are a mini-batch: log-probabilities in the plate are
                scaled by total / N, those of random weights are not. The guide gets the same. Default: these are all.

        Returns:
            x, (N, *event).
        """
        dims = event_dims_of_rows(*context) if x is None else event_dims_of_rows(x, *context)
        rows = x if x is not None else context[0] if context else None
        if size is None:
            size = 1 if rows is None else len(rows)
        check_contexts("model", size, *context)
        with data_plate(size, total):
            return model_sites(self, x, context, dims)[1]

    def guide(self, x: Tensor, *context: Tensor, total: int | None = None) -> Tensor:
        """z ~ q(z|x, c) in plate "data", for x, c and total as in `model`. Returns z, (N, *event)."""
        dims = event_dims_of_rows(x, *context)
        check_contexts("guide", len(x), *context)
        with data_plate(len(x), total):
            return pyro.sample("z", posterior_of(self, x, context, dims))

    # -- inside another model -----------------------------------------------------------------------------------------

    def sample_model(
        self, x: Tensor | None = None, *context: Tensor, prior: TorchDistribution | None = None, prefix: str = ""
    ) -> Tensor:
        """The sites of `model` in the plates of a larger model: z ~ prior, x ~ p(x|z, c).

        Weights are declared outside of the plates that are open, so that they stay one set for all rows.

        Args:
            x: (*plates, *event), which it observes; None draws x.
            *context: c, each (*plates, *event).
            prior: the distribution of z instead of p(z), with the event shape of p(z), such as one with means of
                groups, a mixture or a regression.
            prefix: of the names of the sites, `prefix + "z"` and `prefix + "x"`, where a model has several VAEs.

        Returns:
            z, (*plates, *event).

        Example:
            >>> import pyro.distributions as dist
            >>> from pyro_vae.distributions import ConditionalNormal, StandardNormal
            >>> from pyro_vae.networks import MLP
            >>> vae = VAE(StandardNormal(2), ConditionalNormal(MLP(2, []), 8), ConditionalNormal(MLP(8, []), 2))
            >>> def model(x, y, group):  # groups have means of their own, and z predicts y
            ...     means = pyro.sample("means", dist.Normal(0.0, 1.0).expand([3, 2]).to_event(2))
            ...     slope = pyro.sample("slope", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            ...     with pyro.plate("data", len(x)):
            ...         z = vae.sample_model(x, prior=dist.Normal(means[..., group, :], 1.0).to_event(1))
            ...         pyro.sample("y", dist.Normal(z @ slope, 1.0), obs=y)
            >>> globals_only = pyro.poutine.block(model, hide=["z", "x", "y", "data"])
            >>> guide_of_globals = pyro.infer.autoguide.AutoNormal(globals_only)
            >>> def guide(x, y, group):
            ...     guide_of_globals(x, y, group)
            ...     with pyro.plate("data", len(x)):
            ...         vae.sample_guide(x)
            >>> svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), pyro.infer.Trace_ELBO())
            >>> loss = svi.step(torch.randn(5, 8), torch.randn(5), torch.tensor([0, 1, 2, 0, 1]))
        """
        dims = event_dims_of_rows(*context) if x is None else event_dims_of(self.likelihood, x, *context)
        return model_sites(self, x, context, dims, prior, prefix)[0]

    def sample_guide(self, x: Tensor, *context: Tensor, prefix: str = "") -> Tensor:
        """The site of `guide` in the plates of a larger guide: z ~ q(z|x, c), for arguments as in `sample_model`.

        Returns:
            z, (*plates, *event).
        """
        return pyro.sample(f"{check_name('sample_guide: prefix', prefix)}z", self.posterior_given(x, *context))

    def likelihood_given(self, z: Tensor, *context: Tensor) -> TorchDistribution:
        """p(x|z, c) with gradients, and with its weights registered, for a `pyro.sample` statement of a larger model.

        Args:
            z: (*batch, *event), under any number of plates.
            *context: c, each (N, *event).

        Returns:
            A distribution with batch shape (*batch,).
        """
        return likelihood_at(self, declared(self, "likelihood"), z, context)

    def posterior_given(self, x: Tensor, *context: Tensor) -> TorchDistribution:
        """q(z|x, c) with gradients, and with its weights registered, for a `pyro.sample` statement of a larger guide.

        Args:
            x: (*plates, *event).
            *context: c, each (*plates, *event).

        Returns:
            A distribution with batch shape (*plates,).
        """
        return posterior_of(self, x, context, event_dims_of(self.likelihood, x, *context))

    def frozen(self) -> VAE:
        """A copy that no longer learns, for a larger model: a trained decoder as a prior (PriorVAE).

        Its weights are fixed and not in Pyro's parameter store, it stays in evaluation mode, and it can be pickled, so
        that NUTS runs over a model with it in several chains. What a function in a role uses is not copied.

        Raises:
            ValueError: weights are random (`PyroSample`).

        References:
            Semenova et al. (2022), PriorVAE: encoding spatial priors with variational autoencoders.

        Example:
            >>> import pyro.distributions as dist
            >>> from pyro_vae.distributions import ConditionalNormal, StandardNormal
            >>> from pyro_vae.networks import MLP
            >>> vae = VAE(StandardNormal(2), ConditionalNormal(MLP(2, []), 8), ConditionalNormal(MLP(8, []), 2))
            >>> decoder = vae.frozen()  # after training on draws of a process at 8 places
            >>> def model(y, places):  # observed at some of them
            ...     z = pyro.sample("z", decoder.prior())
            ...     f = pyro.deterministic("f", decoder.likelihood_given(z).mean)
            ...     pyro.sample("y", dist.Normal(f[places], 0.1).to_event(1), obs=y)
            >>> mcmc = pyro.infer.MCMC(
            ...     pyro.infer.NUTS(model), num_samples=5, warmup_steps=5, num_chains=1, disable_progbar=True
            ... )
            >>> mcmc.run(torch.zeros(3), torch.tensor([0, 2, 5]))
            >>> mcmc.get_samples()["z"].shape
            torch.Size([5, 2])
        """
        random = [name for part in self.children() for _, name in random_attributes(part)]
        if random:
            raise ValueError(
                f"frozen: expected weights that are fixed, got a PyroSample, {random[0]!r}. Try to set it to a "
                "parameter, such as the mean of its posterior."
            )
        frozen = copy.deepcopy(self).requires_grad_(False)
        frozen._frozen = True
        return frozen.eval()

    def train(self, mode: bool = True) -> VAE:
        """Sets training mode, as in `nn.Module`; what `frozen` returned stays in evaluation mode."""
        return super().train(mode and not self._frozen)

    # -- without gradients, in evaluation mode, for any number of rows ------------------------------------------------

    @one_thread
    @torch.no_grad()
    def encode(self, x: Tensor, *context: Tensor) -> TorchDistribution:
        """q(z|x, c): a distribution with batch shape (N,)."""
        with evaluation_mode():
            dims = event_dims_of_rows(x, *context)
            check_contexts("encode", len(x), *context)
            with explained(x):
                q_z = Declared(self.posterior, "posterior")(x, *context, event_dims=dims)
            check_posterior(q_z, latent_shape(self), x.shape[:1])
            return q_z if q_z.batch_shape == x.shape[:1] else q_z.expand(x.shape[:1])

    @one_thread
    @torch.no_grad()
    def decode(self, z: Tensor, *context: Tensor) -> TorchDistribution:
        """p(x|z, c): a distribution with batch shape (*batch,), for z of shape (*batch, *event)."""
        with evaluation_mode():
            return likelihood_at(self, Declared(self.likelihood, "likelihood"), z, context)

    @one_thread
    @checked
    @seeded
    def generate(
        self, size: int | None = None, *context: Tensor, mean: bool = False, seed: int | None = None
    ) -> Tensor:
        """Generates new data: z ~ p(z), x ~ p(x|z, c).

        Args:
            size: N; default: the number of rows of the context, or one.
            *context: c, each (N, *event).
            mean: return E[x|z] instead of a draw of x.
            seed: of the draws.

        Returns:
            (N, *event).
        """
        size = rows_to_generate(size, context)
        check_contexts("generate", size, *context)

        def rows(start: int, stop: int) -> Tensor:
            with torch.no_grad(), evaluation_mode():
                z = Declared(self.prior, "prior")().expand((stop - start,)).sample()
                return value_of(self.decode(z, *(c[start:stop] for c in context)), mean)

        return in_chunks(rows, size)

    @one_thread
    @checked
    @seeded
    def reconstruct(self, x: Tensor, *context: Tensor, mean: bool = False, seed: int | None = None) -> Tensor:
        """Encodes x and decodes it again: z ~ q(z|x, c), x' ~ p(x|z, c).

        Args:
            x: (N, *event).
            *context: c, each (N, *event).
            mean: return E[x'|z] at z = E_q[z] instead of draws of z and x'. A distribution without a mean in closed
                form (a flow) gives a draw, and categories give the most probable one.
            seed: of the draws.

        Returns:
            (N, *event).
        """
        check_rows_and_contexts("reconstruct", x, *context)

        def rows(start: int, stop: int) -> Tensor:
            c = [c[start:stop] for c in context]
            z = value_of(self.encode(x[start:stop], *c), mean)
            return value_of(self.decode(z, *c), mean)

        return in_chunks(rows, len(x))

    @one_thread
    @checked
    @seeded
    def similar(self, x: Tensor, *context: Tensor, size: int, mean: bool = False, seed: int | None = None) -> Tensor:
        """Generates data like x: it draws z_1, …, z_size ~ q(z|x, c) for each row, and x' ~ p(x|z_s, c) for each z_s.

        Args:
            x: (N, *event).
            *context: c, each (N, *event).
            size: number of draws for each row.
            mean: return E[x'|z_s] instead of draws of x', so that only the codes differ between draws.
            seed: of the draws.

        Returns:
            (size, N, *event).
        """
        size = check_count("similar: size", size)
        check_rows_and_contexts("similar", x, *context)
        draws = [min(ROWS_AT_ONCE, size - i) for i in range(0, size, ROWS_AT_ONCE)]

        def rows(start: int, stop: int) -> Tensor:
            c = [c[start:stop] for c in context]
            q_z = self.encode(x[start:stop], *c)
            return torch.cat([value_of(self.decode(q_z.sample((s,)), *c), mean) for s in draws]).movedim(0, 1)

        return in_chunks(rows, len(x), size).movedim(1, 0)

    def __getstate__(self) -> dict[str, Any]:
        return picklable_state(self, super())
