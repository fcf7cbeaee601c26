"""Diagnostics of a trained model and guide."""

from pyro_vae.diagnostics.usage import LatentUsage, latent_usage

__all__ = ["LatentUsage", "latent_usage"]
