"""Variational autoencoders, as Pyro models and guides."""

from pyro_vae.models.stacking import fit_layers, stack
from pyro_vae.models.vae import VAE

__all__ = ["VAE", "fit_layers", "stack"]
