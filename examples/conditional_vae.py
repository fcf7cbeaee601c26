r"""A conditional VAE generates digits of a given class c; z only has to describe what differs within a class.

    p(x|c) = ∫ p(z) p(x|z, c) dz,      q(z|x, c),      log p(x|c) ≥ E_q log p(x|z, c) − KL(q(z|x, c)‖p(z)).

The class, as a one-hot vector, is a further input of both networks. The prior of z is the same for all classes, so that
z need not repeat what c says: the same z with another c gives another digit in the same style. By Bayes' rule, p(c|x) ∝
p(x|c) p(c), so that log p(x|c) of all classes makes a classifier.

    python examples/conditional_vae.py

Sohn, Lee & Yan (2015), *Learning Structured Output Representation using Deep Conditional Generative Models*
"""

from __future__ import annotations

import torch
from images import load_digits
from matplotlib import pyplot as plt
from script import parse_options, save
from torch.nn.functional import one_hot

from pyro_vae import VAE, fit, importance_sampling
from pyro_vae.distributions import ConditionalBernoulli, ConditionalNormal, StandardNormal
from pyro_vae.networks import MLP
from pyro_vae.plots import plot_images


def main() -> None:
    options = parse_options(__doc__)
    digits = load_digits()
    train, test = ((x > 0.5).float() for x in (digits.train, digits.test))
    classes, test_classes = (one_hot(c, 10).float() for c in (digits.train_classes, digits.test_classes))

    vae = VAE(
        StandardNormal(4),
        ConditionalBernoulli(MLP(4, [128], context_size=10), (8, 8)),
        ConditionalNormal(MLP((8, 8), [128], context_size=10), 4),
    )
    epochs, particles = (3, 20) if options.quick else (150, 300)
    fit(vae.model, vae.guide, (train, classes), num_epochs=epochs, learning_rate=3e-3, seed=options.seed)

    # log p(x|c) of each test image with each class, (N, 10)
    scores = []
    for c in torch.eye(10):
        context = c.expand(len(test), 10)
        evidence = importance_sampling(vae.model, vae.guide, test, context, num_particles=particles, progress=False)
        scores.append(evidence.log_evidence)
    log_p = torch.stack(scores, 1)
    right = log_p[test_classes.bool()]
    wrong = log_p[~test_classes.bool()].reshape(len(test), 9)
    predicted = log_p.argmax(1)
    print(f"log p(x|c) of {len(test)} test images, nats per image, by importance sampling with {particles} particles")
    print(f"  the image's own class            {right.mean():8.2f}")
    print(f"  the best of the nine others      {wrong.max(1).values.mean():8.2f}")
    print(f"  mean of the nine others          {wrong.mean():8.2f}")
    share = (predicted == digits.test_classes).float().mean()
    error = (share * (1 - share) / len(test)) ** 0.5
    print(f"  own class the most probable      {share:8.1%} ± {error:.1%} (images); by chance 10%")

    # one row for each class: the same eight codes in all rows, then two draws of z for each class
    z = torch.randn(8, 4)
    with torch.no_grad():
        grid = vae.decode(z.repeat(10, 1), torch.eye(10).repeat_interleave(8, 0)).mean.reshape(10, 8, 8, 8)
    fresh = vae.generate(30, torch.eye(10).repeat_interleave(3, 0), mean=True).reshape(10, 3, 8, 8)
    figure, (left, rest) = plt.subplots(1, 2, figsize=(8, 6.4), width_ratios=(8, 3))
    names = list(digits.class_names)
    plot_images(grid, row_labels=names, column_labels=[f"$z_{{{i}}}$" for i in range(1, 9)], ax=left)
    left.set_title("same column, same z")
    plot_images(fresh, ax=rest)
    rest.set_title("z drawn anew")
    save(figure, options, "conditional_vae")


if __name__ == "__main__":
    main()
