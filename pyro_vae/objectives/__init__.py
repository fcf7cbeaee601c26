"""Objectives that Pyro lacks. Each is a `pyro.infer.ELBO`, for `pyro.infer.SVI(…, loss=…)` and for `fit(…, loss=…)`."""

from pyro_vae.objectives.beta import BetaELBO
from pyro_vae.objectives.combined import CombinedELBO
from pyro_vae.objectives.denoising import DenoisingELBO, gaussian_noise, masking_noise, salt_and_pepper_noise
from pyro_vae.objectives.forward_kl import ForwardKL
from pyro_vae.objectives.importance_weighted import ImportanceWeightedELBO
from pyro_vae.objectives.schedules import cyclical, linear

__all__ = [
    "BetaELBO",
    "CombinedELBO",
    "DenoisingELBO",
    "ForwardKL",
    "ImportanceWeightedELBO",
    "cyclical",
    "gaussian_noise",
    "linear",
    "masking_noise",
    "salt_and_pepper_noise",
]
