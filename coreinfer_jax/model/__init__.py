"""The model: what it is, its weights, its layers, and the one function that runs them."""

from coreinfer_jax.model.decoder import Edit, Observe, extend, observe_nothing, unembed
from coreinfer_jax.model.layers import MlpPass

__all__ = ["Edit", "MlpPass", "Observe", "extend", "observe_nothing", "unembed"]
