"""Training any (model, guide) pair."""

from pyro_vae.training.loop import FitResult, fit

__all__ = ["FitResult", "fit"]
