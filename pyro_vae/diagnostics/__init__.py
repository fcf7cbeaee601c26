"""Diagnostics of a trained model and guide."""

from pyro_vae.diagnostics.calibration import simulation_based_calibration
from pyro_vae.diagnostics.calibration_result import Calibration
from pyro_vae.diagnostics.coverage import Coverage, expected_coverage
from pyro_vae.diagnostics.doubt import doubtful_rows
from pyro_vae.diagnostics.doubt_table import DoubtfulRows
from pyro_vae.diagnostics.gaps import inference_gaps
from pyro_vae.diagnostics.gaps_result import InferenceGaps
from pyro_vae.diagnostics.leave_one_out import LeaveOneOut, leave_one_out, log_predictive
from pyro_vae.diagnostics.posterior_calibration import posterior_calibration
from pyro_vae.diagnostics.usage import LatentUsage, latent_usage

__all__ = [
    "Calibration",
    "Coverage",
    "DoubtfulRows",
    "InferenceGaps",
    "LatentUsage",
    "LeaveOneOut",
    "doubtful_rows",
    "expected_coverage",
    "inference_gaps",
    "latent_usage",
    "leave_one_out",
    "log_predictive",
    "posterior_calibration",
    "simulation_based_calibration",
]
