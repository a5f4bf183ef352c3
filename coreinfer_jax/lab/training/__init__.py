"""Training small models: the recipe behind the embedded ones."""

from coreinfer_jax.lab.training.recipe import Recipe
from coreinfer_jax.lab.training.trainer import train

__all__ = ["Recipe", "train"]
