"""Two VAEs on Fashion-MNIST: what does a posterior with full covariance gain over a diagonal one?

    python examples/fashion_mnist.py                                                # minutes, on two CPU cores
    python examples/fashion_mnist.py --num-epochs 1 --limit 20 --num-particles 200  # a quick look

Both share the model z ~ N(0, I), x ~ Bernoulli(decoder(z)) of binary images and have the posterior q(z|x) = N(μ(x), Σ(x)),
Σ(x) being diagonal for one and full for the other. On test images, with weights w = p(x, z) / q(z|x) for z ~ q(z|x),

    ELBO = E log w  ≤  log p(x) = log E w  ≈  log 1/K Σ w_k   (importance sampling with K particles),

effective sample size and Pareto k-hat of the weights say how far to trust the last. The folder --output receives figures
(PNG), the weights of both models and, for ArviZ, posterior draws of some test images (netCDF).

Fashion-MNIST (Xiao, Rasul & Vollgraf 2017) is read from where Debian's package dataset-fashion-mnist puts it, or from
--data. Pixels are binarised at x/255 >= 0.5 as in Cremer, Li & Duvenaud (2018), *Inference Suboptimality in Variational
Autoencoders*. Without it, the 8×8 digits of scikit-learn stand in.
"""

from __future__ import annotations

import argparse
import gzip
import sys
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, NoReturn

import matplotlib
import numpy as np
import pyro
import torch
from matplotlib import pyplot as plt
from torch import Tensor
from tqdm.auto import tqdm

from pyro_vae import VAE, Evidence, FitResult, draw_particles, fit, from_pyro_svi, importance_sampling
from pyro_vae.checkpoint import save_weights
from pyro_vae.distributions import (
    ConditionalBernoulli,
    ConditionalMultivariateNormal,
    ConditionalNormal,
    StandardNormal,
)
from pyro_vae.networks import MLP
from pyro_vae.plots import plot_embedding, plot_images, plot_khat, plot_training

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
FASHION = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
POSTERIORS = {"diagonal": ConditionalNormal, "full": ConditionalMultivariateNormal}


def main() -> None:
    options = parse_options()
    check_writable(options.output)  # whatever can go wrong should do so before minutes of training
    device = choose_device(options.device)
    data = load_data(options.data)
    num_epochs = options.num_epochs or data.num_epochs
    test = data.test.to(device)
    evaluated = test[: options.limit]

    vaes: dict[str, VAE] = {}
    losses: dict[str, FitResult] = {}
    elbos: dict[str, Tensor] = {}
    evidence: dict[str, Evidence] = {}
    for name in POSTERIORS:
        print(f"{name} posterior", flush=True)  # a heading for the progress bars
        pyro.set_rng_seed(options.seed)
        vae = build_vae(name, tuple(test.shape[1:]), options.latent_size)
        losses[name] = fit(
            vae.model,
            vae.guide,
            data.train,
            validation_data=data.validation,
            num_epochs=num_epochs,
            batch_size=options.batch_size,
            learning_rate=2e-3,
            scheduler=lambda optim: torch.optim.lr_scheduler.CosineAnnealingLR(optim, num_epochs),
            seed=options.seed,
            device=device,
        )
        save_weights(vae, options.output / f"weights_{name}.pt")
        elbos[name] = elbo(vae, evaluated)
        evidence[name] = importance_sampling(vae.model, vae.guide, evaluated, num_particles=options.num_particles)
        draws = from_pyro_svi(vae.model, vae.guide, evaluated[:100], num_samples=200)
        draws.to_netcdf(options.output / f"posterior_{name}.nc", engine="h5netcdf")
        vaes[name] = vae

    draw_figures(options.output, data, test, vaes, losses, evidence)
    print_table(data.name, elbos, evidence)
    print(f"Figures, weights and posterior draws are in {options.output}/")


# -- the model --------------------------------------------------------------------------------------------------------


def build_vae(posterior: str, image_shape: tuple[int, ...], latent_size: int) -> VAE:
    """Three conditional distributions make a VAE; only the family of the posterior differs."""
    return VAE(
        StandardNormal(latent_size),
        ConditionalBernoulli(MLP(latent_size, [200, 200]), image_shape),
        POSTERIORS[posterior](MLP(image_shape, [200, 200]), latent_size),
        name=posterior,
    )


@torch.no_grad()
def elbo(vae: VAE, x: Tensor, num_particles: int = 100) -> Tensor:
    """ELBO of each image, (N,), nats: the mean of the log-weights of its particles."""
    batches = tqdm(x.split(100), desc="ELBO", disable=None, leave=False)
    weights = [draw_particles(vae.model, vae.guide, rows, num_particles=num_particles).log_weight for rows in batches]
    return torch.cat([log_weight.mean(0) for log_weight in weights])


