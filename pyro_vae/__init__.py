"""Variational autoencoders as a first-class part of Bayesian modelling in Pyro.

Two nouns: a conditional distribution goes in (`pyro_vae.distributions`), particles come out (`draw_particles`). Between
them stands any Pyro (model, guide) pair, of which `VAE` writes one. ArviZ and matplotlib are imported only when used.
"""

from typing import Any

from pyro_vae.compiled import CompiledELBO
from pyro_vae.diagnostics import LatentUsage, latent_usage
from pyro_vae.evidence import (
    Comparison,
    Evidence,
    Sandwich,
    adaptive_importance_sampling,
    annealed_importance_sampling,
    compare,
    draw_posterior,
    importance_sampling,
    integrated_log_likelihood,
    prior_sampling,
    refine,
    sandwich,
)
from pyro_vae.models import VAE, fit_layers, stack
from pyro_vae.objectives import BetaELBO, CombinedELBO, DenoisingELBO, ForwardKL, ImportanceWeightedELBO
from pyro_vae.particles import Particles, draw_particles, impute, simulate
from pyro_vae.training import FitResult, fit

__version__ = "0.1.0"
__all__ = [
    "VAE",
    "BetaELBO",
    "CombinedELBO",
    "Comparison",
    "CompiledELBO",
    "DenoisingELBO",
    "Evidence",
    "FitResult",
    "ForwardKL",
    "ImportanceWeightedELBO",
    "LatentUsage",
    "Particles",
    "Sandwich",
    "adaptive_importance_sampling",
    "annealed_importance_sampling",
    "compare",
    "draw_particles",
    "draw_posterior",
    "fit",
    "fit_layers",
    "from_pyro",
    "from_pyro_svi",
    "importance_sampling",
    "impute",
    "integrated_log_likelihood",
    "latent_usage",
    "prior_sampling",
    "refine",
    "sandwich",
    "simulate",
    "stack",
]


def __getattr__(name: str) -> Any:
    if name in ("from_pyro", "from_pyro_svi"):  # these import ArviZ
        from pyro_vae.integrations import arviz

        return getattr(arviz, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
