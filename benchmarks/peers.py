"""One VAE, written for each system: for Pyro, for torch alone, for NumPyro and for pythae.

A network is named by its sizes, "784-400-50" or "784-200-200-50" (ELU, mirrored in the decoder), or is "conv": two
convolutions of stride two with 16 and 32 channels, a dense layer of 64, and their mirror image. The likelihood is
Bernoulli, the prior a standard normal.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vae import VAE
from pyro_vae.distributions import (
    ConditionalBernoulli,
    ConditionalMultivariateNormal,
    ConditionalNormal,
    StandardNormal,
)
from pyro_vae.networks import MLP, ConvDecoder, ConvEncoder


def sizes(network: str) -> tuple[list[int], int]:
    """Hidden sizes and latent size."""
    *hidden, latent = (int(n) for n in network.split("-")[1:]) if network != "conv" else (50,)
    return hidden, latent


def images(network: str, rows: int) -> Tensor:
    """Random binary images."""
    shape = (1, 28, 28) if network == "conv" else (784,)
    return torch.bernoulli(torch.full((rows, *shape), 0.3), generator=torch.Generator().manual_seed(0))


def ours(network: str, covariance: str = "diagonal") -> VAE:
    """The VAE of this package."""
    hidden, latent = sizes(network)
    family = ConditionalNormal if covariance == "diagonal" else ConditionalMultivariateNormal
    torch.manual_seed(0)
    if network == "conv":
        decoder, encoder = ConvDecoder(latent, [32, 16], (28, 28)), ConvEncoder((1, 28, 28), [16, 32], 64)
        return VAE(StandardNormal(latent), ConditionalBernoulli(decoder, (1, 28, 28)), family(encoder, latent))
    decoder, encoder = MLP(latent, hidden[::-1]), MLP(784, hidden)
    return VAE(StandardNormal(latent), ConditionalBernoulli(decoder, (784,)), family(encoder, latent))


class Networks(nn.Module):
    """Encoder and decoder in plain torch, with a diagonal covariance; the same layers as those of `ours`."""

    def __init__(self, network: str) -> None:
        super().__init__()
        hidden, self.latent = sizes(network)
        if network == "conv":
            self.encoder = nn.Sequential(
                nn.Conv2d(1, 16, 3, 2, 1), nn.ELU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ELU(), nn.Flatten(),
                nn.Linear(32 * 49, 64), nn.ELU(), nn.Linear(64, 2 * self.latent),
            )  # fmt: skip
            self.decoder = nn.Sequential(
                nn.Linear(self.latent, 32 * 49), nn.ELU(), nn.Unflatten(1, (32, 7, 7)),
                nn.ConvTranspose2d(32, 32, 4, 2, 1), nn.ELU(), nn.ConvTranspose2d(32, 16, 4, 2, 1), nn.ELU(),
                nn.Conv2d(16, 1, 1),
            )  # fmt: skip
        else:
            self.encoder = self._mlp([784, *hidden, 2 * self.latent])
            self.decoder = self._mlp([self.latent, *hidden[::-1], 784])

    @staticmethod
    def _mlp(widths: list[int]) -> nn.Module:
        layers = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), nn.ELU())]
        return nn.Sequential(*layers[:-1])

    def loss(self, x: Tensor) -> Tensor:
        """−ELBO per row, from one draw each, as a user of torch writes it (Kingma & Welling 2014, appendix B)."""
        loc, log_scale = self.encoder(x).chunk(2, -1)
        z = loc + log_scale.exp() * torch.randn_like(loc)
        logits = self.decoder(z)
        reconstruction = nn.functional.binary_cross_entropy_with_logits(logits, x, reduction="sum")
        kl = 0.5 * (loc.square() + (2 * log_scale).exp() - 1 - 2 * log_scale).sum()
        return (reconstruction + kl) / len(x)

    def log_weight(self, x: Tensor, num_particles: int) -> Tensor:
        """(K, N) log-weights, the encoder run once."""
        loc, log_scale = self.encoder(x).chunk(2, -1)
        noise = torch.randn(num_particles, *loc.shape)
        z = loc + log_scale.exp() * noise
        logits = self.decoder(z.flatten(0, 1)).unflatten(0, (num_particles, len(x)))
        log_likelihood = -nn.functional.binary_cross_entropy_with_logits(
            logits, x.expand_as(logits), reduction="none"
        ).flatten(2).sum(-1)  # fmt: skip
        return log_likelihood + (0.5 * noise.square() - 0.5 * z.square() + log_scale).sum(-1)


def pyro_pair(networks: Networks) -> tuple[Any, Any]:
    """Model and guide as Pyro's tutorial writes them."""
    import pyro
    import pyro.distributions as dist

    def model(x: Tensor) -> None:
        pyro.module("decoder", networks.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), networks.latent), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=networks.decoder(z)).to_event(x.dim() - 1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", networks.encoder)
        with pyro.plate("data", len(x)):
            loc, log_scale = networks.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return model, guide


# -- NumPyro ----------------------------------------------------------------------------------------------------------


def jax_networks(network: str) -> tuple[Any, Any, int]:
    """Encoder and decoder as (init, apply) pairs, and the latent size."""
    import jax
    import jax.numpy as jnp

    hidden, latent = sizes(network)

    def dense(key: Any, a: int, b: int) -> tuple:
        return jax.random.normal(key, (a, b)) / math.sqrt(a), jnp.zeros(b)

    def mlp(widths: list[int]) -> tuple[Any, Any]:
        def init(key: Any, shape: Any) -> tuple:
            keys = jax.random.split(key, len(widths) - 1)
            return None, [dense(k, a, b) for k, a, b in zip(keys, widths[:-1], widths[1:], strict=True)]

        def apply(parameters: Any, x: Any) -> Any:
            for i, (w, b) in enumerate(parameters):
                x = x @ w + b
                x = jax.nn.elu(x) if i < len(parameters) - 1 else x
            return x

        return init, apply

    if network != "conv":
        return mlp([784, *hidden, 2 * latent]), mlp([latent, *hidden[::-1], 784]), latent
    layout = ("NCHW", "OIHW", "NCHW")

    def kernel(key: Any, out: int, into: int, width: int) -> tuple:
        return jax.random.normal(key, (out, into, width, width)) / math.sqrt(into * width**2), jnp.zeros((out, 1, 1))

    def convolve(x: Any, weights: tuple, stride: int = 1, padding: int = 0, dilation: int = 1) -> Any:
        edges = [(padding, padding)] * 2
        return (
            jax.lax.conv_general_dilated(
                x, weights[0], (stride, stride), edges, lhs_dilation=(dilation, dilation), dimension_numbers=layout
            )
            + weights[1]
        )

    def init_encoder(key: Any, shape: Any) -> tuple:
        k = jax.random.split(key, 4)
        return None, [kernel(k[0], 16, 1, 3), kernel(k[1], 32, 16, 3), dense(k[2], 1568, 64), dense(k[3], 64, 100)]

    def encode(p: Any, x: Any) -> Any:
        x = jax.nn.elu(convolve(jax.nn.elu(convolve(x, p[0], 2, 1)), p[1], 2, 1))
        x = jax.nn.elu(x.reshape(len(x), -1) @ p[2][0] + p[2][1])
        return x @ p[3][0] + p[3][1]

    def init_decoder(key: Any, shape: Any) -> tuple:
        k = jax.random.split(key, 4)
        return None, [dense(k[0], 50, 1568), kernel(k[1], 32, 32, 4), kernel(k[2], 16, 32, 4), kernel(k[3], 1, 16, 1)]

    def decode(p: Any, z: Any) -> Any:
        x = jax.nn.elu(z @ p[0][0] + p[0][1]).reshape(-1, 32, 7, 7)
        x = jax.nn.elu(convolve(jax.nn.elu(convolve(x, p[1], padding=2, dilation=2)), p[2], padding=2, dilation=2))
        return convolve(x, p[3])

    return (init_encoder, encode), (init_decoder, decode), latent


def numpyro_pair(network: str, shape: tuple[int, ...]) -> tuple[Any, Any]:
    """Model and guide for NumPyro."""
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    encoder, decoder, latent = jax_networks(network)

    def model(x: Any) -> None:
        decode = numpyro.module("decoder", decoder, (1, latent))
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0, 1).expand([latent]).to_event(1))
            numpyro.sample("x", dist.Bernoulli(logits=decode(z)).to_event(len(shape) - 1), obs=x)

    def guide(x: Any) -> None:
        encode = numpyro.module("encoder", encoder, shape)
        with numpyro.plate("data", len(x)):
            loc, log_scale = jnp.split(encode(x), 2, -1)
            numpyro.sample("z", dist.Normal(loc, jnp.exp(log_scale)).to_event(1))

    return model, guide


# -- pythae -----------------------------------------------------------------------------------------------------------


def pythae_model(network: str) -> nn.Module:
    """pythae's VAE around the same networks; its decoder returns probabilities."""
    from pythae.models import VAE as PythaeVAE
    from pythae.models import VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder

    networks = Networks(network)

    class Encoder(BaseEncoder):
        def __init__(self) -> None:
            super().__init__()
            self.net = networks.encoder

        def forward(self, x: Tensor) -> Any:
            loc, log_variance = self.net(x).chunk(2, -1)
            return ModelOutput(embedding=loc, log_covariance=log_variance)

    class Decoder(BaseDecoder):
        def __init__(self) -> None:
            super().__init__()
            self.net = networks.decoder

        def forward(self, z: Tensor) -> Any:
            return ModelOutput(reconstruction=torch.sigmoid(self.net(z)))

    shape = (1, 28, 28) if network == "conv" else (784,)
    config = VAEConfig(input_dim=shape, latent_dim=networks.latent, reconstruction_loss="bce")
    return PythaeVAE(config, Encoder(), Decoder())
