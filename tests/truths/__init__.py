"""Models whose log p(x) is known: in closed form, by quadrature, by enumeration."""

from truths.linear_gaussian import LinearGaussian
from truths.one_latent import exact_log_evidence, exact_pair
from truths.vaes import (
    coupled,
    exact_vae,
    inverse_positive,
    linear_vae,
    linear_vae_log_evidence,
    quadrature,
    set_linear,
    small_vae,
)

__all__ = [
    "LinearGaussian",
    "coupled",
    "exact_log_evidence",
    "exact_pair",
    "exact_vae",
    "inverse_positive",
    "linear_vae",
    "linear_vae_log_evidence",
    "quadrature",
    "set_linear",
    "small_vae",
]
