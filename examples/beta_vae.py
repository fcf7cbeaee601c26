r"""The weight β of the KL term: it trades rate for distortion.

    python examples/beta_vae.py

The objective of the β-VAE weights the two terms of the ELBO,

    L(β) = E_q log p(x|z) − β KL(q(z|x)‖p(z)).

The KL term is the rate, the nats that the code spends on x. The first term, with its sign changed, is the distortion. β
> 1 pushes the posterior towards the prior: latent dimensions become unused, and images become blurred. A β that rises
from zero to one, once or in cycles, is a warm-up; it keeps dimensions from collapsing before the decoder has learned to
use them. A capacity C replaces the KL term by |KL − C|, which sets the rate itself. However they were trained, all
models are compared by the same measures: rate, distortion and ELBO at β = 1, on test images. (The likelihood of grey
pixels is a density, so a distortion can be negative.)

Higgins et al. (2017), *beta-VAE: Learning Basic Visual Concepts with a Constrained Variational Framework*;
Burgess et al. (2018), *Understanding disentangling in β-VAE*;
Fu et al. (2019), *Cyclical Annealing Schedule: A Simple Approach to Mitigating KL Vanishing*.
"""

from __future__ import annotations

import warnings

import pyro
import torch
from images import load_digits
from matplotlib import pyplot as plt
from script import parse_options, save
from torch import Tensor

from pyro_vae import VAE, BetaELBO, draw_particles, fit, latent_usage
from pyro_vae.distributions import ConditionalContinuousBernoulli, ConditionalNormal, StandardNormal
from pyro_vae.networks import MLP
from pyro_vae.objectives.schedules import cyclical, linear
from pyro_vae.plots import plot_interpolation, plot_traversal

D, BATCH_SIZE, CAPACITY = 8, 100, 6.0


def main() -> None:
    options = parse_options(__doc__)
    num_epochs, num_particles = (3, 5) if options.quick else (100, 100)
    data = load_digits()
    num_steps = num_epochs * len(data.train) // BATCH_SIZE
    objectives = {
        "β = 1": BetaELBO(1.0),
        "β = 4": BetaELBO(4.0),
        "β from 0 to 1": BetaELBO(linear(num_steps // 3)),
        "β in 4 cycles": BetaELBO(cyclical(num_steps // 4 + 1)),
        f"capacity {CAPACITY:g}, β = 10": BetaELBO(10.0, capacity=linear(num_steps // 2, 0.0, CAPACITY)),
    }
    print(f"{'test digits, nats':<22}{'rate (KL)':>11}{'distortion':>12}{'ELBO ± error':>17}{f'active of {D}':>14}")
    vaes, notes = {}, []
    for name, objective in objectives.items():
        vae = vaes[name] = build(name, options.seed)
        with warnings.catch_warnings(record=True) as caught:  # the warning of a fit that ends at β ≠ 1
            warnings.simplefilter("always")
            fit(
                vae.model,
                vae.guide,
                data.train,
                num_epochs=num_epochs,
                batch_size=BATCH_SIZE,
                learning_rate=3e-3,
                loss=objective,
                seed=options.seed,
            )
        notes += [f"{name}: {warning.message}" for warning in caught]
        usage = latent_usage(vae.model, vae.guide, data.test)
        rate = usage.kl.sum()  # of a diagonal Normal: the KL of its marginals
        distortion, error = reconstruction_loss(vae, data.test, num_particles)
        elbo = f"{-distortion - rate:.2f} ± {error:.2f}"
        print(f"{name:<22}{rate:>11.2f}{distortion:>12.2f}{elbo:>17}{int(usage.active.sum()):>14}")
    print("± error: of the draws of z, not of the choice of images.\n\nWhat fit warned of:", *notes, sep="\n  ")

    figure, axes = plt.subplots(2, 2, figsize=(10, 7.2), height_ratios=[2.7, 1])
    first = [int((data.test_classes == c).int().argmax()) for c in (0, 1, 4, 3, 9, 6)]  # one image of each class
    for column, name in enumerate(["β = 1", "β = 4"]):
        vae = vaes[name]
        kl = latent_usage(vae.model, vae.guide, data.test).kl
        order = kl.argsort(descending=True).tolist()
        z = vae.encode(data.test[first]).mean
        plot_traversal(
            lambda z, vae=vae: vae.decode(z).mean,
            z[0],
            dimensions=order,
            row_labels=[f"$z_{{{d + 1}}}$ ({kl[d]:.2f} nats)" for d in order],
            ax=axes[0, column],
        ).set_title(f"{name}: one dimension moved away from a code")
        plot_interpolation(lambda z, vae=vae: vae.decode(z).mean, z[::2], z[1::2], ax=axes[1, column]).set_title(
            f"{name}: straight lines between two codes"
        )
    save(figure, options, "beta_vae")


def build(name: str, seed: int) -> VAE:
    pyro.set_rng_seed(seed)  # the same initial weights each time
    return VAE(
        StandardNormal(D),
        ConditionalContinuousBernoulli(MLP(D, [128]), (8, 8)),
        ConditionalNormal(MLP((8, 8), [128]), D),
        name=name,
    )


def reconstruction_loss(vae: VAE, x: Tensor, num_particles: int) -> tuple[float, float]:
    """The mean of −E_q log p(x|z) over the rows, and its Monte Carlo error."""
    with torch.no_grad():
        draws = draw_particles(vae.model, vae.guide, x, num_particles=num_particles).log_likelihood.mean(1)
    return -draws.mean().item(), (draws.std() / num_particles**0.5).item()


if __name__ == "__main__":
    main()
