r"""The linear variational autoencoder is probabilistic principal component analysis (PCA).

    python examples/linear_vae.py

With z ~ N(0, I) and x|z ~ N(W z + m, s² I), everything has a closed form,

    p(x) = N(m, W Wᵀ + s² I),    p(z|x) = N(C Wᵀ (x − m) / s², C),    C = (Wᵀ W / s² + I)⁻¹,

At the maximum of the likelihood, the columns of W span the leading principal components. The mean of p(z|x) is linear
in x, and its covariance is the same for all x, so that a linear encoder with a full covariance contains it. The largest
ELBO is therefore the largest log-likelihood, which scikit-learn's `PCA.score` gives. A diagonal posterior reaches it
too, but only for certain W. A rotation of W leaves p(x) unchanged; a diagonal posterior is exact only if the
columns of W are orthogonal, that is, if the latents are the principal components themselves.

Tipping & Bishop (1999), *Probabilistic Principal Component Analysis*; Lucas et al. (2019), *Don't Blame the ELBO!*
"""

from __future__ import annotations

import pyro
import torch
from matplotlib import pyplot as plt
from script import parse_options, save
from sklearn.decomposition import PCA
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

from pyro_vae import VAE, fit, importance_sampling
from pyro_vae.distributions import ConditionalMultivariateNormal, ConditionalNormal, LearnedScale, StandardNormal
from pyro_vae.networks import MLP

D, NUM_FEATURES = 2, 10


def main() -> None:
    options = parse_options(__doc__)
    num_epochs, num_particles = (5, 20) if options.quick else (250, 500)
    x = torch.randn(1000, D) @ torch.randn(D, NUM_FEATURES) + 1.5 * torch.randn(1000, NUM_FEATURES) + 1.0
    best = PCA(D).fit(x.numpy()).score(x.numpy())
    print(f"largest mean log-likelihood of {D} latents, by sklearn's PCA: {best:.4f} nats per point\n")
    print(f"{'posterior':<10}{'ELBO':>10}{'log p(x)':>10}{'by sampling':>19}{'|learned − C|':>15}{'cos(w1, w2)':>13}")
    figure, axes = plt.subplots(1, 2, figsize=(7, 4.8), sharex=True, sharey=True)
    families = {"full": ConditionalMultivariateNormal, "diagonal": ConditionalNormal}
    for ax, (name, family) in zip(axes, families.items(), strict=True):
        pyro.set_rng_seed(options.seed)
        vae = VAE(
            StandardNormal(D),
            ConditionalNormal(MLP(D, []), NUM_FEATURES, scale=LearnedScale()),
            family(MLP(NUM_FEATURES, []), D),
            name=name,
        )
        fit(
            vae.model,
            vae.guide,
            x,
            num_epochs=num_epochs,
            learning_rate=2e-2,
            scheduler=lambda optim: torch.optim.lr_scheduler.CosineAnnealingLR(optim, num_epochs),
            seed=options.seed,
        )
        p_x, p_z, cosine = exact(vae, x)
        encoded = vae.encode(x)
        covariance = encoded.covariance_matrix if name == "full" else torch.diag_embed(encoded.variance)
        q_z = MultivariateNormal(encoded.mean, covariance)
        log_p = p_x.log_prob(x).mean()
        elbo = log_p - kl_divergence(q_z, p_z).mean()
        error = (covariance - p_z.covariance_matrix).abs().max()
        estimate = importance_sampling(vae.model, vae.guide, x, num_particles=num_particles, progress=False)
        sampled, _, particle_error = estimate.mean
        print(
            f"{name:<10}{elbo:>10.4f}{log_p:>10.4f}{f'{sampled:.4f} ± {particle_error:.4f}':>19}{error:>15.4f}"
            f"{cosine:>13.3f}"
        )
        for row in range(5):
            ax.plot(*outline(p_z.mean[row], p_z.covariance_matrix[row]), color=f"C{row}", linewidth=4, alpha=0.35)
            ax.plot(*outline(q_z.mean[row], covariance[row]), color=f"C{row}", linestyle="--", linewidth=1.2)
        ax.set(title=f"{name} covariance", xlabel="$z_1$", ylabel="$z_2$", aspect="equal")
    figure.suptitle(
        "exact p(z|x) (broad) and learned q(z|x) (dashed) of five points, two standard deviations", fontsize=10
    )
    print("\nELBO and log p(x): of the learned parameters, in closed form. |learned − C|: the largest entry.")
    save(figure, options, "linear_vae")


@torch.no_grad()
def exact(vae: VAE, x: Tensor) -> tuple[MultivariateNormal, MultivariateNormal, float]:
    """p(x) and p(z|x) of the learned decoder, and the cosine of the angle between the columns of W."""
    w, m, s = vae.likelihood.head.weight, vae.likelihood.head.bias, vae.likelihood.scale()
    p_x = MultivariateNormal(m, w @ w.T + s**2 * torch.eye(len(m)))
    c = torch.linalg.inv(w.T @ w / s**2 + torch.eye(D))
    c = (c + c.T) / 2  # it was symmetric only up to rounding
    return p_x, MultivariateNormal((x - m) @ w @ c / s**2, c), torch.cosine_similarity(w[:, 0], w[:, 1], dim=0).item()


def outline(mean: Tensor, covariance: Tensor) -> Tensor:
    """The ellipse at two standard deviations from the mean, (2, points)."""
    angle = torch.linspace(0, 2 * torch.pi, 100)
    return mean[:, None] + 2 * torch.linalg.cholesky(covariance) @ torch.stack([angle.cos(), angle.sin()])


if __name__ == "__main__":
    main()
