"""The model: what it is, its weights, its layers, and the one function that runs them."""

from coreinfer_jax.model.decoder import Edit, Observe, extend, observe_nothing, unembed

__all__ = ["Edit", "Observe", "extend", "observe_nothing", "unembed"]
