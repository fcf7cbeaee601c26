r"""A VAE as a scikit-learn transformer for pipelines, which reduces x to z = E_q[z|x].

This module needs scikit-learn. No other module of the package imports it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import torch
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils.validation import check_array, check_is_fitted, check_random_state, validate_data

from pyro_vae.arguments import check_count, check_function, check_shape
from pyro_vae.distributions.continuous import ConditionalNormal, LearnedScale
from pyro_vae.distributions.multivariate import ConditionalMultivariateNormal
from pyro_vae.distributions.priors import StandardNormal
from pyro_vae.distributions.structure import expected_value
from pyro_vae.evidence.importance import importance_sampling
from pyro_vae.models.vae import VAE
from pyro_vae.networks import MLP
from pyro_vae.pairs.threads import one_thread
from pyro_vae.training.loop import fit

__all__ = ["VAETransformer"]


class VAETransformer(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    r"""Dimension reduction by a VAE, with scikit-learn's interface.

    By default the model is z ~ N(0, I), x ~ N(g(z), σ² I) with learned σ, and the posterior has a full covariance. Both
    g and the encoder are multilayer perceptrons. Without hidden layers, this is probabilistic PCA.

    Args:
        n_components: number of dimensions of z.
        hidden_sizes: widths of the encoder's hidden layers; the decoder has the same in reverse order.
        build: makes another VAE from (number of features, n_components); default: the model above.
        num_epochs: number of epochs of the fit.
        batch_size: batch size of the fit.
        learning_rate: learning rate of the fit.
        num_particles: number of draws for each row in `score_samples`.
        random_state: a seed, or a random generator of numpy.

    Attributes:
        vae_: the trained `VAE`.
        loss_: −ELBO of each epoch, nats per row.

    Example:
        >>> from sklearn.datasets import load_digits
        >>> from sklearn.pipeline import make_pipeline
        >>> from sklearn.preprocessing import StandardScaler
        >>> reduce = make_pipeline(StandardScaler(), VAETransformer(2, num_epochs=2, random_state=0))
        >>> reduce.fit_transform(load_digits().data).shape
        (1797, 2)
    """

    def __init__(
        self,
        n_components: int = 2,
        *,
        hidden_sizes: tuple[int, ...] = (64,),
        build: Callable[[int, int], VAE] | None = None,
        num_epochs: int = 100,
        batch_size: int = 128,
        learning_rate: float = 1e-3,
        num_particles: int = 1000,
        random_state: Any = None,
    ) -> None:
        self.n_components = n_components
        self.hidden_sizes = hidden_sizes
        self.build = build
        self.num_epochs = num_epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.num_particles = num_particles
        self.random_state = random_state

    @one_thread
    def fit(self, X: Any, y: Any = None) -> VAETransformer:
        """Trains a new VAE on the rows of X, (N, features); y is ignored."""
        x, where = self._tensor(X, reset=True), "VAETransformer"
        check_count(f"{where}: n_components", self.n_components)
        check_count(f"{where}: num_particles", self.num_particles)
        check_shape(f"{where}: hidden_sizes", self.hidden_sizes, single=False)
        if self.build is not None:
            check_function(f"{where}: build", self.build, advice="build=lambda num_features, n_components: VAE(…)")
        seed = int(check_random_state(self.random_state).randint(2**31))
        with torch.random.fork_rng(), pyro.get_param_store().scope():
            torch.manual_seed(seed)
            self.vae_ = (self.build or self._build)(x.shape[1], self.n_components)
            options: dict[str, Any] = {"num_epochs": self.num_epochs, "batch_size": self.batch_size, "progress": False}
            result = fit(self.vae_.model, self.vae_.guide, x, learning_rate=self.learning_rate, seed=seed, **options)
        self.loss_ = np.array(result.loss)
        return self

    @one_thread
    def transform(self, X: Any) -> np.ndarray:
        """E_q[z|x] of each row, (N, n_components); if it is not known (flows), the mean of `num_particles` draws."""
        check_is_fitted(self)
        return self._mean(self.vae_.encode(self._tensor(X)))

    @one_thread
    def inverse_transform(self, Z: Any) -> np.ndarray:
        """E[x|z] of each row, (N, features); if it is not known, the mean of `num_particles` draws."""
        check_is_fitted(self)
        z = torch.as_tensor(check_array(Z), dtype=torch.get_default_dtype())
        if z.shape[1] != self.n_components:
            raise ValueError(f"inverse_transform: expected {self.n_components} components, got {z.shape[1]}.")
        return self._mean(self.vae_.decode(z))

    @one_thread
    def score_samples(self, X: Any) -> np.ndarray:
        """log p(x) of each row by importance sampling, (N,), nats: a lower bound in expectation."""
        check_is_fitted(self)
        x = self._tensor(X)
        with torch.random.fork_rng(), pyro.get_param_store().scope():
            torch.manual_seed(0)
            evidence = importance_sampling(
                self.vae_.model, self.vae_.guide, x, num_particles=self.num_particles, progress=False
            )
        return evidence.log_evidence.numpy()

    @one_thread
    def score(self, X: Any, y: Any = None) -> float:
        """The mean of `score_samples`, which cross-validation maximises."""
        return float(self.score_samples(X).mean())

    def _mean(self, distribution: Any) -> np.ndarray:
        mean = expected_value(distribution)
        if mean is None:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                mean = sum(distribution.sample() for _ in range(self.num_particles)) / self.num_particles
        return mean.numpy()

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float32"]
        return tags

    @property
    def _n_features_out(self) -> int:
        return self.n_components

    def _tensor(self, X: Any, *, reset: bool = False) -> torch.Tensor:
        return torch.as_tensor(validate_data(self, X, dtype=np.float32, reset=reset)).to(torch.get_default_dtype())

    def _build(self, num_features: int, latent_size: int) -> VAE:
        sizes = list(self.hidden_sizes)
        return VAE(
            StandardNormal(latent_size),
            ConditionalNormal(MLP(latent_size, sizes[::-1]), num_features, scale=LearnedScale()),
            ConditionalMultivariateNormal(MLP(num_features, sizes), latent_size),
        )
