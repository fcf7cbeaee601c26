r"""Missing data: a VAE is trained on incomplete digits, and fills the holes with draws.

If pixels are missing at random, the likelihood is the marginal of the observed pixels:

    p(x_obs) = ∫ p(z) Π_{i observed} p(x_i|z) dz,      x_mis ~ p(x_mis|x_obs) = ∫ p(x_mis|z) p(z|x_obs) dz.

`ObservedPart` leaves missing elements (NaN) out of the product, `MaskedInput` tells the encoder which ones are missing,
and `impute` draws them. First, the evidence is checked on a linear Gaussian model. There p(x_obs) is a Gaussian; rows
and columns are left out of its covariance. The number of epochs is the one with the highest ELBO on 200 incomplete
training images that are set aside, so that no missing value and no test image influences it.

    python examples/missing_data.py

Mattei & Frellsen (2019), *MIWAE: Deep Generative Modelling and Imputation of Incomplete Data Sets*
"""

from __future__ import annotations

import argparse
import warnings

import numpy as np
import torch
from images import load_digits
from matplotlib import pyplot as plt
from script import parse_options, save
from sklearn.experimental import enable_iterative_imputer  # noqa: F401
from sklearn.impute import IterativeImputer
from torch import Tensor
from torch.distributions import MultivariateNormal

from pyro_vae import VAE, fit, importance_sampling, impute
from pyro_vae.distributions import (
    ConditionalMultivariateNormal,
    ConditionalNormal,
    LearnedScale,
    ObservedPart,
    StandardNormal,
)
from pyro_vae.networks import MLP, MaskedInput
from pyro_vae.plots import plot_images


def main() -> None:
    options = parse_options(__doc__)
    linear_gaussian(options)
    digits = load_digits()
    truth, test = digits.train.flatten(1), digits.test.flatten(1)
    train, holes = make_holes(truth, 0.5), make_holes(test, 0.5)

    likelihood = ObservedPart(ConditionalNormal(MLP(8, [128]), 64, scale=LearnedScale(init=0.2)))
    vae = VAE(StandardNormal(8), likelihood, ConditionalNormal(MaskedInput(MLP(2 * 64, [128])), 8), name="missing")
    epochs = 3 if options.quick else 300
    settings = {"num_epochs": epochs, "learning_rate": 3e-3, "seed": options.seed}
    result = fit(vae.model, vae.guide, train[:-200], validation_data=train[-200:], patience=30, **settings)
    draws = impute(vae.model, vae.guide, holes, num_draws=100, num_particles=50 if options.quick else 500)["x"]

    missing = holes.isnan()
    imputed = {
        "mean of each pixel": train.nanmean(0).expand_as(holes),
        "VAE, one draw": draws[0],
        "VAE, mean of 100 draws": draws.mean(0),
    }
    if not options.quick:
        imputed["chained ridge regressions"] = chained_regressions(train, holes)
    print(f"\ndigits, {missing.float().mean():.0%} of the test pixels missing, {result.best_epoch + 1} epochs")
    print("error (RMS) of what is filled in, ± standard error from the choice of test images")
    for name, values in imputed.items():
        squared = torch.where(missing, (values - test) ** 2, 0.0).sum(1)
        mse = squared.sum() / missing.sum()
        # standard error of a ratio of sums, by the delta method, and then of its square root
        error = (squared - mse * missing.sum(1)).std() * len(test) ** 0.5 / missing.sum() / (2 * mse.sqrt())
        print(f"  {name:28} {mse.sqrt():.4f} ± {error:.4f}")
    spread = draws.var(0)[missing].mean().sqrt()
    print(f"  spread of the draws          {spread:.4f}; of a right model, the error of their mean (but for 1/100)")

    rows = [test, holes, draws[0], draws[1], draws.mean(0)]
    figure, ax = plt.subplots(figsize=(8, 4.4))
    names = ["original", "half observed", "imputed, draw 1", "imputed, draw 2", "mean of 100 draws"]
    plot_images(torch.stack([r[:10].unflatten(1, (8, 8)) for r in rows]), row_labels=names, ax=ax)
    save(figure, options, "missing_data")


def make_holes(x: Tensor, probability: float) -> Tensor:
    """x, where each element is missing (NaN) with this probability, whatever its value."""
    return x.masked_fill(torch.rand_like(x) < probability, torch.nan)


def linear_gaussian(options: argparse.Namespace) -> None:
    """Compares the evidence of incomplete rows with its closed form."""
    z = torch.randn(500, 2)
    x = make_holes(z @ torch.randn(2, 6) + 0.5 * torch.randn(500, 6), 0.4)
    decoder = ConditionalNormal(MLP(2, []), 6, scale=0.5)
    encoder = ConditionalMultivariateNormal(MaskedInput(MLP(2 * 6, [32])), 2)  # the exact posterior is correlated
    vae = VAE(StandardNormal(2), ObservedPart(decoder), encoder, name="linear")
    epochs = 5 if options.quick else 100
    fit(vae.model, vae.guide, x, num_epochs=epochs, learning_rate=0.01, seed=options.seed)
    evidence = importance_sampling(vae.model, vae.guide, x, num_particles=1000, progress=False)

    weight, bias = decoder.head.weight.detach(), decoder.head.bias.detach()
    covariance = weight @ weight.T + 0.25 * torch.eye(6)
    exact = torch.zeros(len(x))
    for n, row in enumerate(x):
        i = (~row.isnan()).nonzero().flatten()
        if len(i):  # log p = 0 for a row without any observed element
            exact[n] = MultivariateNormal(bias[i], covariance[i][:, i]).log_prob(row[i])
    error = (evidence.log_evidence - exact) / evidence.standard_error.clamp(min=1e-6)
    print("linear Gaussian model, 40% missing: log p(x_obs), nats per row")
    print(f"  importance sampling          {evidence.mean[0]:.4f} ± {evidence.mean[2]:.4f}")
    print(f"  closed form                  {exact.mean():.4f}")
    print(f"  errors in standard errors    RMS {error.square().mean().sqrt():.2f} (1 if these are right)")


def chained_regressions(train: Tensor, holes: Tensor) -> Tensor:
    """Regresses each pixel in turn on all others: scikit-learn's IterativeImputer, fitted to the same rows."""
    imputer = IterativeImputer(max_iter=3, min_value=0.0, max_value=1.0, keep_empty_features=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # three rounds do not converge
        return torch.from_numpy(imputer.fit(train.numpy()).transform(holes.numpy()).astype(np.float32))


if __name__ == "__main__":
    main()
