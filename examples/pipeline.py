"""A VAE as one step of a scikit-learn pipeline: codes for a classifier, compared with PCA's.

`VAETransformer` reduces x to z = E_q[z|x], and learns this without classes. A pipeline fits it anew on the training
part of each fold, so that cross-validation is honest. Its arguments can be searched like any others. Its model is

    z ~ N(0, I),   x ~ N(g(z), σ² I),

with a multilayer perceptron g. A linear g would be probabilistic PCA, whose codes are those of PCA up to a linear map.
The classifier is logistic regression, which can separate classes only linearly. The comparison therefore shows how well
the codes of each reduction separate the classes. The raw pixels show what the reduction to few dimensions costs.

    python examples/pipeline.py

Tipping & Bishop (1999), *Probabilistic Principal Component Analysis*.
"""

from __future__ import annotations

import numpy as np
from images import load_digits
from matplotlib import pyplot as plt
from script import parse_options, save
from sklearn.base import BaseEstimator
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from pyro_vae.integrations.sklearn import VAETransformer

SIZES = (2, 10)  # numbers of components


def classifier(*reduction: BaseEstimator) -> BaseEstimator:
    """A pipeline: reduction, unit variances, logistic regression."""
    return make_pipeline(*reduction, StandardScaler(), LogisticRegression(max_iter=2000))


def main() -> None:
    options = parse_options(__doc__)
    digits = load_digits()
    x, y = digits.train.flatten(1).numpy(), digits.train_classes.numpy()
    x_test, y_test = digits.test.flatten(1).numpy(), digits.test_classes.numpy()
    sizes, folds, epochs = (SIZES[:1], 2, 2) if options.quick else (SIZES, 3, 100)
    splits = StratifiedKFold(folds, shuffle=True, random_state=options.seed)

    def vae(size: int) -> VAETransformer:
        settings = {"num_epochs": epochs, "learning_rate": 3e-3, "random_state": options.seed}
        return VAETransformer(size, hidden_sizes=(128,), **settings)

    def evaluate(*reduction: BaseEstimator) -> tuple[np.ndarray, float]:
        scores = cross_val_score(classifier(*reduction), x, y, cv=splits)
        return scores, classifier(*reduction).fit(x, y).score(x_test, y_test)

    results = {("PCA", size): evaluate(PCA(size)) for size in sizes}
    results |= {("VAE", size): evaluate(vae(size)) for size in sizes}
    results[("pixels", 64)] = evaluate()
    print(f"share of digits classified correctly: {folds}-fold cross-validation on {len(x)}, test on {len(x_test)}")
    print(f"{'codes':<8} {'components':>10} {'cross-validated':>16} {'range of folds':>18} {'test':>8}")
    for (name, size), (scores, test) in results.items():
        spread = f"{scores.min():.4f} – {scores.max():.4f}"
        print(f"{name:<8} {size:>10} {scores.mean():>16.4f} {spread:>18} {test:>8.4f}")
    most = np.bincount(y).argmax()  # the best guess without looking at x
    guess = np.mean(y == most), np.mean(y_test == most)
    print(f"{'none':<8} {0:>10} {guess[0]:>16.4f} {'':>18} {guess[1]:>8.4f}")

    figure, axes = plt.subplots(1, 2, figsize=(9, 4.2), sharey=False)
    for ax, (name, reduction) in zip(axes, (("PCA", PCA(2)), ("VAE", vae(2))), strict=True):
        codes = reduction.fit(x).transform(x_test)
        points = ax.scatter(codes[:, 0], codes[:, 1], c=y_test, cmap="tab10", vmin=-0.5, vmax=9.5, s=10)
        ax.set(title=f"{name}, two components, test digits", xlabel="first", ylabel="second")
    figure.colorbar(points, ax=axes, ticks=range(10), label="digit")
    save(figure, options, "pipeline")


if __name__ == "__main__":
    main()
