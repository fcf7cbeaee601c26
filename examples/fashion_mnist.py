"""Two VAEs on Fashion-MNIST: what does a posterior with full covariance gain over a diagonal one?

    python examples/fashion_mnist.py                                                # minutes, on two CPU cores
    python examples/fashion_mnist.py --num-epochs 1 --limit 20 --num-particles 200  # a quick look

Both have the model z ~ N(0, I), x ~ Bernoulli(decoder(z)) of binary images, and a posterior q(z|x) = N(μ(x), Σ(x)).
Σ(x) is diagonal for one and full for the other. On test images, with weights w = p(x, z) / q(z|x) of draws z ~ q(z|x),

    ELBO = E log w  ≤  log p(x) = log E w  ≈  log 1/K Σ w_k   (importance sampling with K particles);

The effective sample size and Pareto k-hat of the weights show how far to trust the last value. Figures (PNG), the
weights of both models, and posterior draws for some test images (netCDF, for ArviZ) go to the folder --output.

Fashion-MNIST is read from the place where Debian's package dataset-fashion-mnist puts it, or from --data. Without it,
the 8×8 digits of scikit-learn are used. Pixels are binarised at x/255 >= 0.5, as in Cremer, Li & Duvenaud (2018),
*Inference Suboptimality in Variational Autoencoders*.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, NoReturn

import matplotlib
import pyro
import torch
from images import DEBIAN_FOLDER, load_digits, load_fashion_mnist
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


def main() -> None:
    options = parse_options()
    check_writable(options.output)  # whatever can go wrong should do so before minutes of training
    device = choose_device(options.device)
    data = load_data(options.data)
    test = data.test.to(device)
    runs = {}
    for name, family in (("diagonal", ConditionalNormal), ("full", ConditionalMultivariateNormal)):
        print(f"{name} posterior", flush=True)  # a heading for the progress bars
        pyro.set_rng_seed(options.seed)
        vae = build_vae(name, family, tuple(test.shape[1:]), options.latent_size)
        runs[name] = train_and_evaluate(vae, data, test[: options.limit], options)
    draw_figures(data, test, runs, options.output)
    print_table(data.name, runs)
    print(f"Figures, weights and posterior draws are in {options.output}/")


class Run(NamedTuple):
    """A VAE, its training, and the ELBO, (N,), and evidence of each evaluated image."""

    vae: VAE
    training: FitResult
    elbo: Tensor
    evidence: Evidence


def build_vae(name: str, family: type, image_shape: tuple[int, ...], latent_size: int) -> VAE:
    """Makes a VAE of three conditional distributions. The two runs differ in the family of the posterior."""
    return VAE(
        StandardNormal(latent_size),
        ConditionalBernoulli(MLP(latent_size, [200, 200]), image_shape),
        family(MLP(image_shape, [200, 200]), latent_size),
        name=name,
    )


def train_and_evaluate(vae: VAE, data: Data, x: Tensor, options: argparse.Namespace) -> Run:
    num_epochs = options.num_epochs or data.num_epochs
    training = fit(
        vae.model,
        vae.guide,
        data.train,
        validation_data=data.validation,
        num_epochs=num_epochs,
        batch_size=options.batch_size,
        learning_rate=4e-3,
        scheduler=lambda optim: torch.optim.lr_scheduler.CosineAnnealingLR(optim, num_epochs),
        seed=options.seed,
        device=x.device,
    )
    save_weights(vae, options.output / f"weights_{vae.name}.pt")
    draws = from_pyro_svi(vae.model, vae.guide, x[:100], num_samples=200)
    draws.to_netcdf(options.output / f"posterior_{vae.name}.nc", engine="h5netcdf")
    evidence = importance_sampling(vae.model, vae.guide, x, num_particles=options.num_particles)
    return Run(vae, training, estimate_elbo(vae, x), evidence)


@torch.no_grad()
def estimate_elbo(vae: VAE, x: Tensor, num_particles: int = 100) -> Tensor:
    """ELBO of each image, (N,), nats: the mean log-weight of its particles."""
    batches = tqdm(x.split(100), desc="ELBO", disable=None, leave=False)
    particles = (draw_particles(vae.model, vae.guide, rows, num_particles=num_particles) for rows in batches)
    return torch.cat([p.log_weight.mean(0) for p in particles])


def print_table(data_name: str, runs: dict[str, Run]) -> None:
    """Prints the results, one row for each posterior, and what their error bars mean."""
    diagonal, full = (run.evidence for run in runs.values())
    n = len(full.log_evidence)
    print(f"\n{data_name}, the first {n} test images, nats per image\n")
    print(
        f"{'posterior':<10}{'test ELBO':>11}{'log p(x) ± images ± particles':>33}"
        f"{f'median ESS of {full.num_particles}':>21}{f'k-hat > {full.threshold:.2f}':>15}"
    )
    for name, run in runs.items():
        log_p = "{:.2f} ± {:.2f} ± {:.2f}".format(*run.evidence.mean)
        ess, doubtful = run.evidence.effective_sample_size, run.evidence.doubtful  # its k-hat is too large or unknown
        print(f"{name:<10}{run.elbo.mean():>11.2f}{log_p:>33}{ess.nanmedian():>21.1f}{doubtful.double().mean():>15.1%}")
    gain = full.log_evidence - diagonal.log_evidence  # paired by image: what makes an image hard cancels
    error = (gain.var(correction=0) / (n - 1)).sqrt()
    print(
        f"\nfull − diagonal, image by image: {gain.mean():+.2f} ± {error:.2f} (images)\n"
        "± images: from the spread of log p(x) over the images, sd/√N; most of it is shared by both rows.\n"
        "± particles: from importance sampling, by the delta method. It is too small for images with k-hat above the\n"
        "threshold, whose log p(x), estimated by a lower bound in expectation, tends to come out too low."
    )


def draw_figures(data: Data, test: Tensor, runs: dict[str, Run], folder: Path) -> None:
    """Draws the figures to look at first, one PNG each."""
    matplotlib.use("Agg")  # files only, no display
    plt.rcParams.update({"figure.constrained_layout.use": True, "savefig.bbox": "tight", "savefig.dpi": 150})

    @contextmanager
    def figure(name: str, title: str, columns: int, width: float, height: float, **options: bool) -> Iterator[list]:
        drawn, axes = plt.subplots(1, columns, figsize=(width, height), squeeze=False, **options)
        yield list(axes[0])
        drawn.suptitle(title)
        drawn.savefig(folder / f"{name}.png")
        plt.close(drawn)

    with figure("training", f"Training on {data.name}", 1, 7, 4.5) as (ax,):
        for name, run in runs.items():
            plot_training(run.training.loss, run.training.validation_loss, label=name, ax=ax)

    x = test[[int((data.classes == c).int().argmax()) for c in range(len(data.class_names))]]  # the first of each class
    rows = [x, *(run.vae.reconstruct(x, mean=True) for run in runs.values())]
    with figure("reconstructions", "Test images, and E[x|z] at the mean of q(z|x)", 1, 10, 3.6) as (ax,):
        plot_images(torch.stack(rows), row_labels=["test image", *runs], column_labels=data.class_names, ax=ax)

    with figure("samples", "Samples: E[x|z] for z from the prior", 2, 12, 4) as axes:
        for ax, (name, run) in zip(axes, runs.items(), strict=True):
            plot_images(run.vae.generate(50, mean=True).unflatten(0, (5, 10)), ax=ax)
            ax.set_title(name)

    title = "E[x|z] with one dimension of z moved away from the mean of q(z|x), by prior standard deviations"
    with figure("traversal", f"{title}\n(in brackets: its KL(q‖p), mean over the test images)", 2, 12, 5.6) as axes:
        for ax, (name, run) in zip(axes, runs.items(), strict=True):
            plot_traversal(run.vae, test, ax)
            ax.set_title(name)

    with figure("embedding", f"Posterior means of {len(test)} test images", 2, 12, 5) as axes:
        for ax, (name, run) in zip(axes, runs.items(), strict=True):
            points, labels = to_plane(run.vae.encode(test).mean)
            plot_embedding(points, data.classes, class_names=data.class_names, ax=ax)
            ax.set(title=name, xlabel=labels[0], ylabel=labels[1])
        axes[0].get_legend().remove()  # the other legend serves both

    with figure("khat", "Pareto k-hat of the importance weights: lower is better", 2, 12, 4.5, sharey=True) as axes:
        for ax, (name, run) in zip(axes, runs.items(), strict=True):
            plot_khat(run.evidence.pareto_khat, run.evidence.threshold, label=name, ax=ax)
            ax.set_xlabel("test image")


def plot_traversal(vae: VAE, test: Tensor, ax: plt.Axes) -> None:
    """Moves the dimensions with the largest mean KL, one at a time, away from the code of the first test image."""
    q_z = vae.encode(test)
    kl = 0.5 * (q_z.mean**2 + q_z.variance - 1 - q_z.variance.log()).mean(0)  # of each dimension's marginal to N(0, 1)
    dimensions = kl.argsort(descending=True)[:6].tolist()
    steps = torch.arange(-3.0, 4.0, device=test.device)
    z = q_z.mean[0].repeat(len(dimensions), len(steps), 1)
    for row, dimension in enumerate(dimensions):
        z[row, :, dimension] += steps
    row_labels = [f"$z_{{{d + 1}}}$ ({kl[d]:.1f} nats)" for d in dimensions]
    column_labels = ["−3", "−2", "−1", "0", "+1", "+2", "+3"]
    plot_images(vae.decode(z).mean, row_labels=row_labels, column_labels=column_labels, ax=ax)


def to_plane(z: Tensor) -> tuple[Tensor, list[str]]:
    """Two dimensions as they are, more of them projected on their first two principal components; and axis labels."""
    if z.shape[1] == 2:
        return z, ["$z_1$", "$z_2$"]
    centred = z - z.mean(0)
    _, scale, directions = torch.linalg.svd(centred, full_matrices=False)
    share = scale**2 / (scale**2).sum()
    return centred @ directions[:2].T, [f"principal component {i + 1} ({share[i]:.0%} of variance)" for i in (0, 1)]


class Data(NamedTuple):
    """Binary images, (N, height, width), and the classes of the test images, (N,)."""

    name: str
    train: Tensor
    validation: Tensor
    test: Tensor
    classes: Tensor
    class_names: tuple[str, ...]
    num_epochs: int  # enough, by default


def load_data(folder: Path) -> Data:
    if folder == DEBIAN_FOLDER and not folder.is_dir():
        print(f"No {folder} (apt-get install dataset-fashion-mnist): using the 8×8 digits of scikit-learn instead.")
        images, held_out, num_epochs = load_digits(), 150, 200
    else:
        try:
            images, num_epochs = load_fashion_mnist(folder), 10
        except ValueError as error:
            fail(str(error))
        held_out = len(images.train) // 12  # 5000 of 60000
    train, test = ((x >= 0.5).float() for x in (images.train, images.test))
    labels = images.test_classes, images.class_names
    return Data(images.name, train[:-held_out], train[-held_out:], test, *labels, num_epochs)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--num-epochs", type=at_least(1), help="passes over the training images (default: 10; 200 for the digits)")
    add("--latent-size", type=at_least(2), default=10, help="dimensions of z (default: %(default)s)")
    add("--batch-size", type=at_least(1), default=128, help="images in a training step (default: %(default)s)")
    add("--num-particles", type=at_least(1), default=5000, help="draws per test image (default: %(default)s)")
    add("--limit", type=at_least(1), default=1000, help="number of test images to evaluate (default: %(default)s)")
    add("--seed", type=int, default=0, help="the same seed gives the same results (default: %(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda (default: %(default)s)")
    add("--output", type=Path, default="fashion_mnist_output", help="folder for the results (default: %(default)s)")
    add("--data", type=Path, default=DEBIAN_FOLDER, help="folder with Fashion-MNIST's *.gz (default: %(default)s)")
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
        fail(f"cannot write to {folder}: {error.strerror}")


def choose_device(name: str) -> torch.device:
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError):
        fail(f"no device {name!r} here")


def fail(message: str) -> NoReturn:
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
