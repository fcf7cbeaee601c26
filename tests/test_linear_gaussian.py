"""The whole way on real data, against a closed form: a linear VAE is probabilistic PCA (Lucas et al. 2019)."""

import numpy as np
import pytest
import torch
from pyro.infer import TraceMeanField_ELBO
from truths import linear_vae, linear_vae_log_evidence

from pyro_vae import fit, importance_sampling


@pytest.fixture(scope="module")
def digits():
    datasets = pytest.importorskip("sklearn.datasets")
    return datasets.load_digits().data.astype(np.float32) / 16


def test_linear_vae_on_digits_reaches_probabilistic_pca(digits, device):
    """Exact log p(x) within 0.01 nats of PCA(8).score, whose maximum likelihood is in closed form; and the evidence of
    every row by importance sampling within 5 standard errors of the exact one."""
    from sklearn.decomposition import PCA

    best = PCA(n_components=8).fit(digits.astype(np.float64)).score(digits.astype(np.float64))
    vae = linear_vae(8, 64).to(device)
    vae.likelihood.head.bias.data = torch.tensor(digits.mean(0), device=device)
    fit(
        vae.model, vae.guide, digits, num_epochs=200, batch_size=50, learning_rate=0.03, seed=0,
        loss=TraceMeanField_ELBO(),
        scheduler=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 200),
    )  # fmt: skip
    x = torch.tensor(digits, device=device)
    exact = linear_vae_log_evidence(vae, x)
    assert abs(exact.mean().item() - best) < 0.01
    evidence = importance_sampling(vae.model, vae.guide, x, num_particles=2000)
    z = (evidence.log_evidence - exact) / evidence.standard_error
    assert z.abs().max() < 5
    assert z.abs().median() > 0.1  # the error bars are not merely wide
    assert evidence.doubtful.float().mean() < 0.02
