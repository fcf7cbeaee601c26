"""Guides for any model: q(z|x) of each data point read off its row by a network."""

from pyro_vae.guides.amortized import AmortizedFlow, AmortizedMultivariateNormal, AmortizedNormal

__all__ = ["AmortizedFlow", "AmortizedMultivariateNormal", "AmortizedNormal"]
