"""Training small models: the recipe behind the embedded ones."""

from coreinfer_jax.training.recipe import Recipe
from coreinfer_jax.training.run import train

__all__ = ["Recipe", "train"]
