r"""Semi-supervised learning: a model of images and labels, where few of the digits have a label.

    p(x, y) = p(y) ∫ p(z) p(x|y, z) dz,      q(y, z|x) = q(y|x) q(z|x, y).

If the label is missing, the guide's classifier q(y|x) proposes it, and its ten values are summed out. If the label is
known, q is a point mass at it. The ELBO of labelled data then has no term with the classifier, so that one is added:

    J = Σ_unlabelled ELBO(x) + Σ_labelled [ELBO(x, y) + α log q(y|x)].

All of this is one plain Pyro pair, made of conditional distributions of this package. The images without labels show
what digits look like, and the labels only have to name the groups. This pair is for training. With the term of the
classifier it is not a joint density; to estimate log p(x, y), use a model that observes the labels it is given (`obs=`,
`obs_mask=`).

    python examples/semi_supervised.py

Kingma, Rezende, Mohamed & Welling (2014), *Semi-Supervised Learning with Deep Generative Models*, equation 9
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from images import load_digits
from matplotlib import pyplot as plt
from pyro import poutine
from pyro.infer import TraceEnum_ELBO
from script import parse_options, save
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn.functional import one_hot

from pyro_vae import fit
from pyro_vae.distributions import ConditionalBernoulli, ConditionalNormal, ConditionalOneHotCategorical, StandardNormal
from pyro_vae.networks import MLP
from pyro_vae.plots import plot_images

LABELS = 100
ALPHA = 15.0  # one image in fifteen has a label


class SemiSupervised(nn.Module):
    """A Pyro pair for images x (N, 64), one-hot labels y (N, 10), and whether each label is known (N,)."""

    def __init__(self, latent: int = 5) -> None:
        super().__init__()
        self.prior = StandardNormal(latent)
        self.likelihood = ConditionalBernoulli(MLP(latent, [128], context_size=10), 64)
        self.classifier = ConditionalOneHotCategorical(MLP(64, [128]), 10)
        self.posterior = ConditionalNormal(MLP(64, [128], context_size=10), latent)

    def model(self, x: Tensor, y: Tensor, known: Tensor) -> None:
        pyro.module("pair", self)
        with pyro.plate("data", len(x)):
            label = pyro.sample("y", dist.OneHotCategorical(logits=torch.zeros(10)))
            z = pyro.sample("z", self.prior())
            pyro.sample("x", self.likelihood(z, label), obs=x)
            with poutine.scale(scale=ALPHA), poutine.mask(mask=known):  # the classification term, not part of p(x, y)
                pyro.sample("classified", self.classifier(x), obs=y)

    def guide(self, x: Tensor, y: Tensor, known: Tensor) -> None:
        with pyro.plate("data", len(x)):
            probabilities = torch.where(known.unsqueeze(-1), y, self.classifier(x).probs)
            label = pyro.sample("y", dist.OneHotCategorical(probabilities), infer={"enumerate": "parallel"})
            pyro.sample("z", self.posterior(x, label))


def main() -> None:
    options = parse_options(__doc__)
    digits = load_digits()
    x, test = ((x.flatten(1) > 0.5).float() for x in (digits.train, digits.test))
    classes, test_classes = digits.train_classes, digits.test_classes
    # ten labels of each class; if a label is not known, y holds a placeholder, the one-hot vector of class 0
    chosen = torch.cat([(classes == c).nonzero().flatten()[: LABELS // 10] for c in range(10)])
    known = torch.zeros(len(x), dtype=torch.bool)
    known[chosen] = True
    y = one_hot(torch.where(known, classes, 0), 10).float()

    pair = SemiSupervised()
    epochs = 3 if options.quick else 100
    loss = TraceEnum_ELBO(max_plate_nesting=1)
    fit(pair.model, pair.guide, (x, y, known), num_epochs=epochs, learning_rate=3e-3, loss=loss, seed=options.seed)

    few = LogisticRegression(max_iter=1000).fit(x[chosen], classes[chosen])
    all_labels = LogisticRegression(max_iter=1000).fit(x, classes)
    with torch.no_grad():
        predicted = pair.classifier(test).probs.argmax(-1)
    shares = {
        f"logistic regression, {LABELS} labels": few.score(test, test_classes),
        f"this model, {LABELS} labels and {len(x) - LABELS} images without": (predicted == test_classes).float().mean(),
        f"logistic regression, all {len(x)} labels": all_labels.score(test, test_classes),
    }
    print(f"share of the {len(test)} test images whose class is found, ± standard error over the images")
    for name, share in shares.items():
        print(f"  {name:<50}{share:.1%} ± {(share * (1 - share) / len(test)) ** 0.5:.1%}")

    # analogies: the style z of a test image, inferred without its label, and all ten classes in that style
    rows = test[10:18]
    with torch.no_grad():
        z = pair.posterior(rows, one_hot(predicted[10:18], 10).float()).mean
        styles = pair.likelihood(z.unsqueeze(1).expand(-1, 10, -1), torch.eye(10).expand(8, 10, 10)).mean
    figure, ax = plt.subplots(figsize=(8, 5.6))
    grid = torch.cat([rows.unsqueeze(1), styles], 1).unflatten(-1, (8, 8))
    plot_images(grid, column_labels=["image", *digits.class_names], ax=ax)
    ax.set_title("test images, and E[x|y, z] of each class y with the z of that image")
    save(figure, options, "semi_supervised")


if __name__ == "__main__":
    main()
