"""A denoising autoencoder restores images that a plain one does not.

The encoder sees a corrupted x̃ ~ C(x̃|x), and the decoder has to give the clean x:

    minimise E_{C(x̃|x)} ½ ‖x − g(f(x̃))‖².

The best g ∘ f is then E[x|x̃], the mean of the clean images given the corrupted one. A plain autoencoder only has to
satisfy g(f(x)) = x on the data. If its code is as wide as the image, it learns to copy, and copies the corruption too.
A VAE does not copy: its posterior adds noise to the code, so that it denoises a little by itself. Both learn to restore
images if they are trained on corrupted ones. All models here have the same networks.

    python examples/denoising.py

Vincent, Larochelle, Lajoie, Bengio & Manzagol (2010), *Stacked Denoising Autoencoders: Learning Useful Representations
in a Deep Network with a Local Denoising Criterion*.
"""

from __future__ import annotations

import pyro
import torch
from images import load_digits
from matplotlib import pyplot as plt
from pyro.distributions import ImproperUniform
from pyro.infer import ELBO
from script import parse_options, save
from torch import Tensor
from torch.distributions import constraints

from pyro_vae import VAE, DenoisingELBO, fit
from pyro_vae.distributions import ConditionalDelta, ConditionalNormal, StandardNormal
from pyro_vae.networks import MLP
from pyro_vae.objectives.denoising import gaussian_noise, masking_noise, salt_and_pepper_noise
from pyro_vae.plots import plot_images

CODE = 64  # dimensions, as many as pixels
CORRUPTIONS = {
    "masking, 40 %": masking_noise(0.4),
    "salt and pepper, 20 %": salt_and_pepper_noise(0.2),
    "Gaussian, scale 0.3": gaussian_noise(0.3),
}


def autoencoder(name: str) -> VAE:
    """An autoencoder: the posterior is a point, and there is no prior term."""
    prior = ImproperUniform(constraints.real_vector, (), (CODE,))
    likelihood = ConditionalNormal(MLP(CODE, [128]), 64, scale=1.0)
    return VAE(prior, likelihood, ConditionalDelta(MLP(64, [128]), CODE), name=name)


def variational(name: str) -> VAE:
    """A VAE: the same networks, with a diagonal normal posterior and a prior."""
    likelihood = ConditionalNormal(MLP(CODE, [128]), 64, scale=0.1)
    return VAE(StandardNormal(CODE), likelihood, ConditionalNormal(MLP(64, [128]), CODE), name=name)


def error(x: Tensor, restored: Tensor) -> float:
    """Mean of ‖x − x'‖² over the images."""
    return float((x - restored).square().sum(1).mean())


def main() -> None:
    options = parse_options(__doc__)
    digits = load_digits()
    train, test = digits.train.flatten(1), digits.test.flatten(1)
    settings = {"num_epochs": 1 if options.quick else 60, "learning_rate": 2e-3, "seed": options.seed}

    def trained(vae: VAE, loss: ELBO | None = None) -> VAE:
        fit(vae.model, vae.guide, train, loss=loss, **settings)
        return vae

    plain = {"AE": trained(autoencoder("ae")), "VAE": trained(variational("vae"))}
    print("‖x − x'‖² of test images: corrupted, x' = x̃, and restored, x' = g(f(x̃))")
    labels = ["corrupted", "AE", "VAE", "denoising AE", "denoising VAE"]
    print(f"{'corruption':<22}" + "".join(f"{label:>15}" for label in labels))
    figure, axes = plt.subplots(3, 1, figsize=(7, 10))
    for ax, (label, corrupt) in zip(axes, CORRUPTIONS.items(), strict=True):
        loss = DenoisingELBO(corrupt)
        models = plain | {
            "denoising AE": trained(autoencoder(f"ae_{label}"), loss),
            "denoising VAE": trained(variational(f"vae_{label}"), loss),
        }
        pyro.set_rng_seed(options.seed)  # the corruption of the test images must not depend on the length of training
        x = corrupt(test)
        images = {"corrupted": x} | {name: model.reconstruct(x, mean=True) for name, model in models.items()}
        print(f"{label:<22}" + "".join(f"{error(test, x):>15.4f}" for x in images.values()))
        grid = torch.stack([test, *images.values()])[:, :10].reshape(6, 10, 8, 8)
        plot_images(grid, row_labels=["clean", *images], ax=ax)
        ax.set_title(label)
    save(figure, options, "denoising")


if __name__ == "__main__":
    main()
