"""Models to measure, by the name of their shape: published config.json fields, filled with random weights."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from coreinfer_jax.device import check_memory
from coreinfer_jax.errors import CoreInferError, shown
from coreinfer_jax.files import read_json
from coreinfer_jax.io.config_json import model_config
from coreinfer_jax.model.config import ModelConfig
from coreinfer_jax.model.structure import abstract_params
from coreinfer_jax.model.weights import Params, named_leaves, params_bytes, with_leaves

Fields = dict[str, Any]


def _opt(hidden: int, layers: int, heads: int, **other: object) -> Fields:
    sizes = {"hidden_size": hidden, "ffn_dim": 4 * hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    positions = {"vocab_size": 50272, "max_position_embeddings": 2048, "word_embed_proj_dim": hidden}
    return {"model_type": "opt", "architectures": ["OPTForCausalLM"], **sizes, **positions, **other}


def _llama(hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, vocabulary: int, **other: object) -> Fields:
    sizes = {"hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers}
    attention = {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    rest = {"vocab_size": vocabulary, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
    return {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **sizes, **attention, **rest, **other}


_LLAMA_31_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SHAPES: dict[str, Fields] = {
    "opt-125m": _opt(768, 12, 12),
    "opt-350m": _opt(1024, 24, 16, word_embed_proj_dim=512, do_layer_norm_before=False),
    "opt-1.3b": _opt(2048, 24, 32),
    "opt-2.7b": _opt(2560, 32, 32),
    "opt-6.7b": _opt(4096, 32, 32),
    "opt-13b": _opt(5120, 40, 40),
    "opt-30b": _opt(7168, 48, 56),
    "opt-66b": _opt(9216, 64, 72),
    "llama-1.1b": _llama(2048, 5632, 22, 32, 4, 32000),
    "llama-2-7b": _llama(4096, 11008, 32, 32, 32, 32000),
    "llama-2-70b": _llama(8192, 28672, 80, 64, 8, 32000),
    "llama-3.1-8b": _llama(
        4096,
        14336,
        32,
        32,
        8,
        128256,
        max_position_embeddings=131072,
        rope_theta=500000.0,
        rope_scaling=_LLAMA_31_ROPE,
    ),
    "llama-3.1-405b": _llama(
        16384,
        53248,
        126,
        128,
        8,
        128256,
        max_position_embeddings=131072,
        rope_theta=500000.0,
        rope_scaling=_LLAMA_31_ROPE,
    ),
    "smollm2-135m": _llama(
        576, 1536, 30, 9, 3, 49152, max_position_embeddings=8192, rope_theta=100000.0, tie_word_embeddings=True
    ),
}

# Values repeat after this many: as good as any for speed, and quick to make.
_BLOCK = 1 << 20


def shape_fields(model: str, layers: int | None) -> Fields:
    """config.json fields of a shape's name or a config.json file, cut to `layers` layers.

    Raises:
        CoreInferError: neither a name nor a readable file, or `layers` outside 1 .. the model's.
    """
    if model not in SHAPES and not Path(model).is_file():
        raise CoreInferError(f"--model {shown(model)}: give a config.json, or one of {', '.join(SHAPES)}")
    fields = SHAPES[model] if model in SHAPES else dict(read_json(Path(model)))
    whole = model_config(fields, model).num_layers
    if layers is not None and not 1 <= layers <= whole:
        raise CoreInferError(f"--layers {layers}: {model} has {whole}; give 1 to {whole}")
    return {**fields, "num_hidden_layers": layers or whole}


def shape_config(fields: Fields) -> ModelConfig:
    """Our config of `shape_fields`."""
    return model_config(fields, "the shape")


def random_prompts(config: ModelConfig, rows: int, tokens: int) -> np.ndarray:
    """Random tokens int32 [B, T], the same in every process."""
    return np.random.default_rng(0).integers(10, config.vocab_size - 10, (rows, tokens)).astype(np.int32)


def shape_params(config: ModelConfig, dtype: str) -> Params:
    """Random weights of standard deviation 0.02, norm scales 1, made on the device.

    Raises:
        CoreInferError: the device has no room for them.
    """
    shapes = abstract_params(config, jnp.dtype(dtype))
    remedy = "take fewer --layers, a 16-bit dtype or a smaller model"
    check_memory(params_bytes(shapes), f"weights of the model, as {dtype}", remedy)
    leaves = dict(named_leaves(shapes))
    return with_leaves(shapes, lambda name: _leaf(leaves[name].shape, leaves[name].dtype, name.endswith("norm.scale")))


@partial(jax.jit, static_argnames=("shape", "dtype", "ones"))
def _leaf(shape: tuple[int, ...], dtype: jnp.dtype, ones: bool) -> Array:
    if ones:
        return jnp.ones(shape, dtype)
    block = jax.random.normal(jax.random.key(0), (_BLOCK,), dtype) * jnp.asarray(0.02, dtype)
    return jnp.resize(block, shape)
