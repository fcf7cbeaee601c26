r"""A deep Markov model: a network for the transition of a state-space model, and log p(x) of each sequence.

    z_1 ~ N(0, 1),    z_t ~ N(f(z_{t−1}), q²),    x_t ~ N(z_t, r²),    q(z|x) = Π_t q(z_t|z_{t−1}, x_t, …, x_T).

The guide reads the future of each step by a recurrent network that runs backwards. The data hop between two wells: f is
no line. The plate has the sequences, and a plain loop over time is inside it, so that `importance_sampling` and
`adaptive_importance_sampling` estimate log p(x_1, …, x_T) of each sequence. The truth is known: for a linear f by the
Kalman filter (`pyro.distributions.GaussianHMM`), for any f, as z_t is one number, by a sum over a grid of z_{t−1} from
step to step. What the line misses shows in log p(x) of new sequences.

    python examples/deep_markov.py

Krishnan, Shalit & Sontag (2017), *Structured Inference Networks for Nonlinear State Space Models*.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from matplotlib import pyplot as plt
from script import parse_options, save
from torch import Tensor, nn

from pyro_vae import adaptive_importance_sampling, fit, from_pyro_svi, importance_sampling
from pyro_vae.networks import MLP

STEPS, Q, R = 16, 0.35, 0.6


def wells(z: Tensor) -> Tensor:
    """The true f: two stable points, near ±1."""
    return 1.05 * (2 * z).tanh()


class Markov(nn.Module):
    """A state-space model with this transition, and its guide."""

    def __init__(self, name: str, transition: nn.Module) -> None:
        super().__init__()
        self.name, self.transition = name, transition
        self.log_scales = nn.Parameter(torch.tensor([0.0, 0.0]))  # of q and r
        self.backwards, self.encoder = nn.GRU(1, 16, batch_first=True), MLP(17, [32])
        self.head = nn.Linear(32, 2)

    def model(self, x: Tensor) -> None:
        pyro.module(self.name, self)
        q, r = self.log_scales.exp()
        loc, scale = torch.zeros(()), torch.ones(())
        with pyro.plate("data", len(x)):
            for t in range(STEPS):
                z = pyro.sample(f"z_{t}", dist.Normal(loc, scale))
                pyro.sample(f"x_{t}", dist.Normal(z, r), obs=x[:, t])
                loc, scale = self.transition(z[..., None])[..., 0], q

    def guide(self, x: Tensor) -> None:
        pyro.module(self.name, self)
        future = self.backwards(x[..., None].flip(1))[0].flip(1)  # (N, steps, 16)
        z = torch.zeros(len(x))
        with pyro.plate("data", len(x)):
            for t in range(STEPS):
                known = torch.cat([z[..., None], future[:, t].expand(*z.shape, -1)], -1)
                loc, log_scale = self.head(self.encoder(known)).unbind(-1)
                z = pyro.sample(f"z_{t}", dist.Normal(loc, log_scale.exp()))


def main() -> None:
    options = parse_options(__doc__)
    num_epochs, num_particles = (2, 100) if options.quick else (60, 1000)
    train, _ = simulate(1000)
    test, states = simulate(100)
    exact = by_grid(wells, Q, R, test)[0]
    print(f"log p(x) of {len(test)} new sequences of {STEPS} steps, nats per sequence")
    print(f"{'':34}exact   importance sampling        adaptive")
    print(f"  {'the true model':28}{exact.mean():9.3f}")
    pairs = {}
    for name, transition in (("linear", nn.Linear(1, 1)), ("deep", nn.Sequential(MLP(1, [32]), nn.Linear(32, 1)))):
        pair = pairs[name] = Markov(name, transition)
        fit(pair.model, pair.guide, train, num_epochs=num_epochs, batch_size=100, learning_rate=0.01, seed=options.seed)
        with torch.no_grad():
            q, r = pair.log_scales.exp()
            exact = by_grid(lambda z, f=transition: f(z[:, None])[:, 0], q, r, test)[0]
        line = f"  {f'{name}, q = {q:.2f}, r = {r:.2f}':28}{exact.mean():9.3f}"
        for estimate in (importance_sampling, adaptive_importance_sampling):
            evidence = estimate(pair.model, pair.guide, test, num_particles=num_particles, seed=options.seed)
            mean, _, error = evidence.mean
            line += f" {mean:9.3f} ± {error:.3f} ({int(evidence.doubtful.sum())} doubtful)"
        print(line)
        if name == "linear":
            print(f"  {'':12}its Kalman filter{kalman(transition, q, r, test).mean():9.3f}")
    draw_figure(pairs, test, states, options)


def simulate(num: int) -> tuple[Tensor, Tensor]:
    states = [torch.randn(num)]
    while len(states) < STEPS:
        states.append(wells(states[-1]) + Q * torch.randn(num))
    z = torch.stack(states, 1)
    return z + R * torch.randn(num, STEPS), z


def by_grid(f: Callable, q: float, r: float, x: Tensor) -> tuple[Tensor, Tensor]:
    """Exact log p(x), (N,), and mean of the smoothed states, (N, steps), by forward and backward sums over a grid."""
    z = torch.linspace(-5, 5, 401)
    prior = dist.Normal(0.0, 1.0).log_prob(z) + (z[1] - z[0]).log()
    move = dist.Normal(f(z)[:, None], q).log_prob(z) + (z[1] - z[0]).log()  # from row to column
    seen = dist.Normal(z, r).log_prob(x[..., None])  # (N, steps, grid)
    forward = [prior + seen[:, 0]]
    for t in range(1, STEPS):
        forward.append(log_matmul(forward[-1], move) + seen[:, t])
    backward = [torch.zeros_like(forward[0])]
    for t in reversed(range(1, STEPS)):
        backward.insert(0, log_matmul(backward[0] + seen[:, t], move.T))
    smoothed = (torch.stack(forward, 1) + torch.stack(backward, 1)).softmax(-1)
    return forward[-1].logsumexp(-1), smoothed @ z


def log_matmul(a: Tensor, b: Tensor) -> Tensor:
    top = a.amax(-1, keepdim=True)
    return top + ((a - top).exp() @ b.exp()).log()


def kalman(line: nn.Linear, q: Tensor, r: Tensor, x: Tensor) -> Tensor:
    """log p(x) of the linear model, (N,). GaussianHMM moves before it observes: its first move makes z_1 of nothing."""
    first = torch.arange(STEPS) == 0
    a, b = line.weight.detach()[0, 0], line.bias.detach()[0]
    zero = torch.zeros(STEPS, 1)
    moved = dist.Normal(torch.where(first, 0.0, b)[:, None], torch.where(first, 1.0, q)[:, None]).to_event(1)
    start = dist.MultivariateNormal(torch.zeros(1), torch.eye(1))
    matrix = torch.where(first, 0.0, a)[:, None, None]
    return dist.GaussianHMM(start, matrix, moved, torch.ones(1, 1), dist.Normal(zero, r).to_event(1)).log_prob(
        x[..., None]
    )


def draw_figure(pairs: dict[str, Markov], x: Tensor, states: Tensor, options: argparse.Namespace) -> None:
    deep = pairs["deep"]
    shown = states.sign().diff().abs().sum(1).argsort(descending=True)[[0, 20]]  # some that hop
    num_samples = 200 if options.quick else 2000
    tree = from_pyro_svi(
        *(deep.model, deep.guide, x[shown]),
        num_samples=num_samples,
        resample=True,
        stack={"z": "time", "x": "time"},
        seed=options.seed,
        progress=False,
    )
    z = tree["posterior"]["z"]  # (chain, draw, data, time)
    print(f"posterior: z {z.dims}, effective draws {tree['sample_stats']['ess'].values.round()} of {num_samples}")
    with torch.no_grad():
        exact = by_grid(lambda z: deep.transition(z[:, None])[:, 0], *deep.log_scales.exp(), x[shown])[1]
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.7))
    time = range(1, STEPS + 1)
    for i, ax in enumerate(axes[:2]):
        low, high = z.quantile([0.05, 0.95], ("chain", "draw")).values[:, i]
        ax.fill_between(time, low, high, alpha=0.25, linewidth=0, label="90 % of resampled draws")
        ax.plot(time, z.mean(("chain", "draw"))[i], "C0", label="their mean")
        ax.plot(time, exact[i], "k--", linewidth=1, label="exact mean of the model")
        ax.plot(time, states[shown[i]], "C1o", markersize=4, label="true $z_t$")
        ax.plot(time, x[shown[i]], "x", color="0.5", markersize=5, label="$x_t$")
        ax.set(xlabel="t", title="a new sequence", ylim=(-3, 3), xticks=range(1, STEPS + 1, 3))
    axes[0].legend(frameon=False, fontsize=8, ncols=2, loc="upper center")
    grid = torch.linspace(-2, 2, 101)
    axes[2].plot(grid, wells(grid), "k--", linewidth=1, label="true")
    for name, pair in pairs.items():
        axes[2].plot(grid, pair.transition(grid[:, None]).detach(), label=name)
    axes[2].set(xlabel="$z_{t-1}$", title="$f$, the mean of $z_t$")
    axes[2].legend(frameon=False)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    save(figure, options, "deep_markov")


if __name__ == "__main__":
    main()
