"""Checkpoints: reading Hugging Face directories, converting them, writing and reading the native format."""

from coreinfer_jax.checkpoint.convert import convert
from coreinfer_jax.checkpoint.load import load

__all__ = ["convert", "load"]
