"""Files that can be believed: written whole or not at all, and looked at as a whole before anything is changed."""

from pyro_vae.checkpoint.container import read, write
from pyro_vae.checkpoint.weights import load_weights, save_weights

__all__ = ["load_weights", "read", "save_weights", "write"]
