"""A deep autoencoder, trained layer by layer and then as a whole.

Each layer is a shallow autoencoder of the codes of the layer before: with h₀ = x, layer l minimises

    ½ ‖h_{l−1} − g_l(h_l)‖²,   h_l = f_l(h_{l−1}).

Stacked, they are one deep autoencoder with encoder f₃ ∘ f₂ ∘ f₁ and decoder g₁ ∘ g₂ ∘ g₃. Gradient descent on ½ ‖x −
g₁(g₂(g₃(h₃)))‖² then fine-tunes it. Greedy training does not see how an error in a code affects the reconstruction;
fine-tuning does. For comparison, the same network is trained from random weights, once with the epochs of fine-tuning
alone, and once with as many epochs as all four trainings together. With today's optimisers, the greedy start is worth
its epochs and no more.

    python examples/stacked_autoencoder.py

Hinton & Salakhutdinov (2006), *Reducing the Dimensionality of Data with Neural Networks*.
"""

from __future__ import annotations

from itertools import pairwise

import pyro
import torch
from images import load_digits
from matplotlib import pyplot as plt
from pyro.distributions import ImproperUniform
from script import parse_options, save
from torch import Tensor
from torch.distributions import constraints

from pyro_vae import VAE, fit, fit_layers, stack
from pyro_vae.distributions import ConditionalDelta, ConditionalNormal
from pyro_vae.networks import MLP
from pyro_vae.plots import plot_images

SIZES = [64, 32, 16, 4]  # the pixels, and the code of each layer
HIDDEN = 64  # units between a code and the next


def new_layers(seed: int, name: str) -> list[VAE]:
    """Three autoencoders; the same seed gives the same weights."""
    pyro.set_rng_seed(seed)
    return [
        VAE(
            ImproperUniform(constraints.real_vector, (), (code,)),
            ConditionalNormal(MLP(code, [HIDDEN]), size, scale=1.0),
            ConditionalDelta(MLP(size, [HIDDEN]), code),
            name=f"{name}_{size}_{code}",
        )
        for size, code in pairwise(SIZES)
    ]


def error(x: Tensor, reconstruction: Tensor) -> float:
    """Mean of ‖x − x'‖² over the images."""
    return float((x - reconstruction).square().sum(1).mean())


def main() -> None:
    options = parse_options(__doc__)
    digits = load_digits()
    train, test = digits.train.flatten(1), digits.test.flatten(1)
    epochs = 1 if options.quick else 40
    settings = {"learning_rate": 2e-3, "seed": options.seed}
    means = {}  # reconstructions of the test images

    def report(label: str, autoencoder: VAE) -> None:
        means[label] = autoencoder.reconstruct(test, mean=True)
        errors = error(train, autoencoder.reconstruct(train, mean=True)), error(test, means[label])
        print(f"{label:<32} {errors[0]:>14.4f} {errors[1]:>14.4f}")

    variance = (train - train.mean(0)).square().sum(1).mean(), (test - train.mean(0)).square().sum(1).mean()
    print(f"{f'{SIZES[-1]} code dimensions':<32} {'train ‖x−x′‖²':>14} {'test ‖x−x′‖²':>14}")
    print(f"{'mean image (no code)':<32} {variance[0]:>14.4f} {variance[1]:>14.4f}")

    layers = new_layers(options.seed, "greedy")
    fit_layers(layers, train, num_epochs=epochs, **settings)
    for depth in (1, 2):  # the deeper, the narrower the code
        report(f"layers 1 to {depth}, {SIZES[depth]} dimensions", stack(layers[:depth]))
    deep = stack(layers, name="greedy_stack")
    report("layers 1 to 3, layer by layer", deep)
    fit(deep.model, deep.guide, train, num_epochs=epochs, **settings)
    report("layers 1 to 3, fine-tuned", deep)

    for factor in (1, 4):
        scratch = stack(new_layers(options.seed, f"random_{factor}"), name=f"random_stack_{factor}")
        fit(scratch.model, scratch.guide, train, num_epochs=factor * epochs, **settings)
        report(f"from random weights, {factor * epochs} epochs", scratch)

    labels = ["layers 1 to 3, layer by layer", "layers 1 to 3, fine-tuned"]
    grid = torch.stack([test[:10], *(means[label][:10] for label in labels)]).reshape(-1, 10, 8, 8)
    _, ax = plt.subplots(figsize=(8, 2.7))
    plot_images(grid, row_labels=["x", "layer by layer", "fine-tuned"], ax=ax)
    save(ax.figure, options, "stacked_autoencoder")


if __name__ == "__main__":
    main()
