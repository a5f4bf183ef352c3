"""A short name for a model's weights, to tell whether two files were made for the same model."""

import hashlib
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from coreinfer_jax.model.config import ModelConfig
from coreinfer_jax.model.host import on_hand
from coreinfer_jax.model.weights import Params, named_leaves

SAMPLE = 1 << 16
_MATRICES = ("attention.query.weight", "mlp.up.weight", "mlp.down.weight")


def fingerprint(params: Params) -> str:
    """The fingerprint of `params`: 16 hexadecimal digits."""
    leaves = dict(named_leaves(params))
    return fingerprint_of(params.config, lambda name: np.asarray(thinned(on_hand(leaves[name]))))


def fingerprint_of(config: ModelConfig, sampled: Callable[[str], np.ndarray]) -> str:
    """The fingerprint of the model whose leaves `sampled` gives by name, `thinned`.

    A digest of the sizes and of up to 65536 evenly spaced entries each of three matrices in the first, the middle
    and the last layer, rounded to bfloat16: the same for a checkpoint in float32 and its bfloat16 copy, and computed
    without reading a large model through. It tells models apart; it does not prove that nothing was tampered with.
    """
    sizes = (config.family, config.vocab_size, config.hidden_size, config.mlp_size, config.num_layers)
    digest = hashlib.sha256(repr(sizes).encode())
    for layer in sorted({0, config.num_layers // 2, config.num_layers - 1}):
        for matrix in _MATRICES:
            digest.update(sampled(f"layers.{layer}.{matrix}").astype(ml_dtypes.bfloat16).tobytes())
    return digest.hexdigest()[:16]


def thinned(array: Any) -> Any:
    """The entries [n] of a whole leaf, of NumPy or JAX, that `fingerprint_of` looks at."""
    return array.reshape(-1)[:: max(1, -(-array.size // SAMPLE))]
