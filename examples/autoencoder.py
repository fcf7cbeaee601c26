"""An autoencoder is a VAE whose posterior is a point; the linear one spans the principal subspace.

If q(z|x) is a point mass at f(x), p(x|z) = N(g(z), I), and the prior is flat, −ELBO reduces to

    −log p(x | f(x)) = ½ ‖x − g(f(x))‖² + (D/2) log 2π.

If f and g are linear (affine), the smallest possible squared error is that of the projection onto the first principal
components, and every other stationary point is a saddle. The columns of g then span the principal subspace, although
they are not the principal axes. With hidden layers the codes can lie on a curved surface, and the error can drop below
that of PCA. A code with more dimensions than the data could carry all of the data; only the length of training limits
it.

    python examples/autoencoder.py

Baldi & Hornik (1989), *Neural Networks and Principal Component Analysis: Learning from Examples Without Local Minima*.
"""

from __future__ import annotations

import numpy as np
import torch
from images import load_digits
from matplotlib import pyplot as plt
from pyro.distributions import ImproperUniform
from pyro.infer import Trace_ELBO
from scipy.linalg import subspace_angles
from script import parse_options, save
from sklearn.decomposition import PCA
from torch import Tensor
from torch.distributions import constraints
from torch.optim.lr_scheduler import CosineAnnealingLR

from pyro_vae import VAE, fit
from pyro_vae.distributions import ConditionalDelta, ConditionalNormal
from pyro_vae.networks import MLP
from pyro_vae.plots import plot_images

CODE = 4  # dimensions, of 64; the fourth and fifth principal variances are well apart


def autoencoder(code: int, hidden: list[int], name: str) -> VAE:
    """An autoencoder with these hidden layers in f and g, a fixed scale of one, and no prior term."""
    return VAE(
        ImproperUniform(constraints.real_vector, (), (code,)),
        ConditionalNormal(MLP(code, hidden[::-1]), 64, scale=1.0),
        ConditionalDelta(MLP(64, hidden), code),
        name=name,
    )


def error(x: Tensor, reconstruction: Tensor) -> float:
    """Mean of ‖x − x'‖² over the images."""
    return float((x - reconstruction).square().sum(1).mean())


def main() -> None:
    options = parse_options(__doc__)
    digits = load_digits()
    train, test = digits.train.flatten(1), digits.test.flatten(1)

    pca = PCA(CODE).fit(train.numpy())
    rows = {f"PCA, {CODE}": lambda x: torch.from_numpy(pca.inverse_transform(pca.transform(x.numpy()))).float()}
    models = {
        f"linear AE, {CODE}": (autoencoder(CODE, [], "linear"), 1500, 1500, 3e-2),
        f"nonlinear AE, {CODE}": (autoencoder(CODE, [128, 64], "nonlinear"), 80, 128, 3e-3),
        "nonlinear AE, 100": (autoencoder(100, [128], "overcomplete"), 40, 128, 3e-3),
    }
    for label, (model, epochs, batch_size, rate) in models.items():
        num_epochs = 3 if options.quick else epochs
        settings = {"num_epochs": num_epochs, "batch_size": batch_size, "learning_rate": rate, "seed": options.seed}
        # a rate that falls to zero takes the noise of the mini-batches out of the final weights
        fit(model.model, model.guide, train, scheduler=lambda o, t=num_epochs: CosineAnnealingLR(o, t), **settings)
        rows[label] = lambda x, model=model: model.reconstruct(x, mean=True)

    print(f"{'code':<18} {'train ‖x−x′‖²':>14} {'ratio to PCA':>13} {'test ‖x−x′‖²':>14} {'ratio to PCA':>13}")
    reference = {}
    for label, reconstruct in rows.items():
        errors = [error(x, reconstruct(x)) for x in (train, test)]
        reference = reference or dict(enumerate(errors))
        ratios = [e / reference[i] for i, e in enumerate(errors)]
        print(f"{label:<18} {errors[0]:>14.4f} {ratios[0]:>13.4f} {errors[1]:>14.4f} {ratios[1]:>13.4f}")

    linear = models[f"linear AE, {CODE}"][0]
    decoder = linear.likelihood.head.weight.detach().numpy()  # (64, CODE)
    angles = np.rad2deg(subspace_angles(decoder, pca.components_.T))
    print("principal angles of the linear decoder's column space and PCA's subspace, in degrees (0 for equal spaces):")
    print("  " + ", ".join(f"{angle:.3f}" for angle in angles))
    constant = 32 * np.log(2 * np.pi)
    loss = Trace_ELBO().loss(linear.model, linear.guide, train) / len(train)
    half_error = error(train, linear.reconstruct(train, mean=True)) / 2
    print(f"linear AE: −ELBO {loss:.4f}, ½‖x − g(f(x))‖² + 32 log 2π {half_error + constant:.4f} nats per image")

    shown = test[:10]
    grid = torch.stack([shown, *(reconstruct(shown) for reconstruct in rows.values())]).reshape(-1, 10, 8, 8)
    _, ax = plt.subplots(figsize=(8, 4.2))
    plot_images(grid, row_labels=["x", *rows], ax=ax)
    save(ax.figure, options, "autoencoder")


if __name__ == "__main__":
    main()
