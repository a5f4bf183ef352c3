"""The model families, one module each, and the one function that runs them."""

from coreinfer_jax.models.decoder import Edit, extend, observe_nothing, unembed

__all__ = ["Edit", "extend", "observe_nothing", "unembed"]
