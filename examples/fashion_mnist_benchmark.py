"""A published VAE on Fashion-MNIST, trained by the published recipe: log p(x) of the 10 000 test images.

    python examples/fashion_mnist_benchmark.py --prior normal        # hours on a CPU: 2000 epochs at most
    python examples/fashion_mnist_benchmark.py --prior vamp
    python examples/fashion_mnist_benchmark.py --num-epochs 200      # stop earlier, and say so

The published values, in nats and with 5000 particles (Norouzi, Fleet & Norouzi 2020, *Exemplar VAE*), are −228.70 ±
0.15 with the prior N(0, I) and −227.35 ± 0.05 with the VampPrior of Tomczak & Welling (2018). Their recipe:

- 784-300-300-40 with gated layers;
- pixels are probabilities; training images are drawn anew for every batch, validation and test images once (with
  NumPy's seed 777, which gives the published test set);
- KL warm-up over 100 epochs; at most 2000 epochs; training stops after 50 epochs without a better validation ELBO;
- Adam on normalised gradients.

The run writes a checkpoint to --output as it goes. If it is interrupted, the same command resumes it; with a larger
--num-epochs, a finished run goes on from its end.
"""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pyro.distributions as dist
import torch
from images import DEBIAN_FOLDER, load_digits, load_fashion_mnist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from pyro_vae import VAE, FitResult, fit, importance_sampling
from pyro_vae.checkpoint import save_weights
from pyro_vae.distributions import ConditionalBernoulli, ConditionalNormal, StandardNormal, VampPrior
from pyro_vae.objectives.beta import BetaELBO
from pyro_vae.objectives.schedules import linear
from pyro_vae.plots import plot_training

PUBLISHED = {"normal": "-228.70 ± 0.15", "vamp": "-227.35 ± 0.05"}


class GatedLayers(nn.Sequential):
    """h ← (W h + b) ∘ sigmoid(V h + c), twice."""

    def __init__(self, size: int, width: int = 300) -> None:
        layers = [nn.Flatten(1), nn.Linear(size, 2 * width), nn.GLU(), nn.Linear(width, 2 * width), nn.GLU()]
        super().__init__(*layers)
        self.out_features = width


class Posterior(ConditionalNormal):
    """N(μ(x), σ²(x)) with log σ² kept between −6 and 2."""

    def distribution(self, loc: Tensor, log_variance: Tensor) -> Any:
        scale = (0.5 * log_variance.clamp(-6, 2)).exp()
        return dist.Normal(loc, scale).to_event(1)


class Likelihood(ConditionalBernoulli):
    """Bernoulli with probabilities kept between 1e-5 and 1 − 1e-5."""

    def distribution(self, logits: Tensor) -> Any:
        largest = math.log(1e5 - 1)
        return super().distribution(logits.clamp(-largest, largest))


class AdamNormGrad(torch.optim.Adam):
    """Adam on normalised gradients: the gradient of each parameter is divided by its norm."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        torch._foreach_div_(gradients, [n + 1e-7 for n in torch._foreach_norm(gradients)])
        return super().step(closure)


class Binarised(Dataset):
    """Pixels as probabilities; each batch is a fresh draw."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __len__(self) -> int:
        return len(self.x)

    def __getitems__(self, rows: list[int]) -> Tensor:
        return torch.bernoulli(self.x[rows])


def build_vae(prior: str, shape: tuple[int, ...], num_pseudo_inputs: int) -> VAE:
    size, latent = math.prod(shape), 40
    posterior = Posterior(GatedLayers(size), latent)
    likelihood = Likelihood(GatedLayers(latent), shape)
    p_z: Any = StandardNormal(latent)
    if prior == "vamp":
        p_z = VampPrior(posterior, 0.05 + 0.01 * torch.randn(num_pseudo_inputs, *shape), limits=(0.0, 1.0))
    vae = VAE(p_z, likelihood, posterior, name=prior)
    for module in vae.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=math.sqrt(2 / module.in_features))
    return vae