def print_table(data_name: str, elbos: dict[str, Tensor], evidence: dict[str, Evidence]) -> None:
    """The result: one row for each posterior, in nats per image."""
    first, last = evidence.values()
    k, threshold = first.num_particles, first.threshold
    columns = (
        "posterior",
        "test ELBO",
        "log p(x) ± images ± particles",
        f"median ESS of {k}",
        f"k-hat > {threshold:.2f}",
    )
    print(f"\n{data_name}: the first {len(first.log_evidence)} test images, nats per image\n")
    print("{:<10}{:>11}{:>33}{:>21}{:>15}".format(*columns))
    for name, result in evidence.items():
        mean, images, particles = result.mean
        log_p = f"{mean:.2f} ± {images:.2f} ± {particles:.2f}"
        ess = result.effective_sample_size.nanmedian()
        share = result.doubtful.double().mean()  # k-hat above the threshold, or unknown
        print(f"{name:<10}{elbos[name].mean():>11.2f}{log_p:>33}{ess:>21.1f}{share:>15.1%}")
    gain = last.log_evidence - first.log_evidence  # image by image, so that what makes some images harder cancels
    print(
        f"\nfull − diagonal, image by image: {gain.mean():+.2f} ± {gain.std() / len(gain) ** 0.5:.2f} (images)\n"
        "± images: spread of log p(x) over the images, sd/√N, nearly all of which both rows share.\n"
        "± particles: error of importance sampling by the delta method; too small where k-hat is above the threshold,\n"
        "where the estimate of log p(x), a lower bound in expectation, tends to be too low as well."
    )


# -- figures ----------------------------------------------------------------------------------------------------------


def draw_figures(
    folder: Path,
    data: Data,
    test: Tensor,
    vaes: dict[str, VAE],
    losses: dict[str, FitResult],
    evidence: dict[str, Evidence],
) -> None:
    """What to look at first, one PNG each."""
    matplotlib.use("Agg")  # files only: no window, no display
    plt.rcParams.update({"figure.constrained_layout.use": True, "savefig.dpi": 150, "axes.titlesize": "medium"})

    def save(name: str) -> None:
        plt.savefig(folder / f"{name}.png")
        plt.close()

    _, ax = plt.subplots(figsize=(7, 4.5))
    for name, result in losses.items():
        plot_training(result.loss, result.validation_loss, label=name, ax=ax)
    ax.set_title(f"{data.name}: training")
    save("training")

    of_each_class = test[[int((data.classes == c).nonzero()[0]) for c in range(len(data.class_names))]]
    rows = [of_each_class, *(vae.reconstruct(of_each_class, mean=True) for vae in vaes.values())]
    _, ax = plt.subplots(figsize=(10, 3.4))
    plot_images(torch.stack(rows), row_labels=["test image", *vaes], column_labels=data.class_names, ax=ax)
    ax.set_title("Reconstructions: E[x|z] at the mean of q(z|x)")
    save("reconstructions")

    _, axes = plt.subplots(1, 2, figsize=(11, 4.2))
    for ax, (name, vae) in zip(axes, vaes.items(), strict=True):
        plot_images(vae.generate(50, mean=True).unflatten(0, (5, 10)), ax=ax)
        ax.set_title(f"{name}: samples, E[x|z] for z from the prior")
    save("samples")

    _, axes = plt.subplots(1, 2, figsize=(11, 5.4))
    for ax, (name, vae) in zip(axes, vaes.items(), strict=True):
        plot_traversal(name, vae, test, ax)
    save("traversal")

    _, axes = plt.subplots(1, 2, figsize=(12.5, 5))
    for ax, (name, vae) in zip(axes, vaes.items(), strict=True):
        points, labels = principal_plane(vae.encode(test).mean)
        plot_embedding(points, data.classes, class_names=data.class_names, ax=ax)
        ax.set(title=f"{name}: posterior means of {len(test)} test images", xlabel=labels[0], ylabel=labels[1])
    axes[0].get_legend().remove()  # the other one serves both
    save("embedding")

    _, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    for ax, (name, result) in zip(axes, evidence.items(), strict=True):
        plot_khat(result.pareto_khat, result.threshold, label=name, ax=ax)
        ax.set_xlabel("test image")
    save("khat")


