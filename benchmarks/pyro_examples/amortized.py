"""Pairs with a neural network from a data point to its latents: VAEs and their kin."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro.contrib.cevae import TraceCausalEffect_ELBO
from pyro.infer import TraceEnum_ELBO, TraceGraph_ELBO, config_enumerate
from torch import nn

from pyro_examples.example import Example, Namespace, digits, load

__all__ = ["EXAMPLES"]


def _vae(checkout: Path, grey: bool = False) -> Example:
    module = load(checkout, "vae/vae.py").VAE(z_dim=3, hidden_dim=32)
    x = digits(6)
    return Example(module.model, module.guide, (x if grey else (x > 0.5).float(),))


def _ss_vae(checkout: Path, how: str) -> Example:
    config = "parallel" if how == "enumerated" else None
    module = load(checkout, "vae/ss_vae_M2.py").SSVAE(z_dim=3, hidden_layers=[32], config_enum=config)
    x, labels = (digits(6).flatten(1) > 0.5).float(), torch.eye(10)
    if how == "labelled":
        return Example(module.model, module.guide, (x, labels[:6]))
    if how == "drawn":
        return Example(module.model, module.guide, (x,), elbo=TraceGraph_ELBO(), steps=100)
    guide = config_enumerate(module.guide, "parallel", expand=True)
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    return Example(module.model, guide, (x,), elbo=elbo, steps=100, enumerated={"y": labels})


def cvae(checkout: Path) -> Example:
    baseline, module = load(checkout, "cvae/baseline.py"), load(checkout, "cvae/cvae.py")
    net = module.CVAE(3, 32, 32, baseline.BaselineNet(32, 32))
    y = (digits(6)[:, 0] > 0.5).float()
    x = y.clone()
    x[:, 14:] = -1  # half of each image is seen
    return Example(net.model, net.guide, (x, y))


def _dmm(checkout: Path, num_iafs: int) -> Example:
    sizes = {"input_dim": 6, "z_dim": 2, "emission_dim": 8, "transition_dim": 8, "rnn_dim": 8, "iaf_dim": 8}
    module = load(checkout, "dmm.py")
    dmm = module.DMM(num_iafs=num_iafs, **sizes)
    lengths = torch.tensor([5, 4, 5, 3, 5, 2])
    sequences = (torch.rand(6, 5, 6) < 0.4).float() * (torch.arange(5) < lengths[:, None])[..., None]
    batch = module.poly.get_mini_batch(torch.arange(6), sequences, lengths)
    return Example(dmm.model, dmm.guide, tuple(batch), plate="z_minibatch", modules=(dmm,))


def _scanvi(checkout: Path, labelled: bool) -> Example:
    module = load(checkout, "scanvi/scanvi.py").SCANVI(8, 3, 3.0, 0.5, latent_dim=2)
    x, labels = torch.poisson(torch.full((8, 8), 3.0)), torch.eye(3)
    guide = config_enumerate(module.guide, "parallel", expand=True)
    elbo = TraceEnum_ELBO(max_plate_nesting=1, strict_enumeration_warning=False)
    common = {"plate": "batch", "elbo": elbo, "modules": (module,), "steps": 100}
    if labelled:
        return Example(module.model, guide, (x, labels[torch.arange(8) % 3]), **common)
    return Example(module.model, guide, (x,), enumerated={"y": labels}, **common)


class _Topics(nn.Module):
    """An autoencoder of bags of words, p(x|z) a Multinomial of products of experts (Srivastava & Sutton 2017)."""

    def __init__(self, vocabulary: int, topics: int, hidden: int) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(vocabulary, hidden), nn.Softplus(), nn.Dropout(0.2))
        self.loc = nn.Sequential(nn.Linear(hidden, topics), nn.BatchNorm1d(topics, affine=False))
        self.scale = nn.Sequential(nn.Linear(hidden, topics), nn.BatchNorm1d(topics, affine=False))
        self.words = nn.Sequential(nn.Linear(topics, vocabulary, bias=False), nn.BatchNorm1d(vocabulary, affine=False))
        self.topics = topics

    def model(self, x: torch.Tensor) -> None:
        pyro.module("words", self.words)
        with pyro.plate("documents", len(x)):
            zero = x.new_zeros(len(x), self.topics)
            z = pyro.sample("logtheta", dist.Normal(zero, zero.exp()).to_event(1))
            probs = torch.softmax(self.words(z.softmax(-1)), dim=1)
            pyro.sample("obs", dist.Multinomial(int(x.sum(-1).max()), probs), obs=x)

    def guide(self, x: torch.Tensor) -> None:
        pyro.module("encoder", self)
        with pyro.plate("documents", len(x)):
            h = self.hidden(x)
            pyro.sample("logtheta", dist.Normal(self.loc(h), (self.scale(h) / 2).exp()).to_event(1))


def prod_lda(checkout: Path) -> Example:
    module, x = _Topics(12, 3, 16), torch.poisson(torch.full((8, 12), 2.0))
    return Example(module.model, module.guide, (x,), plate="documents", modules=(module,), steps=100)


def air(checkout: Path) -> Example:
    sizes = {"num_steps": 2, "x_size": 12, "window_size": 6, "z_what_size": 3, "rnn_hidden_size": 8}
    nets = {"encoder_net": [16], "decoder_net": [16], "predict_net": [8]}
    module = load(checkout, "air/air.py").AIR(**sizes, **nets, decoder_output_bias=-2.0, scale_prior_mean=2.0)
    x = torch.zeros(6, 12, 12)
    for i in range(6):
        x[i, i : i + 4, 2:6] = 1.0
    return Example(module.model, module.guide, (x, 6), elbo=TraceGraph_ELBO(), steps=100, learning_rate=0.005)


def cevae(checkout: Path) -> Example:
    module = load(checkout, "contrib/cevae/synthetic.py")
    x, t, y, _ = module.generate_data(Namespace(num_data=8, feature_dim=4))
    net = module.CEVAE(feature_dim=4, latent_dim=2, hidden_dim=16, num_layers=2, num_samples=10)
    return Example(net.model, net.guide, (x, t, y), elbo=TraceCausalEffect_ELBO())


EXAMPLES: dict[str, Callable[[Path], Example]] = {
    "vae": _vae,
    "vae, grey values as data": partial(_vae, grey=True),
    "ss_vae, y drawn": partial(_ss_vae, how="drawn"),
    "ss_vae, y enumerated": partial(_ss_vae, how="enumerated"),
    "ss_vae, y observed": partial(_ss_vae, how="labelled"),
    "cvae": cvae,
    "dmm": partial(_dmm, num_iafs=0),
    "dmm, two flows": partial(_dmm, num_iafs=2),
    "scanvi, y enumerated": partial(_scanvi, labelled=False),
    "scanvi, y observed": partial(_scanvi, labelled=True),
    "prodLDA": prod_lda,
    "air": air,
    "cevae": cevae,
}