def load(folder: Path) -> tuple[str, Tensor, Tensor, Tensor]:
    """The name, the training images as probabilities, and the binary validation and test images of the recipe."""
    if folder == DEBIAN_FOLDER and not folder.is_dir():
        print(f"No {folder} (apt-get install dataset-fashion-mnist): using the 8×8 digits of scikit-learn instead.")
        images, held_out = load_digits(), 150
    else:
        try:
            images, held_out = load_fashion_mnist(folder), 10000
        except ValueError as error:
            sys.exit(str(error))
    generator = np.random.RandomState(777)
    fixed = [generator.binomial(1, x.double().numpy()) for x in (images.train[-held_out:], images.test)]
    return images.name, images.train[:-held_out], *(torch.from_numpy(x).float() for x in fixed)


def train(vae: VAE, x: Tensor, validation: Tensor, options: argparse.Namespace) -> FitResult:
    steps = -(-len(x) // 100)
    loader = DataLoader(Binarised(x), batch_size=100, shuffle=True, collate_fn=lambda rows: rows)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fit ended at beta")  # of a run that is stopped in its warm-up
        return fit(
            vae.model,
            vae.guide,
            loader,
            num_epochs=options.num_epochs,
            loss=BetaELBO(linear(100 * steps)),
            optimizer=lambda parameters: AdamNormGrad(parameters, lr=5e-4, fused=True),
            validation_data=validation,
            patience=50,
            seed=options.seed,
            device=options.device,
            checkpoint=options.output / f"checkpoint_{options.prior}.pt",
        )


def main() -> None:
    options = parse_options()
    options.output.mkdir(parents=True, exist_ok=True)
    name, x, validation, test = load(options.data)
    torch.manual_seed(options.seed)
    vae = build_vae(options.prior, tuple(x.shape[1:]), min(500, len(x) // 10))
    result = train(vae, x, validation, options)
    save_weights(vae, options.output / f"weights_{options.prior}.pt")
    draw(result, options)

    test = test[: options.limit].to(options.device)
    evidence = importance_sampling(vae.model, vae.guide, test, num_particles=options.num_particles)
    log_p, over_images, over_particles = evidence.mean
    print(f"{name}, prior {options.prior}, {len(result.loss)} epochs, the best of them {result.best_epoch + 1}")
    print(f"validation ELBO {-result.validation_loss[result.best_epoch]:.2f}")
    print(f"log p(x) of {len(test)} test images with {options.num_particles} particles: ", end="")
    print(f"{log_p:.2f} ± {over_images:.2f} (images) ± {over_particles:.2f} (particles)")
    print(f"published, after at most 2000 epochs: {PUBLISHED[options.prior]}\n{evidence}")


def draw(result: FitResult, options: argparse.Namespace) -> None:
    matplotlib.use("Agg")
    ax = plot_training(result.loss, result.validation_loss, label=f"prior {options.prior}")
    ax.set_title("Training loss at the β of the epoch, validation loss at β = 1")
    losses = sorted(result.validation_loss)
    ax.set_ylim(losses[0] - 5, losses[len(losses) // 2] + 20)
    ax.figure.savefig(options.output / f"training_{options.prior}.png", dpi=150)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--prior", choices=["normal", "vamp"], default="normal", help="p(z) (default: %(default)s)")
    add("--num-epochs", type=int, default=2000, help="at most (default: %(default)s)")
    add("--num-particles", type=int, default=5000, help="draws per test image (default: %(default)s)")
    add("--limit", type=int, default=10000, help="test images to evaluate (default: %(default)s)")
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    add("--output", type=Path, default=Path("fashion_mnist_benchmark_output"), help="default: %(default)s")
    add("--data", type=Path, default=DEBIAN_FOLDER, help="folder of Fashion-MNIST (default: %(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
