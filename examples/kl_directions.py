"""The Kullback–Leibler divergence has a direction: KL(q‖p) picks a mode, KL(p‖q) covers them all.

KL(p‖q) = E_p[log p − log q] of two normal distributions N(μ₁, Σ₁) and N(μ₂, Σ₂) in d dimensions is

    ½ [log(|Σ₂| / |Σ₁|) − d + tr(Σ₂⁻¹ Σ₁) + (μ₂ − μ₁)ᵀ Σ₂⁻¹ (μ₂ − μ₁)].

It is zero if and only if the two are equal, and it is not symmetric. Let q be a normal distribution in two dimensions,
and p a mixture of two. An ELBO minimises KL(q‖p): q avoids places where p is small, and settles on one mode. At best, q
covers this mode completely, and the divergence is then about −log of the mode's weight. Maximum likelihood on draws
from p minimises KL(p‖q): q takes exactly the mean and covariance of p, and lies where p has almost no mass.

    python examples/kl_directions.py

Bishop (2006), *Pattern Recognition and Machine Learning*, section 10.1.2.
"""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from matplotlib import pyplot as plt
from pyro.infer import Trace_ELBO
from script import parse_options, save
from torch import Tensor

from pyro_vae import fit
from pyro_vae.distributions import ConditionalMultivariateNormal

WEIGHTS = torch.tensor([0.4, 0.6])
MEANS = torch.tensor([[-3.0, -1.0], [3.0, 1.0]])
COVARIANCES = torch.tensor([[[1.0, 0.6], [0.6, 1.0]], [[0.8, -0.4], [-0.4, 1.2]]])


def closed_form(p: dist.MultivariateNormal, q: dist.MultivariateNormal) -> float:
    """KL(p‖q) of two normal distributions, by the formula above."""
    precision, shift = q.covariance_matrix.inverse(), q.mean - p.mean
    log_ratio = q.covariance_matrix.logdet() - p.covariance_matrix.logdet()
    trace = (precision @ p.covariance_matrix).trace()
    return float(log_ratio - len(shift) + trace + shift @ precision @ shift) / 2


@torch.no_grad()
def monte_carlo(p: dist.TorchDistribution, q: dist.TorchDistribution, draws: int) -> tuple[float, float]:
    """KL(p‖q) as the mean of log p − log q over draws of p, and its standard error."""
    y = p.sample((draws,))
    difference = p.log_prob(y) - q.log_prob(y)
    return float(difference.mean()), float(difference.std()) / math.sqrt(draws)


def fit_reverse(p: dist.TorchDistribution, start: Tensor, steps: int, seed: int) -> dist.MultivariateNormal:
    """Minimises KL(q‖p), which is −ELBO of a model without data, whose only site is z ~ p."""
    pyro.clear_param_store()  # of the last q
    q = ConditionalMultivariateNormal(None, 2)
    with torch.no_grad():
        q.free[:2] = start  # the first parameters are the mean

    def model(rows: Tensor) -> None:
        with pyro.plate("data", len(rows)):
            pyro.sample("z", p)

    def guide(rows: Tensor) -> None:
        pyro.module("q", q)
        with pyro.plate("data", len(rows)):
            pyro.sample("z", q())

    rows = torch.zeros(256, 1)  # their values play no role: each row is a draw of z
    fit(model, guide, rows, num_epochs=steps, batch_size=256, learning_rate=0.03, loss=Trace_ELBO(), seed=seed)
    with torch.no_grad():
        return dist.MultivariateNormal(q().mean.detach(), q().covariance_matrix.detach())


def main() -> None:
    options = parse_options(__doc__)
    draws, steps = (2_000, 20) if options.quick else (200_000, 400)
    modes = [dist.MultivariateNormal(m, c) for m, c in zip(MEANS, COVARIANCES, strict=True)]
    p = dist.MixtureSameFamily(dist.Categorical(WEIGHTS), dist.MultivariateNormal(MEANS, COVARIANCES))

    print("two normal distributions, the modes a and b of the mixture: closed form, Monte Carlo ± standard error")
    for label, (one, other) in (("KL(a‖b)", modes), ("KL(b‖a)", modes[::-1])):
        value, error = monte_carlo(one, other, draws)
        print(f"  {label}  {closed_form(one, other):.4f}  {value:.4f} ± {error:.4f}")

    mean = WEIGHTS @ MEANS
    between = (MEANS - mean).T @ (WEIGHTS[:, None] * (MEANS - mean))
    fits = {
        "KL(q‖p), from the left": fit_reverse(p, torch.tensor([-2.0, 0.0]), steps, options.seed),
        "KL(q‖p), from the right": fit_reverse(p, torch.tensor([2.0, 0.0]), steps, options.seed),
        # the covariance within the modes plus that between them
        "KL(p‖q), exact": dist.MultivariateNormal(mean, (WEIGHTS[:, None, None] * COVARIANCES).sum(0) + between),
    }
    print("a normal q fitted to the mixture p of a (weight 0.4) and b (weight 0.6)")
    print(f"{'minimised':<24} {'mean of q':>16} {'KL(q‖p)':>16} {'KL(p‖q)':>18}")
    for label, q in fits.items():
        both = ["{:.4f} ± {:.4f}".format(*monte_carlo(*pair, draws)) for pair in ((q, p), (p, q))]
        print(f"{label:<24} {q.mean[0]:>8.3f}{q.mean[1]:>8.3f} {both[0]:>16} {both[1]:>18}")
    print(f"KL(q‖p) of q = a is about −log 0.4 = {-math.log(0.4):.4f}, of q = b −log 0.6 = {-math.log(0.6):.4f}")

    axis = torch.linspace(-7, 7, 141)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.3), sharey=True)
    for ax, (label, q) in zip(axes, fits.items(), strict=True):
        ax.contourf(axis, axis, p.log_prob(grid).exp(), levels=10, cmap="Greys")
        density = q.log_prob(grid).exp()
        levels = [share * density.max() for share in (0.15, 0.3, 0.5, 0.7, 0.9)]
        ax.contour(axis, axis, density, levels=levels, colors="C3", linewidths=1)
        ax.set(title=f"min {label}", aspect="equal", xlim=(-7, 7), ylim=(-5, 5), xlabel="$z_1$")
    axes[0].set_ylabel("$z_2$")
    axes[0].fill([], [], color="0.4", label="p")
    axes[0].plot([], [], color="C3", label="q")
    axes[0].legend(frameon=False, loc="lower right")
    save(figure, options, "kl_directions")


if __name__ == "__main__":
    main()
