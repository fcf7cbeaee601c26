"""Networks: modules that map tensors to tensors, without any probability.

Each network maps rows of inputs to rows of features. Its attribute `out_features` gives their size, an int for a
vector or a shape (channels, height, width) for a feature map. The head of a conditional distribution
(`pyro_vae.distributions`) reads it. Any `nn.Module` can serve as a network; these are common ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vae.arguments import check_shape, checked

__all__ = ["MLP", "ConvDecoder", "ConvEncoder", "MaskedInput"]


class MLP(nn.Module):
    """A multilayer perceptron, h = a(W_l ··· a(W_1 x + b_1) ··· + b_l), over an event of any shape.

    The output is the last hidden layer; the linear map to parameters belongs to the head.
    With an empty `hidden_sizes`, the network only flattens its input, which makes a linear model.

    Args:
        in_shape: shape of one input, e.g. 784 or (28, 28); it is flattened.
        hidden_sizes: widths of the hidden layers, e.g. [400, 200].
        context_size: total width of the context: further input vectors, which are concatenated to the first input.
        activation: class of the nonlinearity, or a function that makes it, such as `nn.ELU`.
        norm: what normalises each layer before the nonlinearity: None, "layer" (`nn.LayerNorm`) or "batch"
            (`nn.BatchNorm1d`). While it trains, "batch" makes the rows of a batch depend on one another; the ELBO is
            that of the batch then.
        dropout: probability that an element of a hidden layer is set to zero while it trains.

    Raises:
        ValueError: no such `norm`, or `dropout` is no probability below one.

    Example:
        >>> net = MLP((28, 28), [400], context_size=10)
        >>> net(torch.zeros(5, 28, 28), torch.zeros(5, 10)).shape
        torch.Size([5, 400])
    """

    @checked
    def __init__(
        self,
        in_shape: int | Sequence[int],
        hidden_sizes: Sequence[int],
        *,
        context_size: int = 0,
        activation: Callable[[], nn.Module] = nn.ELU,
        norm: str | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        _check_norm("MLP", norm)
        self.in_shape = check_shape("in_shape", in_shape)
        self.context_size = context_size
        sizes = [prod(self.in_shape) + context_size, *hidden_sizes]
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(sizes):
            layers += [nn.Linear(fan_in, fan_out), *_after(fan_out, activation, norm, dropout)]
        self.layers = nn.Sequential(*layers)
        self.out_features = sizes[-1]

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        _check_shape("MLP", x, self.in_shape)
        x = x.flatten(x.dim() - len(self.in_shape))
        return self.layers(_concatenate(x, context, self.context_size))


class ConvEncoder(nn.Module):
    """Strided convolutions, each of which divides height and width by the stride, followed by one dense layer.

    Convolutions are padded by p = ⌊(k − 1)/2⌋ zeros for a kernel of size k, so that n rows of pixels become
    ⌊(n + 2p − k)/s⌋ + 1 with a stride of s: that is n/s rounded up where k is odd.

    Args:
        in_shape: (channels, height, width) of an image, of any height and width.
        channels: output channels of the convolutions.
        out_features: width of the dense layer.
        context_size: total width of the context, which is concatenated before the dense layer.
        activation: class of the nonlinearity, or a function that makes it.
        kernel_size: k, height and width of the kernels.
        stride: s, from 1 to `kernel_size`.
        norm: what normalises each layer before the nonlinearity: None, "layer" (over channels and pixels of an image,
            `nn.GroupNorm(1, …)`) or "batch" (`nn.BatchNorm2d`); see `MLP`.
        dropout: probability that a channel (`nn.Dropout2d`), or an element of the dense layer, is set to zero while it
            trains.

    Raises:
        ValueError: the image is too small, or an option has another value.

    Example:
        >>> ConvEncoder((1, 28, 28), [16, 32], 64)(torch.zeros(5, 1, 28, 28)).shape
        torch.Size([5, 64])
    """

    @checked
    def __init__(
        self,
        in_shape: Sequence[int],
        channels: Sequence[int],
        out_features: int,
        *,
        context_size: int = 0,
        activation: Callable[[], nn.Module] = nn.ELU,
        kernel_size: int = 3,
        stride: int = 2,
        norm: str | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        _check_norm("ConvEncoder", norm)
        self.in_shape = check_shape("in_shape", in_shape)
        self.context_size = context_size
        if len(self.in_shape) != 3:
            raise ValueError(
                f"ConvEncoder: expected in_shape=(channels, height, width), got {self.in_shape}. Try "
                f"(1, *{self.in_shape[-2:]}), and x.unsqueeze(-3), for images without channels."
            )
        height, width = _sizes("ConvEncoder", self.in_shape[1:], len(channels), kernel_size, stride)[-1]
        sizes = [self.in_shape[0], *channels]
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(sizes):
            layers += [
                nn.Conv2d(fan_in, fan_out, kernel_size, stride=stride, padding=_padding(kernel_size)),
                *_after(fan_out, activation, norm, dropout, images=True),
            ]
        self.convolutions = nn.Sequential(*layers)
        self.dense = nn.Sequential(
            nn.Linear(sizes[-1] * height * width + context_size, out_features),
            *_after(out_features, activation, norm, dropout),
        )
        self.out_features = out_features

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        _check_shape("ConvEncoder", x, self.in_shape)
        x = self.convolutions(x).flatten(1)
        return self.dense(_concatenate(x, context, self.context_size))


class ConvDecoder(nn.Module):
    """The mirror image of `ConvEncoder`: a dense layer, then transposed convolutions that multiply height and width.

    Its feature maps have the sizes that those of a `ConvEncoder` of the same options have, in the other order, for
    images of any height and width. The output is a feature map (channels[-1], height, width) of the size of the image.
    The head maps its channels to parameters pixel by pixel, as a 1×1 convolution.

    Args:
        in_features: width of the latent vector.
        channels: channels of the feature maps from the smallest to the last, one convolution for each, e.g. [32, 16].
        out_size: (height, width) of the image.
        context_size: total width of the context, which is concatenated to the latent vector.
        activation: class of the nonlinearity, or a function that makes it.
        kernel_size, stride, norm, dropout: as in `ConvEncoder`.

    Raises:
        ValueError: the image is too small, or an option has another value.

    Example:
        >>> ConvDecoder(8, [32, 16], (28, 28))(torch.zeros(5, 8)).shape
        torch.Size([5, 16, 28, 28])
    """

    @checked
    def __init__(
        self,
        in_features: int,
        channels: Sequence[int],
        out_size: Sequence[int],
        *,
        context_size: int = 0,
        activation: Callable[[], nn.Module] = nn.ELU,
        kernel_size: int = 3,
        stride: int = 2,
        norm: str | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        _check_norm("ConvDecoder", norm)
        self.in_shape = (in_features,)
        self.context_size = context_size
        if not channels or len(out_size) != 2:
            raise ValueError(
                "ConvDecoder: expected at least one channel count and out_size=(height, width), got channels="
                f"{list(channels)} and out_size={tuple(out_size)}. Try ConvDecoder({in_features}, [32, 16], (28, 28))."
            )
        sizes = _sizes("ConvDecoder", tuple(out_size), len(channels), kernel_size, stride)[::-1]  # smallest first
        self._smallest = (channels[0], *sizes[0])
        width, padding = prod(self._smallest), _padding(kernel_size)
        self.dense = nn.Sequential(
            nn.Linear(in_features + context_size, width), *_after(width, activation, norm, dropout)
        )
        layers: list[nn.Module] = []
        for i, (small, large) in enumerate(pairwise(sizes)):
            fan_in, fan_out = channels[i], channels[min(i + 1, len(channels) - 1)]
            # (small − 1)·s − 2p + k + extra = large: `extra` undoes the rounding of the division by s
            extra = tuple(b - (a - 1) * stride + 2 * padding - kernel_size for a, b in zip(small, large, strict=True))
            layers += [
                nn.ConvTranspose2d(fan_in, fan_out, kernel_size, stride, padding, output_padding=extra),  # type: ignore[arg-type]
                *_after(fan_out, activation, norm, dropout, images=True),
            ]
        self.convolutions = nn.Sequential(*layers)
        self.out_features = (channels[-1], *sizes[-1])

    def forward(self, z: Tensor, *context: Tensor) -> Tensor:
        _check_shape("ConvDecoder", z, self.in_shape)
        z = self.dense(_concatenate(z, context, self.context_size))
        return self.convolutions(z.unflatten(-1, self._smallest))


class MaskedInput(nn.Module):
    """A network that sees which elements of its input are missing (NaN): it gets zeros in their place, and a mask.

    The mask is one where there is a value. It is concatenated to the values along the first event dimension: a vector
    of length D becomes one of length 2D, and an image with C channels becomes one with 2C channels.

    Args:
        network: takes the doubled input (and the context).

    Example:
        >>> net = MaskedInput(MLP(2 * 3, [16]))
        >>> net(torch.tensor([[1.0, torch.nan, 2.0]])).isfinite().all().item()
        True
    """

    @checked
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    @property
    def out_features(self) -> int | tuple[int, ...]:
        return self.network.out_features  # type: ignore[return-value]

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        if x.dim() < 2:
            raise ValueError(f"MaskedInput: expected rows (N, *event), got shape {tuple(x.shape)}. Try x[None].")
        missing = x.isnan()
        return self.network(torch.cat([x.masked_fill(missing, 0.0), (~missing).to(x.dtype)], dim=1), *context)


def _padding(kernel_size: int) -> int:
    return (kernel_size - 1) // 2


def _sizes(where: str, size: tuple[int, ...], times: int, kernel_size: int, stride: int) -> list[tuple[int, ...]]:
    """Height and width of an image, and those after each of so many convolutions."""
    if not 1 <= stride <= kernel_size:  # between kernels that do not meet, pixels would be left out
        raise ValueError(
            f"{where}: expected 1 <= stride <= kernel_size, got kernel_size={kernel_size} and stride={stride}. Try "
            f"kernel_size={max(3, 2 * stride - 1)}, stride={max(1, stride)}."
        )
    sizes = [size]
    for _ in range(times):
        sizes.append(tuple((n + 2 * _padding(kernel_size) - kernel_size) // stride + 1 for n in sizes[-1]))
        if min(sizes[-1]) < 1:
            raise ValueError(
                f"{where}: expected an image that {times} convolutions of kernel_size={kernel_size} and "
                f"stride={stride} leave pixels of, got {size}, of which {len(sizes) - 2} leave {sizes[-2]}. Try fewer "
                "channels, or an odd kernel_size."
            )
    return sizes


def _after(
    width: int, activation: Callable[[], nn.Module], norm: str | None, dropout: float, *, images: bool = False
) -> list[nn.Module]:
    """What follows a linear layer or convolution: normalisation, nonlinearity, dropout."""
    layers: list[nn.Module] = []
    if norm == "layer":
        layers.append(nn.GroupNorm(1, width) if images else nn.LayerNorm(width))
    elif norm == "batch":
        layers.append(nn.BatchNorm2d(width) if images else nn.BatchNorm1d(width))
    layers.append(activation())
    if dropout:
        layers.append(nn.Dropout2d(dropout) if images else nn.Dropout(dropout))
    return layers


def _check_norm(where: str, norm: Any) -> None:
    if norm not in (None, "layer", "batch"):
        raise ValueError(
            f'{where}: expected norm=None, "layer" or "batch", got {norm!r}. Try "layer", or a network of your own.'
        )


def _check_shape(where: str, x: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(x.shape[x.dim() - len(shape) :]) != shape:
        raise ValueError(
            f"{where}: expected inputs that end in shape {shape}, got {tuple(x.shape)}. "
            f"Try {where}(in_shape={tuple(x.shape[1:])}, …), or reshape the data."
        )


def _concatenate(x: Tensor, context: tuple[Tensor, ...], size: int) -> Tensor:
    got = sum(c.shape[-1] for c in context)
    if got != size or any(c.dim() != 2 for c in context):
        shapes = ", ".join(str(tuple(c.shape)) for c in context) or "none"
        advice = (
            "to pass the context behind x, as in fit(model, guide, (x, c)) and vae.generate(None, c)"
            if not context
            else f"context_size={got}, and labels as one-hot vectors"
            if all(c.dim() == 2 for c in context)
            else "c.flatten(1) for several dimensions, c.unsqueeze(-1) for none, one-hot vectors for labels"
        )
        raise ValueError(f"network: expected context of total width {size}, (N, width), got {shapes}. Try {advice}.")
    return torch.cat([x, *context], dim=-1) if context else x
