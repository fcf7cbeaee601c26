"""Random models: compiled losses and gradients against Pyro's under one seed, and evidence against exact log p(x)."""

from __future__ import annotations

import itertools
import random
import statistics
import warnings
from contextlib import ExitStack
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from random_models import FAMILIES, RandomPair, data_of
from same_as_pyro import gradients

from pyro_vae import CompiledELBO, importance_sampling
from pyro_vae.compiled import recording

BLOCK, NUM_BLOCKS = 20, 3  # random pairs of a test, and tests
NUM_KNOWN, ROWS = 20, 4
# two-sided, for all estimates together: of each kind of pair, compiled and not
THRESHOLD = statistics.NormalDist().inv_cdf(1 - 1e-3 / (2 * 2 * 2 * NUM_KNOWN * ROWS))


@pytest.fixture
def recordings(monkeypatch):
    """Counts them."""
    made, make = [], recording.make_fx

    def counted(*args, **kwargs):
        traced = make(*args, **kwargs)

        def run(*inputs):
            graph = traced(*inputs)
            made.append(graph)
            return graph

        return run

    monkeypatch.setattr(recording, "make_fx", counted)
    return made


def move_parameters():
    with torch.no_grad():
        for _, p in sorted(pyro.get_param_store().named_parameters()):
            p.add_(0.1 * torch.randn_like(p))


def close(a, b):
    """To the rounding of float32 sums of about a hundred terms."""
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5 * (1 + b.abs().max().item()))


def differences(pair):
    """What differs in four calls with other parameters and data: Pyro's own run, the recorded run, two replays."""
    compiled = CompiledELBO(pair.elbo, backend="eager")
    gradients(pair.elbo, pair.model, pair.guide, *pair.args())  # makes the parameters
    for call in range(4):
        move_parameters()
        args = pair.args()
        loss, expected = gradients(pair.elbo, pair.model, pair.guide, *args)
        got, found = gradients(compiled, pair.model, pair.guide, *args)
        assert expected, "no gradients: this pair tests nothing"
        if not close(torch.tensor(got), torch.tensor(loss)):
            yield f"call {call}: loss {got}, expected {loss}"
        if found.keys() != expected.keys():
            yield f"call {call}: gradients of {sorted(found)}, expected {sorted(expected)}"
        for name in found.keys() & expected.keys():
            if not close(found[name], expected[name]):
                yield f"call {call}: gradient of {name} {found[name]}, expected {expected[name]}"


@pytest.mark.parametrize("block", range(NUM_BLOCKS))
def test_losses_and_gradients_of_random_pairs_are_those_of_pyro(block, recordings):
    refused = {}
    for seed in range(BLOCK * block, BLOCK * (block + 1)):
        pyro.clear_param_store()
        pair = RandomPair(seed)
        before = len(recordings)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = list(differences(pair))
        assert not found, f"{pair}\n" + "\n".join(found)
        said = [str(w.message) for w in caught if "CompiledELBO" in str(w.message) or "audit" in str(w.message)]
        assert not [text for text in said if "audit" in text], f"{pair}\n{said}"
        if said or len(recordings) == before:
            refused[seed] = said
    assert len(refused) <= 0.1 * BLOCK, refused


# -- evidence --------------------------------------------------------------------------------------------------------


@dataclass
class Known:
    """A pair whose log p(x) is known, (N,)."""

    model: object
    guide: object
    x: torch.Tensor
    log_evidence: torch.Tensor


def discrete_pair(seed):
    """A chain of discrete latents and observations of several kinds; log p(x) by going through all values."""
    r = random.Random(seed)
    torch.manual_seed(seed)
    sizes = [r.choice([2, 3]) for _ in range(r.randint(1, 3))]
    rows, columns, enumerated, masked = 4, r.choice([0, 2, 3]), r.choice([None, "model", "guide"]), r.random() < 0.5
    first = torch.randn(sizes[0])
    tables = [torch.randn(a, b) for a, b in itertools.pairwise(sizes)]
    locs, family = torch.randn(sizes), r.choice(["Normal", "Bernoulli", "Poisson", "LogNormal"])
    shape = (rows, columns) if columns else (rows,)
    x, mask = data_of(family, shape), torch.rand(columns or 1) < 0.7
    logits = [torch.randn(rows, n) for n in sizes]
    infer = {"enumerate": "parallel"} if enumerated else {}

    def latents():
        values = [pyro.sample("k0", dist.Categorical(logits=first), infer=infer)]
        for i, table in enumerate(tables, 1):
            values.append(pyro.sample(f"k{i}", dist.Categorical(logits=table[values[-1]]), infer=infer))
        return values

    def model(x, _):
        width = -2 if columns else -1
        with pyro.plate("data", len(x), dim=width), ExitStack() as stack:
            f = locs[tuple(latents())]
            if columns:
                stack.enter_context(pyro.plate("columns", columns, dim=-1))
                if masked:
                    stack.enter_context(poutine.mask(mask=mask))
            pyro.sample("x", FAMILIES[family](f), obs=x)

    def guide(x, own):
        with pyro.plate("data", len(x), dim=-2 if columns else -1):
            for i, n in enumerate(sizes):
                if enumerated != "model":
                    start = sum(sizes[:i])
                    row = own[:, start : start + n].unsqueeze(-2) if columns else own[:, start : start + n]
                    pyro.sample(f"k{i}", dist.Categorical(logits=row), infer=infer if enumerated == "guide" else {})

    terms = []
    for values in itertools.product(*map(range, sizes)):
        term = first.log_softmax(-1)[values[0]]
        for table, (a, b) in zip(tables, itertools.pairwise(values), strict=True):
            term = term + table.log_softmax(-1)[a, b]
        log_prob = FAMILIES[family](locs[values]).log_prob(x)
        if columns:
            log_prob = (log_prob * mask if masked else log_prob).sum(-1)
        terms.append(term + log_prob)
    return Known(model, guide, (x, torch.cat(logits, -1)), torch.stack(terms).logsumexp(0))


