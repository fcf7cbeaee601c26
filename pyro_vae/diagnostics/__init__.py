"""What a trained pair is worth."""

from pyro_vae.diagnostics.usage import LatentUsage, latent_usage

__all__ = ["LatentUsage", "latent_usage"]
