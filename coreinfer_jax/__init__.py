"""CoreInfer in JAX: generate with only the MLP neurons a prompt needs (arXiv 2410.18311)."""

from coreinfer_jax.checkpoint import convert, load
from coreinfer_jax.config import CoreConfig, ModelConfig, Rope
from coreinfer_jax.core.compact import compact
from coreinfer_jax.core.neurons import CoreNeurons
from coreinfer_jax.core.select import select_core_neurons
from coreinfer_jax.errors import CoreInferError
from coreinfer_jax.generation import Chunk, Generation, Stats, generate, stream
from coreinfer_jax.params import Params
from coreinfer_jax.scoring import forward

__all__ = [
    "Chunk",
    "CoreConfig",
    "CoreInferError",
    "CoreNeurons",
    "Generation",
    "ModelConfig",
    "Params",
    "Rope",
    "Stats",
    "compact",
    "convert",
    "forward",
    "generate",
    "load",
    "select_core_neurons",
    "stream",
]
