"""Diagnostics of a trained model and guide."""

from pyro_vae.diagnostics.leave_one_out import LeaveOneOut, leave_one_out, log_predictive
from pyro_vae.diagnostics.usage import LatentUsage, latent_usage

__all__ = ["LatentUsage", "LeaveOneOut", "latent_usage", "leave_one_out", "log_predictive"]
