r"""Posterior collapse: latent dimensions that a VAE stops using, and the effect of a warm-up of the KL term.

A dimension has collapsed if q(z_d|x) is the prior for every x. It then costs no nats, and carries no information. The
two symptoms are

    KL_d = mean_n KL(q(z_d|x_n)‖p(z_d)) ≈ 0,      A_d = Var_n(E_q[z_d|x_n]) ≈ 0,

A dimension counts as active if A_d > 0.01 (Burda, Grosse & Salakhutdinov 2016). The number of active dimensions does
not show how much each of them carries, so look at KL_d as well: a dimension just above the threshold may carry a
hundredth of a nat.

It is not a fault as such if a VAE leaves some of its dimensions unused: a nat of KL must gain at least a nat of
reconstruction. It is a fault if a dimension is given up early, before the decoder can use it. The usual remedy is to
weight the KL term by a β that rises from zero to one over the first steps. log p(x), which does not depend on β, shows
whether it helped. (This is one training run each: another seed gives other numbers.)

    python examples/posterior_collapse.py

Bowman, Vilnis, Vinyals, Dai, Jozefowicz & Bengio (2016), *Generating Sentences from a Continuous Space*
"""

from __future__ import annotations

from images import load_digits
from matplotlib import pyplot as plt
from script import parse_options, save

from pyro_vae import VAE, BetaELBO, fit, importance_sampling, latent_usage
from pyro_vae.distributions import ConditionalBernoulli, ConditionalNormal, StandardNormal
from pyro_vae.networks import MLP
from pyro_vae.objectives.schedules import linear
from pyro_vae.plots import plot_latent_usage

DIMENSIONS = 32


def main() -> None:
    options = parse_options(__doc__)
    digits = load_digits()
    train, test = ((x.flatten(1) > 0.5).float() for x in (digits.train, digits.test))
    epochs, particles = (2, 20) if options.quick else (150, 500)
    steps = epochs * -(-len(train) // 128)

    # two hidden layers each way: the deeper the networks, the longer the decoder takes to make use of a dimension
    losses = {"no warm-up": None, "KL warm-up": BetaELBO(linear(steps // 2))}
    log_p = {}
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True)
    print(f"{DIMENSIONS} latent dimensions, binary digits; means over the {len(test)} test images, in nats")
    print(f"{'':<12}{'active':>8}{'KL(q‖p)':>10}{'log p(x)':>11}  (± particles)")
    for (name, loss), ax in zip(losses.items(), axes, strict=True):
        vae = VAE(
            StandardNormal(DIMENSIONS),
            ConditionalBernoulli(MLP(DIMENSIONS, [128, 128]), 64),
            ConditionalNormal(MLP(64, [128, 128]), DIMENSIONS),
            name=name,
        )
        fit(vae.model, vae.guide, train, num_epochs=epochs, learning_rate=2e-3, loss=loss, seed=options.seed)
        usage = latent_usage(vae.model, vae.guide, test)
        evidence = importance_sampling(vae.model, vae.guide, test, num_particles=particles, progress=False)
        log_p[name] = evidence.log_evidence
        mean, _, error = evidence.mean
        print(f"{name:<12}{int(usage.active.sum()):>8}{usage.kl.sum():>10.2f}{mean:>11.2f}  (± {error:.2f})")
        plot_latent_usage(usage.kl, usage.active, label=name, ax=ax)
    gain = log_p["KL warm-up"] - log_p["no warm-up"]
    print(f"gain in log p(x) by the warm-up: {gain.mean():.2f} ± {gain.std() / len(gain) ** 0.5:.2f} (images)")
    axes[1].set_ylabel("")
    axes[1].bar(0, 0, color="tab:blue", label="active: $A_d$ > 0.01")
    axes[1].bar(0, 0, color="0.7", label="collapsed")
    axes[1].legend(frameon=False)
    save(figure, options, "posterior_collapse")


if __name__ == "__main__":
    main()
