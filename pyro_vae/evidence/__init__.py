"""log p(x) of every data point of any pair, with an error bar and a verdict on it."""

from pyro_vae.evidence.adaptive import adaptive_importance_sampling
from pyro_vae.evidence.annealed import annealed_importance_sampling
from pyro_vae.evidence.bounds import Sandwich, sandwich
from pyro_vae.evidence.comparison import Comparison, compare
from pyro_vae.evidence.evidence import Evidence
from pyro_vae.evidence.importance import importance_sampling, prior_sampling
from pyro_vae.evidence.log_weights import pareto_khat

__all__ = [
    "Comparison",
    "Evidence",
    "Sandwich",
    "adaptive_importance_sampling",
    "annealed_importance_sampling",
    "compare",
    "importance_sampling",
    "pareto_khat",
    "prior_sampling",
    "sandwich",
]
