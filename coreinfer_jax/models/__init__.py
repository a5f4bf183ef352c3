"""The model families, one module each, and the one function that runs them."""

from coreinfer_jax.models.decoder import extend, unembed

__all__ = ["extend", "unembed"]
