"""Diagnostics of a trained model and guide."""

from pyro_vae.diagnostics.doubt import DoubtfulRows, doubtful_rows
from pyro_vae.diagnostics.gaps import InferenceGaps, inference_gaps
from pyro_vae.diagnostics.leave_one_out import LeaveOneOut, leave_one_out, log_predictive
from pyro_vae.diagnostics.usage import LatentUsage, latent_usage

__all__ = [
    "DoubtfulRows",
    "InferenceGaps",
    "LatentUsage",
    "LeaveOneOut",
    "doubtful_rows",
    "inference_gaps",
    "latent_usage",
    "leave_one_out",
    "log_predictive",
]