def gaussian_pair(seed):
    r"""A chain of L Gaussian latents, z_i ~ N(a_i z_{i-1} + b_i, s_i²), and x ~ N(C z + d, t²) in D columns.

    With z = m + A ε, x is Gaussian of mean C m + d and covariance C A Aᵀ Cᵀ + t². The guide draws from the posterior,
    moved and made wider, so that weights are bounded.
    """
    r = random.Random(seed)
    torch.manual_seed(seed)
    num_latents, columns, rows = r.randint(1, 3), r.randint(1, 4), 4
    plate, joint = r.random() < 0.5, r.random() < 0.5
    a, b = 0.8 * torch.randn(num_latents), torch.randn(num_latents)
    s, t = 0.5 + torch.rand(num_latents), 0.5 + torch.rand(columns)
    c, d = torch.randn(columns, num_latents), torch.randn(columns)
    x = 1.5 * torch.randn(rows, columns)
    mean, factor = torch.zeros(num_latents), torch.zeros(num_latents, num_latents)
    for i in range(num_latents):
        mean[i] = b[i] + (a[i] * mean[i - 1] if i else 0)
        factor[i] = a[i] * factor[i - 1] if i else 0
        factor[i, i] = s[i]
    mean, factor, c_, t_ = (v.double() for v in (mean, factor, c, t))
    prior = factor @ factor.T
    marginal = dist.MultivariateNormal(c_ @ mean + d, c_ @ prior @ c_.T + t_.square().diag())
    covariance = torch.linalg.inv(torch.linalg.inv(prior) + c_.T @ (c_ / t_.square()[:, None]))
    loc = mean + (x - c_ @ mean - d) @ (c_ / t_.square()[:, None]) @ covariance
    tril = torch.linalg.cholesky(1.7 * covariance).float()
    centre = (loc + 0.2 * torch.randn(num_latents)).float()

    def model(x, _):
        with pyro.plate("data", len(x), dim=-2):
            if joint:
                fn = dist.MultivariateNormal(mean.float(), scale_tril=factor.float())
                z = pyro.sample("z", fn).unbind(-1)
            else:
                z = []
                for i in range(num_latents):
                    z.append(pyro.sample(f"z{i}", dist.Normal(b[i] + (a[i] * z[-1] if i else 0.0), s[i])))
            f = sum(c[:, i] * z[i] for i in range(num_latents)) + d
            if plate:
                with pyro.plate("columns", columns, dim=-1):
                    pyro.sample("x", dist.Normal(f, t), obs=x)
            else:
                pyro.sample("x", dist.Normal(f.unsqueeze(-2), t).to_event(1), obs=x.unsqueeze(-2))

    def guide(x, own):
        with pyro.plate("data", len(x), dim=-2):
            fn = dist.MultivariateNormal(own.unsqueeze(-2), scale_tril=tril)
            if joint:
                pyro.sample("z", fn)
            else:  # one after the other, each given those before
                noise = []
                for i in range(num_latents):
                    at = own[:, i : i + 1] + sum(tril[i, j] * e for j, e in enumerate(noise))
                    z = pyro.sample(f"z{i}", dist.Normal(at, tril[i, i]))
                    noise.append((z - at) / tril[i, i])

    return Known(model, guide, (x, centre), marginal.log_prob(x.double()))


def evidence_of(pair, compile, seed):
    torch.manual_seed(1000 + seed)  # other noise for each pair, so that errors are independent
    return importance_sampling(
        pair.model, pair.guide, *pair.x, num_particles=1200, chunk_size=160, compile=compile, progress=False
    )


@pytest.mark.parametrize("make", [discrete_pair, gaussian_pair])
def test_evidence_of_random_pairs_is_exact(make, recordings):
    refused, scores = [], []
    for seed in range(NUM_KNOWN):
        pair, before = make(seed), len(recordings)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            plain, compiled = (evidence_of(pair, compile, seed) for compile in (False, "auto"))
        if any("not compiled" in str(w.message) for w in caught) or len(recordings) == before:
            refused.append(seed)
        for evidence in (plain, compiled):
            error = (evidence.log_evidence - pair.log_evidence).abs()
            score = error / (evidence.standard_error + 1e-5)
            assert score.max() < THRESHOLD, f"{make.__name__}({seed}): {score} standard errors"
        scores.append(score[compiled.standard_error > 1e-4])
        torch.testing.assert_close(compiled.log_evidence, plain.log_evidence, rtol=1e-5, atol=1e-4, msg=f"seed {seed}")
    assert len(refused) <= 0.1 * NUM_KNOWN, refused
    squares = torch.cat(scores).square()  # of mean one, if the standard errors are not too small
    assert squares.mean() < 1 + 4 * (2 / len(squares)) ** 0.5
