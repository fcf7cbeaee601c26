"""log p(x) of every data point of any pair, with an error bar and a verdict on it."""

from pyro_vae.evidence.adaptive import adaptive_importance_sampling
from pyro_vae.evidence.annealed import annealed_importance_sampling
from pyro_vae.evidence.bounds import Sandwich, sandwich
from pyro_vae.evidence.comparison import Comparison, compare
from pyro_vae.evidence.evidence import Evidence
from pyro_vae.evidence.importance import importance_sampling, prior_sampling
from pyro_vae.evidence.integrated import LogLikelihood, integrated_log_likelihood
from pyro_vae.evidence.log_weights import pareto_khat
from pyro_vae.evidence.posterior import PosteriorDraws, draw_posterior
from pyro_vae.evidence.refined_guide import RefinedGuide
from pyro_vae.evidence.refinement import refine

__all__ = [
    "Comparison",
    "Evidence",
    "LogLikelihood",
    "PosteriorDraws",
    "RefinedGuide",
    "Sandwich",
    "adaptive_importance_sampling",
    "annealed_importance_sampling",
    "compare",
    "draw_posterior",
    "importance_sampling",
    "integrated_log_likelihood",
    "pareto_khat",
    "prior_sampling",
    "refine",
    "sandwich",
]
