r"""A trained decoder inside NUTS: the posterior of the codes of half-missing digits, in two ways that must agree.

A VAE learns from digits in which half of the pixels are missing at random. Then the lower half is missing, so that its
encoder q(z|x) sees holes that it never saw. The decoder still gives the exact posterior of each code,

    p(z|x_obs) ∝ p(z) Π_{i observed} p(x_i|z),

up to its constant. `frozen().model` is a plain Pyro model, so that NUTS draws from it, given all images at once.
`draw_posterior` resamples weighed draws of an adapted proposal, each image by itself. `impute` fills the holes with
draws of either kind.

    python examples/decoder_in_nuts.py

Mattei & Frellsen (2018), *Leveraging the Exact Likelihood of Deep Latent Variable Models*, draws from this posterior by
Metropolis-within-Gibbs.
"""

from __future__ import annotations

import warnings

import arviz as az
import torch
from images import load_digits
from matplotlib import pyplot as plt
from pyro.infer import MCMC, NUTS
from script import parse_options, save

from pyro_vae import VAE, draw_posterior, fit, from_pyro, importance_sampling, impute
from pyro_vae.distributions import ConditionalMultivariateNormal, ConditionalNormal, ObservedPart, StandardNormal
from pyro_vae.networks import MLP, MaskedInput
from pyro_vae.plots import plot_images

LATENTS = 4


def main() -> None:
    options = parse_options(__doc__)
    epochs, draws, particles = (2, 20, 100) if options.quick else (100, 500, 10000)
    digits = load_digits()
    train, original = digits.train.flatten(1), digits.test.flatten(1)[10:16]
    holes = train.masked_fill(torch.rand_like(train) < 0.5, torch.nan)
    x = original.clone()
    x[:, 32:] = torch.nan

    likelihood = ObservedPart(ConditionalNormal(MLP(LATENTS, [128]), 64, scale=0.2))
    encoder = ConditionalMultivariateNormal(MaskedInput(MLP(2 * 64, [128])), LATENTS)
    vae = VAE(StandardNormal(LATENTS), likelihood, encoder)
    fit(vae.model, vae.guide, holes, num_epochs=epochs, learning_rate=3e-3, seed=options.seed)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "num_chains")  # on few processors, the chains run one after the other
        mcmc = MCMC(NUTS(vae.frozen().model), draws, draws // 2, num_chains=4, disable_progbar=True)
    mcmc.run(x)
    tree = from_pyro(mcmc, num_particles=0, progress=False)
    summary = az.summary(tree, var_names=["z"], round_to="none")
    nuts = torch.from_numpy(tree["posterior"]["z"].values).flatten(0, 1)  # (draws, images, LATENTS)
    nuts_error = torch.tensor(summary["mcse_mean"].to_numpy(float)).reshape(nuts.shape[1:])

    resampled = draw_posterior(vae.model, vae.guide, x, num_samples=4 * draws, num_particles=particles, progress=False)
    z = resampled["z"]
    count = 1 / (1 / resampled.effective_sample_size + 1 / len(z))  # of draws, as many independent ones
    error = z.std(0) / count.sqrt().unsqueeze(1)
    guide = vae.encode(x)
    plain = importance_sampling(vae.model, vae.guide, x, num_particles=particles, progress=False)

    print(f"posterior of the first of {LATENTS} latents, given the upper half of an image: mean ± error, sd")
    print(f"{'image':<7}{'NUTS':>22}{'draw_posterior':>24}{'q(z|x)':>16}{'ESS of q':>10}{'k-hat':>7}")
    for n in range(len(x)):
        print(
            f"{n:<7}{nuts[:, n, 0].mean():>9.3f} ± {nuts_error[n, 0]:.3f}{nuts[:, n, 0].std():>7.3f}"
            f"{z[:, n, 0].mean():>10.3f} ± {error[n, 0]:.3f}{z[:, n, 0].std():>7.3f}"
            f"{guide.mean[n, 0]:>9.3f}{guide.variance[n, 0].sqrt():>7.3f}"
            f"{plain.effective_sample_size[n]:>8.0f}{plain.pareto_khat[n]:>7.2f}"
        )
    both = (nuts_error**2 + error**2).sqrt()
    print(f"ESS and k-hat: of {particles} draws of q(z|x). All {both.numel()} latents:")
    for name, mean in {"draw_posterior − NUTS": z.mean(0), "q(z|x) − NUTS": guide.mean}.items():
        scores = (mean - nuts.mean(0)) / both
        print(f"  {name:<24} means, RMS {scores.square().mean().sqrt():5.2f} standard errors (1 if both are right)")
    print(f"  largest R-hat of NUTS    {summary['r_hat'].max():.3f}")

    filled = {
        "NUTS": impute(vae.model, vae.guide, x, draws={"z": nuts})["x"],
        "draw_posterior": impute(vae.model, vae.guide, x, draws=resampled)["x"],
        "q(z|x)": impute(vae.model, vae.guide, x, num_draws=len(z), draws={"z": guide.sample((len(z),))})["x"],
    }
    for name, images in filled.items():
        difference = (images.mean(0) - filled["NUTS"].mean(0))[:, 32:].square().mean().sqrt()
        spread = images.std(0)[:, 32:].mean()
        print(f"  missing pixels by {name:<15} mean − that of NUTS, RMS {difference:.3f}; sd {spread:.3f}")
    figure, ax = plt.subplots(figsize=(6, 5))
    means = {name: images.mean(0) for name, images in filled.items()}
    rows = {"original": original, "given": x} | {f"mean by {name}": image for name, image in means.items()}
    plot_images(torch.stack([r.unflatten(1, (8, 8)) for r in rows.values()]), row_labels=list(rows), ax=ax)
    save(figure, options, "decoder_in_nuts")


if __name__ == "__main__":
    main()
