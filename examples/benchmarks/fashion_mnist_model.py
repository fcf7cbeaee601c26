"""The VAE of Cremer, Li & Duvenaud (2018) on Fashion-MNIST: 784-200-200-50, ELU, pixels thresholded at 0.5.

    python examples/benchmarks/fashion_mnist_model.py --num-epochs 150

trains it (Adam, batch 100, KL warm-up over the first tenth of the epochs, cosine decay) and saves its weights, for the
benchmarks of evidence. The images come from Debian's package dataset-fashion-mnist or a folder of yours (--data).
"""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyro_vae import VAE, fit
from pyro_vae.checkpoint import load_weights, save_weights
from pyro_vae.distributions import ConditionalBernoulli, ConditionalNormal, StandardNormal
from pyro_vae.networks import MLP

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
OUTPUT = Path("benchmark_output")


def build_vae(latent_size: int = 50) -> VAE:
    return VAE(
        StandardNormal(latent_size),
        ConditionalBernoulli(MLP(latent_size, [200, 200], activation=nn.ELU), (28, 28)),
        ConditionalNormal(MLP((28, 28), [200, 200], activation=nn.ELU), latent_size),
    )


def load_images(folder: Path = DEBIAN_FOLDER) -> tuple[Tensor, Tensor]:
    """Training and test images, binarised at x/255 >= 0.5, (60000, 28, 28) and (10000, 28, 28)."""
    names = ("train-images-idx3-ubyte.gz", "t10k-images-idx3-ubyte.gz")
    if not all((folder / name).is_file() for name in names):
        raise SystemExit(f"no Fashion-MNIST in {folder}. Try apt-get install dataset-fashion-mnist, or --data DIR.")
    content = [np.frombuffer(gzip.decompress((folder / name).read_bytes()), np.uint8, offset=16) for name in names]
    train, test = (torch.from_numpy(c.reshape(-1, 28, 28) >= 128).float() for c in content)
    return train, test


class LatentScale(Messenger):
    """Multiplies the terms of the latent sites of a model or guide in an ELBO: β of the KL, for its warm-up."""

    def __init__(self, beta: float = 1.0) -> None:
        super().__init__()
        self.beta = beta

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if not msg["is_observed"]:
            msg["scale"] = msg["scale"] * self.beta


def train_vae(train: Tensor, num_epochs: int, *, learning_rate: float = 1e-3, seed: int = 0) -> VAE:
    pyro.set_rng_seed(seed)
    vae = build_vae()
    optim = torch.optim.Adam(vae.parameters(), lr=learning_rate, eps=1e-4, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optim, num_epochs, eta_min=learning_rate / 10)
    warm_up = LatentScale()
    model, guide = warm_up(vae.model), warm_up(vae.guide)
    for epoch in range(num_epochs):
        warm_up.beta = min(1.0, (epoch + 1) / max(1, num_epochs // 10))
        result = fit(model, guide, train, num_epochs=1, batch_size=100, optimizer=lambda _: optim, progress=False)
        schedule.step()
        print(f"epoch {epoch + 1}/{num_epochs}: beta {warm_up.beta:.2f}, loss {result.loss[0]:.3f}", flush=True)
    return vae


def trained_vae(output: Path, data: Path) -> VAE:
    """The VAE with the weights that `main` saved."""
    path = output / "weights_784-200-200-50.pt"
    if not path.is_file():
        raise SystemExit(f"no {path}. Run python examples/benchmarks/fashion_mnist_model.py first.")
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