def plot_traversal(name: str, vae: VAE, test: Tensor, ax: plt.Axes) -> None:
    """Moves one latent dimension at a time away from the encoding of the first test image, those that matter first."""
    q_z = vae.encode(test)
    kl = 0.5 * (q_z.mean**2 + q_z.variance - 1 - q_z.variance.log()).mean(0)  # of each dimension's marginal to N(0, 1)
    dimensions = kl.argsort(descending=True)[:6].tolist()
    steps = torch.linspace(-3, 3, 9, device=test.device)  # prior standard deviations
    z = q_z.mean[0].repeat(len(dimensions), len(steps), 1)
    for row, dimension in enumerate(dimensions):
        z[row, :, dimension] += steps
    plot_images(
        vae.decode(z).mean,
        row_labels=[f"$z_{{{d + 1}}}$  {kl[d]:.1f} nats" for d in dimensions],
        column_labels=[f"{step:+.2g}" if step else "q mean" for step in steps.tolist()],
        ax=ax,
    )
    ax.set_title(f"{name}: one latent dimension moved at a time, with its mean KL(q‖p)")


def principal_plane(z: Tensor) -> tuple[Tensor, list[str]]:
    """Two dimensions as they are, more of them projected on their first two principal components; and axis labels."""
    if z.shape[1] == 2:
        return z, ["$z_1$", "$z_2$"]
    centred = z - z.mean(0)
    _, scale, directions = torch.linalg.svd(centred, full_matrices=False)
    share = scale.square() / scale.square().sum()
    return centred @ directions[:2].T, [
        f"principal component {i + 1} of z ({share[i]:.0%} of variance)" for i in (0, 1)
    ]


# -- data -------------------------------------------------------------------------------------------------------------


class Data(NamedTuple):
    """Binary images, (N, height, width), and the classes of the test images, (N,)."""

    name: str
    train: Tensor
    validation: Tensor
    test: Tensor
    classes: Tensor
    class_names: tuple[str, ...]
    num_epochs: int  # how long to train by default


def load_data(folder: Path | None) -> Data:
    if folder is None and not DEBIAN_FOLDER.is_dir():
        print(
            f"No Fashion-MNIST in {DEBIAN_FOLDER} (apt-get install dataset-fashion-mnist): using scikit-learn's digits."
        )
        return load_digits()
    return load_fashion(folder or DEBIAN_FOLDER)


def load_fashion(folder: Path) -> Data:
    names = ("train-images-idx3", "t10k-images-idx3", "t10k-labels-idx1")
    paths = [folder / f"{name}-ubyte.gz" for name in names]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        fail(f"no Fashion-MNIST in {folder}: missing {', '.join(missing)}")
    train, test, classes = (read_idx(path) for path in paths)
    train, test = ((x >= 128).float() for x in (train, test))  # x/255 >= 0.5
    return Data("Fashion-MNIST", train[:-5000], train[-5000:], test, classes, FASHION, num_epochs=15)


def read_idx(path: Path) -> Tensor:
    """Bytes in idx format: 0, 0, 8 (for uint8), the number of dimensions; their sizes as big-endian int32; values."""
    try:
        content = gzip.decompress(path.read_bytes())
        sizes = np.frombuffer(content, dtype=">i4", offset=4, count=content[3])
        values = np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * len(sizes))
        return torch.from_numpy(values.copy()).reshape(sizes.tolist())
    except (OSError, EOFError, zlib.error, ValueError, IndexError, RuntimeError):
        fail(f"cannot read {path}: corrupt, or not a gzipped idx file")


def load_digits() -> Data:
    from sklearn import datasets

    digits = datasets.load_digits()
    x = torch.from_numpy(digits.images >= 8).float()  # pixels are 0 … 16
    classes = torch.from_numpy(digits.target)[1500:]
    names = tuple(str(digit) for digit in range(10))
    return Data("scikit-learn's digits", x[:1350], x[1350:1500], x[1500:], classes, names, num_epochs=200)


# -- the command line -------------------------------------------------------------------------------------------------


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Trains VAEs with diagonal and full posterior on Fashion-MNIST and estimates log p(x) of test images.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--num-epochs", type=at_least(1), help="passes over the training images (15; 200 for the digits)")
    add("--latent-size", type=at_least(2), default=10, help="dimensions of z")
    add("--batch-size", type=at_least(1), default=128, help="images in a training batch")
    add("--num-particles", type=at_least(1), default=5000, help="importance samples for each test image")
    add("--limit", type=at_least(1), default=1000, help="how many test images to evaluate, from the first on")
    add("--seed", type=int, default=0, help="of all random numbers: the same seed gives the same results")
    add("--device", default="auto", help="cpu, cuda, …; auto is cuda where there is one")
    add("--output", type=Path, default=Path("fashion_mnist_output"), help="folder for figures, weights and draws")
    add("--data", type=Path, help="folder with the .gz files of Fashion-MNIST (where Debian puts them)")
    return parser.parse_args()


def at_least(smallest: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        if int(text) < smallest:
            raise argparse.ArgumentTypeError(f"expected at least {smallest}, got {text}")
        return int(text)

    return integer


def check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        fail(f"cannot write to the folder {folder}: {error.strerror}")


def choose_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError):
        fail(f"no device {name!r} here")


def fail(message: str) -> NoReturn:
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
