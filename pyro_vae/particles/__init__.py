"""Particles: K weighted draws for each of N data points, from any (model, guide) pair."""

from pyro_vae.particles.draw import draw_particles
from pyro_vae.particles.imputation import impute
from pyro_vae.particles.particles import Particles
from pyro_vae.particles.simulation import Simulation, simulate

__all__ = ["Particles", "Simulation", "draw_particles", "impute", "simulate"]
