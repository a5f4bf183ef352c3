"""Checkpoints: reading Hugging Face directories, converting them, writing and reading the native format."""

from coreinfer_jax.io.conversion import convert
from coreinfer_jax.io.loading import load

__all__ = ["convert", "load"]
