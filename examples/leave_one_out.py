r"""Leave-one-out of two models with an effect of each data point, and why these effects have to be integrated out.

Counts in homes, of which half were treated; each home has an effect z_n of its own:

    y_n ~ Poisson(exp(z_n)),    z_n ~ N(a + b t_n, s²),    t_n = ±½;     is b worth having?

Leave-one-out cross-validation answers by Σ_n log p(y_n|y_−n), from draws of the posterior of all data. With
log p(y_n|θ), θ = (a, b, s), in which z_n is integrated out, a single home changes the posterior little, and importance
sampling gets from it to the one without this home. On the conditional terms log p(y_n|z_n) it does not: without y_n
nothing is known of z_n but its prior. These terms say how well a model follows data that it has seen, and here any
model does, with or without b. The truth is a refit without each home, by quadrature over θ and z_n.

`leave_one_out` takes draws of θ that `draw_posterior` has corrected; `az.loo` takes those of the guide for draws of the
posterior, and a mean-field guide is too narrow, which shows in p_loo.

    python examples/leave_one_out.py

Merkle, Furr & Rabe-Hesketh (2019), *Bayesian comparison of latent variable models: conditional versus marginal
likelihoods*; Vehtari, Gelman & Gabry (2017), *Practical Bayesian model evaluation using leave-one-out cross-validation
and WAIC*.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from math import log

import arviz as az
import pyro
import pyro.distributions as dist
import torch
from matplotlib import pyplot as plt
from pyro.infer.autoguide import AutoNormal
from script import parse_options, save
from torch import Tensor

from pyro_vae import draw_posterior, fit, from_pyro_svi, integrated_log_likelihood
from pyro_vae.diagnostics import leave_one_out

NUM_HOMES = 60
PRIOR_A, PRIOR_B, PRIOR_S = dist.Normal(0.0, 3.0), dist.Normal(0.0, 1.0), dist.LogNormal(-0.5, 0.5)
PRIOR_U = dist.Normal(0.0, 1.0)  # of (z_n − its mean) / s
WAYS = ("exact refits", "leave_one_out", "az.loo of the guide", "az.loo, conditional")


def homes(with_treatment: bool) -> Callable:
    def model(y: Tensor, t: Tensor) -> None:
        a, s = pyro.sample("a", PRIOR_A), pyro.sample("s", PRIOR_S)
        b = pyro.sample("b", PRIOR_B) if with_treatment else torch.tensor(0.0)
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(a + b * t, s))
            pyro.sample("y", dist.Poisson(z.exp()), obs=y)

    return model


def main() -> None:
    options = parse_options(__doc__)
    t = torch.tensor([-0.5, 0.5]).repeat(NUM_HOMES // 2)
    y = torch.poisson((2.5 + t + 0.7 * torch.randn(NUM_HOMES)).exp())
    print(f"Σ log p(y_n|y_−n) of {NUM_HOMES} homes, nats        p_loo    k-hat > 0.7   largest error of a home")
    results = {name: left_out(homes(name == "with b"), y, t, options) for name in ("with b", "without b")}
    print("with b − without b")
    differences = {}
    for way in WAYS:
        d = results["with b"][way] - results["without b"][way]
        differences[way] = d.sum().item(), len(d) ** 0.5 * d.std().item()
        print(f"  {way:22} {differences[way][0]:8.2f} ± {differences[way][1]:.2f} (homes)")
    draw_figure(results["with b"], differences, options)


def left_out(model: Callable, y: Tensor, t: Tensor, options: argparse.Namespace) -> dict[str, Tensor]:
    """log p(y_n|y_−n) of each home, in four ways."""
    guide, num_samples = AutoNormal(model), 50 if options.quick else 2000
    num_epochs = 50 if options.quick else 1500
    fit(model, guide, (y, t), num_epochs=num_epochs, learning_rate=0.02, seed=options.seed, progress=False)
    settings = {"num_samples": num_samples, "seed": options.seed, "progress": False}

    draws = draw_posterior(model, guide, y, t, **settings)
    z = draws.pop("z")
    log_p = integrated_log_likelihood(model, guide, y, t, draws=draws, adaptive=True, **settings)  # (draws, homes)
    loo = leave_one_out(log_p)

    tree = from_pyro_svi(model, guide, y, t, **settings)
    of_tree = arviz_loo(tree)
    terms = dist.Poisson(z.exp()).log_prob(y).numpy()
    tree["log_likelihood"]["y"] = tree["log_likelihood"]["y"].copy(data=terms[None])
    conditional = arviz_loo(tree)

    found = {WAYS[0]: refits(y, t, "b" in draws), WAYS[1]: loo.pointwise, WAYS[2]: of_tree[0], WAYS[3]: conditional[0]}
    more = {WAYS[1]: (loo.p_loo, loo.pareto_khat), WAYS[2]: of_tree[1:], WAYS[3]: conditional[1:]}
    print("with b" if "b" in draws else "without b")
    for way, values in found.items():
        line = f"  {way:22} {values.sum():8.2f}"
        if way in more:
            error = (values - found[WAYS[0]]).abs().max()
            line += f" {more[way][0]:20.2f} {int((more[way][1] > 0.7).sum()):14} {error:25.3f}"
        print(line)
    return found


def arviz_loo(tree: object) -> tuple[Tensor, float, Tensor]:
    """Leave-one-out of each point, p_loo, and k-hats, by either generation of ArviZ."""
    with warnings.catch_warnings(action="ignore"):  # of k-hats, which are counted here
        loo = az.loo(tree, pointwise=True)
    old = hasattr(loo, "loo_i")
    pointwise, p_loo = (loo.loo_i, loo.p_loo) if old else (loo.elpd_i, loo.p)
    return torch.from_numpy(pointwise.values.copy()), float(p_loo), torch.from_numpy(loo.pareto_k.values.copy())


def refits(y: Tensor, t: Tensor, with_treatment: bool) -> Tensor:
    """Exact log p(y_n|y_−n) on a grid of the means of both groups, a ± b/2, and s: each n by a posterior without it."""
    mean, s = torch.linspace(0.0, 5.0, 101).double(), torch.linspace(0.1, 2.5, 41).double()
    u = torch.linspace(-7, 7, 161).double()  # z = mean + s u
    log_u = PRIOR_U.log_prob(u) + log(u[1] - u[0])
    rate = (mean[:, None, None] + s[:, None] * u).exp()
    counts, which = y.double().unique(return_inverse=True)
    table = torch.stack([(dist.Poisson(rate).log_prob(count) + log_u).logsumexp(-1) for count in counts])
    log_p = table[which]  # of each home, (homes, mean, s)
    treated = t > 0
    groups = [log_p[~treated].sum(0), log_p[treated].sum(0)]
    low, high = mean[:, None], mean
    if with_treatment:
        prior = PRIOR_A.log_prob((low + high) / 2) + PRIOR_B.log_prob(high - low)
    else:  # both means are one
        prior = torch.where(low == high, PRIOR_A.log_prob(low), -torch.inf)
    joint = groups[0][:, None] + groups[1] + prior[..., None] + PRIOR_S.log_prob(s)  # (low, high, s)
    seen = torch.stack([joint.logsumexp(1), joint.logsumexp(0)])[treated.long()]  # (homes, mean, s)
    return seen.logsumexp((1, 2)) - (seen - log_p).logsumexp((1, 2))


def draw_figure(found: dict[str, Tensor], differences: dict[str, tuple], options: argparse.Namespace) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), width_ratios=(1, 1.1))
    exact = found[WAYS[0]]
    for way, marker, colour in ((WAYS[3], "x", "C1"), (WAYS[1], "o", "C0")):
        left.plot(exact, found[way], marker, color=colour, label=way, markersize=5, fillstyle="none")
    left.axline((-4, -4), slope=1, color="0.6", linewidth=1, zorder=0)
    left.set(xlabel=r"exact $\log p(y_n|y_{-n})$, nats", ylabel="by importance sampling", title="with b, each home")
    left.legend(frameon=False)
    for i, way in enumerate(WAYS):
        right.errorbar(differences[way][0], -i, xerr=differences[way][1], fmt="o", color=("k", "C0", "C2", "C1")[i])
    right.set_yticks([-i for i in range(len(WAYS))], WAYS)
    right.axvline(0, color="0.6", linewidth=1)
    right.set(xlabel="nats for b (± one standard error over homes)", title="with b − without b", ylim=(-3.5, 0.5))
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
    save(figure, options, "leave_one_out")


if __name__ == "__main__":
    main()
