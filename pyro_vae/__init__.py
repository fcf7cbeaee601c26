"""Variational autoencoders as a first-class part of Bayesian modelling in Pyro.

Two nouns: a conditional distribution goes in (`pyro_vae.distributions`), particles come out (`draw_particles`). Between
them stands any Pyro (model, guide) pair, of which `VAE` writes one. ArviZ and matplotlib are imported only when used.
"""

from typing import Any

from pyro_vae.adaptation import adaptive_importance_sampling
from pyro_vae.annealing import annealed_importance_sampling
from pyro_vae.beta import BetaELBO
from pyro_vae.comparison import Comparison, compare
from pyro_vae.compiled import CompiledELBO
from pyro_vae.denoising import DenoisingELBO
from pyro_vae.diagnostics import LatentUsage, latent_usage
from pyro_vae.evidence import Evidence
from pyro_vae.importance import importance_sampling, prior_sampling
from pyro_vae.imputation import impute
from pyro_vae.objectives import ImportanceWeightedELBO
from pyro_vae.particles import Particles, draw_particles
from pyro_vae.sandwich import Sandwich, sandwich, simulate
from pyro_vae.stacking import fit_layers, stack
from pyro_vae.training import FitResult, fit
from pyro_vae.vae import VAE

__version__ = "0.1.0"
__all__ = [
    "VAE",
    "BetaELBO",
    "Comparison",
    "CompiledELBO",
    "DenoisingELBO",
    "Evidence",
    "FitResult",
    "ImportanceWeightedELBO",
    "LatentUsage",
    "Particles",
    "Sandwich",
    "adaptive_importance_sampling",
    "annealed_importance_sampling",
    "compare",
    "draw_particles",
    "fit",
    "fit_layers",
    "from_pyro",
    "from_pyro_svi",
    "importance_sampling",
    "impute",
    "latent_usage",
    "prior_sampling",
    "sandwich",
    "simulate",
    "stack",
]


def __getattr__(name: str) -> Any:
    if name in ("from_pyro", "from_pyro_svi"):  # these import ArviZ
        from pyro_vae import io_arviz

        return getattr(io_arviz, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
