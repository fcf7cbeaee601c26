"""The VAE of Cremer, Li & Duvenaud (2018) on Fashion-MNIST: 784-200-200-50, ELU, pixels thresholded at 0.5.

    python benchmarks/fashion_mnist_model.py --num-epochs 150

trains it (Adam, batch 100, KL warm-up over the first tenth of the epochs, cosine decay) and saves its weights, for the
benchmarks of evidence. The images come from Debian's package dataset-fashion-mnist or a folder of yours (--data).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pyro
import torch
from torch import Tensor, nn

from pyro_vae import VAE, fit
from pyro_vae.checkpoint import load_weights, save_weights
from pyro_vae.distributions import ConditionalBernoulli, ConditionalNormal, StandardNormal
from pyro_vae.networks import MLP
from pyro_vae.objectives.beta import BetaELBO
from pyro_vae.objectives.schedules import linear

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from images import DEBIAN_FOLDER, load_fashion_mnist

OUTPUT = Path("benchmark_output")


def build_vae(latent_size: int = 50) -> VAE:
    return VAE(
        StandardNormal(latent_size),
        ConditionalBernoulli(MLP(latent_size, [200, 200], activation=nn.ELU), (28, 28)),
        ConditionalNormal(MLP((28, 28), [200, 200], activation=nn.ELU), latent_size),
    )


def load_images(folder: Path = DEBIAN_FOLDER) -> tuple[Tensor, Tensor]:
    """Training and test images, binarised at x/255 >= 0.5, (60000, 28, 28) and (10000, 28, 28)."""
    try:
        images = load_fashion_mnist(folder)
    except ValueError as error:
        raise SystemExit(f"{error}. Try apt-get install dataset-fashion-mnist, or --data DIR.") from None
    return (images.train >= 0.5).float(), (images.test >= 0.5).float()


def train_vae(train: Tensor, num_epochs: int, *, learning_rate: float = 1e-3, seed: int = 0) -> VAE:
    pyro.set_rng_seed(seed)
    vae = build_vae()
    steps = -(-len(train) // 100)  # in an epoch
    result = fit(
        vae.model,
        vae.guide,
        train,
        num_epochs=num_epochs,
        batch_size=100,
        loss=BetaELBO(linear(steps * max(1, num_epochs // 10))),
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=learning_rate, eps=1e-4, fused=True),
        scheduler=lambda optim: torch.optim.lr_scheduler.CosineAnnealingLR(optim, num_epochs, learning_rate / 10),
        seed=seed,
    )
    print(f"loss {result.loss[-1]:.3f} nats per image after {num_epochs} epochs")
    return vae


def trained_vae(output: Path, data: Path) -> VAE:
    """The VAE with the weights that `main` saved."""
    path = output / "weights_784-200-200-50.pt"
    if not path.is_file():
        raise SystemExit(f"no {path}. Run python benchmarks/fashion_mnist_model.py first.")
    vae = build_vae()
    load_weights(vae, path)
    return vae


def parser(description: str) -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=description)
    result.add_argument(
        "--data", type=Path, default=DEBIAN_FOLDER, help="folder of Fashion-MNIST (default: %(default)s)"
    )
    result.add_argument(
        "--output", type=Path, default=OUTPUT, help="folder for weights and tables (default: %(default)s)"
    )
    result.add_argument("--seed", type=int, default=0)
    return result


def main() -> None:
    options = parser(__doc__.split("\n")[0])
    options.add_argument("--num-epochs", type=int, default=150)
    options = options.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    vae = train_vae(load_images(options.data)[0], options.num_epochs, seed=options.seed)
    save_weights(vae, options.output / "weights_784-200-200-50.pt")


if __name__ == "__main__":
    main()
