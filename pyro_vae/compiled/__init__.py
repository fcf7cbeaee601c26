"""One compiled graph out of any `pyro.infer.ELBO` of any pair."""

from pyro_vae.compiled.elbo import CompiledELBO

__all__ = ["CompiledELBO"]
