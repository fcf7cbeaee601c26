"""A latent variable with ten values: a VAE that sums out its code fits the same mixture as EM.

With a one-hot code z of ten categories and a linear decoder, the VAE is the mixture of Bernoulli distributions

    p(x) = Σ_k π_k Π_d θ_kd^x_d (1 − θ_kd)^(1 − x_d).

The code has finitely many values, so that the ELBO and log p(x) are sums, without draws. EM maximises the same
likelihood with q(z|x) = p(z|x). A linear encoder can represent this posterior exactly,

    log q(k|x) = Σ_d x_d log(θ_kd / (1 − θ_kd)) + const_k.

Both methods end in local optima, and are therefore started from several random places.

    python examples/known_code.py

Bishop (2006), *Pattern Recognition and Machine Learning*, section 9.3.3.
"""

from __future__ import annotations

import numpy as np
import pyro
import torch
from images import load_digits
from matplotlib import pyplot as plt
from pyro.infer import TraceEnum_ELBO, config_enumerate
from scipy.special import logsumexp
from script import parse_options, save
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR

from pyro_vae import VAE, fit, importance_sampling
from pyro_vae.distributions import ConditionalBernoulli, ConditionalOneHotCategorical
from pyro_vae.networks import MLP
from pyro_vae.plots import plot_images

K = 10  # components
SMALLEST = 1e-3  # EM's θ stay this far from 0 and 1, where a test image could have probability zero


def joint(x: np.ndarray, weights: np.ndarray, theta: np.ndarray) -> np.ndarray:
    """log π_k + log p(x|k), (N, K)."""
    return np.log(weights) + x @ np.log(theta).T + (1 - x) @ np.log1p(-theta).T


def em(x: np.ndarray, steps: int, weights: np.ndarray, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """π and θ after this many steps of expectation maximisation."""
    for _ in range(steps):
        log_joint = joint(x, weights, theta)
        r = np.exp(log_joint - logsumexp(log_joint, axis=1, keepdims=True))  # p(z=k|x)
        weights = np.maximum(r.mean(0), 1e-12)
        theta = np.clip(r.T @ x / np.maximum(r.sum(0), 1e-12)[:, None], SMALLEST, 1 - SMALLEST)
    return weights / weights.sum(), theta


def mixture(x: Tensor, name: str) -> VAE:
    """The same mixture as a VAE. Its components must not start alike, so they start near ten of the images."""
    likelihood = ConditionalBernoulli(MLP(K, []), (8, 8))
    with torch.no_grad():
        likelihood.head.weight.copy_(2 * x[torch.randperm(len(x))[:K]].flatten(1).T - 1)
    posterior = ConditionalOneHotCategorical(MLP((8, 8), []), K)
    with torch.no_grad():  # p(z|x) of these components
        posterior.head.weight.copy_(likelihood.head.weight.T)
        posterior.head.bias.copy_(likelihood(torch.eye(K)).log_prob(torch.zeros(8, 8)))
    return VAE(ConditionalOneHotCategorical(None, K), likelihood, posterior, name=name)


def exact(vae: VAE, x: Tensor) -> Tensor:
    """log p(x), with the ten values of z summed out by hand, (N,)."""
    log_prior = vae.prior().probs.log().detach()
    return torch.logsumexp(log_prior + vae.decode(torch.eye(K)).log_prob(x[:, None]), 1)


def main() -> None:
    options = parse_options(__doc__)
    digits = load_digits()
    train, test = (digits.train > 0.5).float(), (digits.test > 0.5).float()
    flat = [x.flatten(1).numpy().astype(float) for x in (train, test)]
    starts, epochs, steps = (2, 2, 20) if options.quick else (3, 500, 200)

    rng = np.random.default_rng(options.seed)
    candidates = [em(flat[0], steps, np.full(K, 1 / K), rng.uniform(0.25, 0.75, (K, 64))) for _ in range(starts)]
    by_em = sorted((tuple(logsumexp(joint(x, *c), axis=1).mean() for x in flat) for c in candidates), reverse=True)

    trained = []
    for start in range(starts):
        pyro.set_rng_seed(options.seed + start)
        vae = mixture(train, f"mixture_{start}")
        model, guide = config_enumerate(vae.model), config_enumerate(vae.guide)
        elbo = TraceEnum_ELBO(max_plate_nesting=1)
        fit(
            model,
            guide,
            train,
            num_epochs=epochs,
            batch_size=len(train),
            learning_rate=0.1,
            scheduler=lambda optim: CosineAnnealingLR(optim, epochs),
            loss=elbo,
            seed=options.seed,
        )
        trained.append((float(exact(vae, train).mean()), float(exact(vae, test).mean()), vae, model, guide))
    trained.sort(key=lambda row: row[0], reverse=True)
    vae, model, guide = trained[0][2:]

    print(f"log p(x), nats per image, best and worst of {starts} starts by the training images")
    print(f"{'':<6} {'train, best':>12} {'train, worst':>13} {'test, best':>11}")
    for label, runs in (("EM", by_em), ("VAE", trained)):
        print(f"{label:<6} {runs[0][0]:>12.4f} {runs[-1][0]:>13.4f} {runs[0][1]:>11.4f}")

    with torch.no_grad():
        found = vae.prior().probs.double().numpy(), vae.decode(torch.eye(K)).mean.flatten(1).double().numpy()
    gain = logsumexp(joint(flat[0], *em(flat[0], steps, *found)), axis=1).mean() - trained[0][0]
    print(f"EM, started where the best VAE ended, adds {gain:.4f} (training images)")
    elbo = -TraceEnum_ELBO(max_plate_nesting=1).loss(model, guide, test) / len(test)
    estimate = importance_sampling(model, guide, test, num_particles=2, progress=False).log_evidence
    print(f"the VAE on test images: ELBO {elbo:.4f}, exact log p(x) {trained[0][1]:.4f}, ", end="")
    print(f"importance sampling {float(estimate.mean()):.4f}")
    print(f"largest difference of the last two, over images: {float((estimate - exact(vae, test)).abs().max()):.1e}")
    classes = vae.encode(train).probs.argmax(1)
    majority = torch.stack([digits.train_classes[classes == k].bincount(minlength=10).argmax() for k in range(K)])

    order = vae.prior().probs.detach().argsort(descending=True)
    means = vae.decode(torch.eye(K)).mean[order]
    _, ax = plt.subplots(figsize=(8, 1.4))
    labels = [
        f"{p:.2f}\n“{digit}”" for p, digit in zip(vae.prior().probs[order].tolist(), majority[order], strict=True)
    ]
    plot_images(means[None], column_labels=labels, ax=ax)
    ax.figure.suptitle("Mean images of the components, their weights, and the digit most common in them", y=1.15)
    save(ax.figure, options, "known_code")


if __name__ == "__main__":
    main()
