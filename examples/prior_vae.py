r"""A trained decoder as a prior (PriorVAE): regression with a Gaussian process, without its covariance matrix.

A VAE is trained on draws of a process f ~ N(0, K) at 50 places. Its frozen decoder f(z), z ~ N(0, I), then takes the
place of the process in other models. MCMC moves in 8 independent latents and never inverts K:

    z ~ N(0, I),    y_i ~ N(f(z) at place t_i, σ²),    z | y by NUTS, four chains.

Here the data are Gaussian too, so that the process has its own answer to hold it against, with K_o the columns and K_oo
the block of K at the observed places,

    f | y ~ N(K_o A y, K − K_o A K_oᵀ),    A = (K_oo + σ² I)⁻¹.

    python examples/prior_vae.py

Semenova, Xu, Howes, Rashid, Bhatt, Mishra & Flaxman (2022), *PriorVAE: encoding spatial priors with variational
autoencoders for small-area estimation*
"""

from __future__ import annotations

import warnings
from functools import partial

import arviz as az
import pyro
import pyro.distributions as dist
import torch
from matplotlib import pyplot as plt
from pyro.infer import MCMC, NUTS
from script import parse_options, save
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR

from pyro_vae import VAE, fit, from_pyro
from pyro_vae.distributions import ConditionalMultivariateNormal, ConditionalNormal, StandardNormal
from pyro_vae.networks import MLP

PLACES, LENGTHSCALE, LATENTS, NOISE = 50, 0.2, 8, 0.2


def regression(decoder: VAE, y: Tensor, seen: Tensor) -> None:
    z = pyro.sample("z", decoder.prior())
    f = pyro.deterministic("f", decoder.likelihood_given(z).mean)
    pyro.sample("y", dist.Normal(f[..., seen], NOISE).to_event(1), obs=y)


def main() -> None:
    options = parse_options(__doc__)
    epochs, draws = (2, 20) if options.quick else (60, 1000)
    t = torch.linspace(0, 1, PLACES, dtype=torch.float64)
    covariance = torch.exp(-((t[:, None] - t) ** 2) / (2 * LENGTHSCALE**2))  # the prior sd is 1 everywhere
    root = torch.linalg.cholesky(covariance + 1e-8 * torch.eye(PLACES))
    functions = (torch.randn(20000, PLACES).double() @ root.T).float()

    # a scale that is fixed, and half of the noise in y: if it is learned, it goes to zero before the decoder is right
    likelihood = ConditionalNormal(MLP(LATENTS, [64]), PLACES, scale=NOISE / 2)
    vae = VAE(StandardNormal(LATENTS), likelihood, ConditionalMultivariateNormal(MLP(PLACES, [64]), LATENTS))
    settings = {"batch_size": 256, "learning_rate": 0.01, "seed": options.seed}
    schedule = partial(CosineAnnealingLR, T_max=epochs)
    fit(vae.model, vae.guide, functions, num_epochs=epochs, scheduler=schedule, **settings)

    seen = torch.tensor([2, 9, 13, 21, 24, 40, 44])
    f = root @ torch.randn(PLACES).double()
    y = (f + NOISE * torch.randn(PLACES))[seen].float()
    kernel = NUTS(partial(regression, vae.frozen()), full_mass=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "num_chains")  # on few processors, the chains run one after the other
        mcmc = MCMC(kernel, draws, draws // 3, num_chains=4, disable_progbar=True)
    mcmc.run(y, seen)
    tree = from_pyro(mcmc, num_particles=0, progress=False)
    rhat = az.summary(tree, var_names=["z", "f"], kind="diagnostics", round_to="none")["r_hat"].max()
    posterior = torch.from_numpy(tree["posterior"]["f"].values).flatten(0, 1).double()
    mean, sd = posterior.mean(0), posterior.std(0)

    columns = covariance[:, seen]
    gain = columns @ torch.linalg.inv(covariance[seen][:, seen] + NOISE**2 * torch.eye(len(seen)))
    exact_mean, exact_sd = gain @ y.double(), (covariance - gain @ columns.T).diagonal().sqrt()
    difference, ratio = (mean - exact_mean).abs(), sd / exact_sd
    print(f"posterior of f at {PLACES} places given {len(seen)} values: PriorVAE by NUTS against the exact process")
    print(f"  largest R-hat of four chains          {rhat:.3f}")
    print(f"  |difference of means|, largest        {difference.max():.1%} of the prior's sd")
    print(
        f"                         RMS            {(difference / exact_sd).square().mean().sqrt():.1%} of the sd there"
    )
    print(f"  sd, PriorVAE / exact                  from {ratio.min():.3f} to {ratio.max():.3f}")

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    left.plot(t, functions[:4].T, color="0.6", linewidth=1)
    left.plot(t, vae.generate(4, mean=True).T, color="tab:blue", linewidth=1)
    left.set(title="draws: process (grey), decoder (blue)", xlabel="t", ylabel="f")
    right.fill_between(t, exact_mean - 2 * exact_sd, exact_mean + 2 * exact_sd, color="0.85", label="exact, ± 2 sd")
    right.plot(t, exact_mean, color="0.5")
    for sign in (-2, 0, 2):
        right.plot(t, mean + sign * sd, color="tab:blue", linestyle="--", label=None if sign else "PriorVAE")
    right.plot(t, f, color="k", linewidth=0.8, label="f")
    right.plot(t[seen], y, "o", color="tab:red", markersize=4, label="y")
    right.set(title="posterior", xlabel="t")
    right.legend(frameon=False, fontsize=8)
    save(figure, options, "prior_vae")


if __name__ == "__main__":
    main()
