"""LLaMA 1, 2, 3, 3.1, 3.2 (arXiv 2302.13971, 2407.21783): RoPE, RMSNorm, grouped-query attention, gated MLP."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from coreinfer_jax.errors import CoreInferError
from coreinfer_jax.model.config import ModelConfig, Rope
from coreinfer_jax.model.config_fields import ConfigFields, Fields
from coreinfer_jax.model.family import GgufFacts
from coreinfer_jax.model.layers import rope_frequencies
from coreinfer_jax.model.rotary_decoder import rotary_family
from coreinfer_jax.model.rotary_fields import SHARED, read_shared, write_shared
from coreinfer_jax.model.rotary_tables import (
    ATTENTION,
    GGUF_TENSORS,
    MLP,
    TENSORS,
    biases,
    gguf_scaling,
    rotary_gguf,
)


def read_config(fields: Fields) -> ModelConfig:
    """The model that a checked config.json describes."""
    own = {name: fields.get(name, False) for name in ("attention_bias", "mlp_bias")}
    return read_shared(fields, "llama", **own)


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The fields of config.json that LLaMA has besides those of every family."""
    return {**write_shared(config), "attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}


# LLaMA 3.1 and 3.2 scale rotation by parts. GGUF files hold the divisors of the frequencies, not what they were made
# from.
_DIVISORS = "rope_freqs.weight"
_LLAMA3 = [
    {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    | {"original_max_position_embeddings": 8192}
    for factor in (8.0, 32.0)
]


def scaling_by_divisors(facts: GgufFacts) -> dict[str, Any]:
    """`rope_scaling` of config.json, of a GGUF file's tensor with a divisor for each pair, else of its metadata."""
    divisors = facts.tensor(_DIVISORS)
    if divisors is None:
        return gguf_scaling(facts)
    H, theta = 2 * divisors.shape[0], float(facts.fields.get("rope_theta", 10_000.0))
    for scaling in _LLAMA3:
        if np.allclose(_divisors(H, theta, scaling), divisors, rtol=1e-4):
            return {"rope_scaling": scaling}
    raise CoreInferError(f"not implemented: rotation scaled by a {_DIVISORS} of no known model")


def _divisors(head_size: int, theta: float, scaling: Mapping[str, Any]) -> np.ndarray:
    numbers = {name: scaling[name] for name in ("factor", "low_freq_factor", "high_freq_factor")}
    scaled = Rope(theta, scaling="llama3", original_max_positions=8192, **numbers)
    quotient: np.ndarray = rope_frequencies(head_size, Rope(theta)) / rope_frequencies(head_size, scaled)
    return quotient


def _from_pairs(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of heads that GGUF files order by rotated pairs, (0, H/2), (1, H/2 + 1) and so on."""
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)


def _queries(rows: np.ndarray, config: ModelConfig) -> np.ndarray:
    return _from_pairs(rows, config.num_heads)


def _keys(rows: np.ndarray, config: ModelConfig) -> np.ndarray:
    return _from_pairs(rows, config.num_kv_heads)


FROM_PAIRS = {
    f"layers.{{l}}.attention.{name}.{part}": order
    for name, order in (("query", _queries), ("key", _keys))
    for part in ("weight", "bias")
}

FAMILY = rotary_family(
    name="llama",
    architectures=("LlamaForCausalLM", "LLaMAForCausalLM"),
    fields=SHARED.joined(ConfigFields(switches=("attention_bias", "mlp_bias"))),
    read_config=read_config,
    write_config=write_config,
    tensors=TENSORS | biases(TENSORS, *ATTENTION, *MLP),
    gguf=rotary_gguf(
        architecture="llama",
        tensors=GGUF_TENSORS | biases(GGUF_TENSORS, *ATTENTION, *MLP),
        further_tensors=(_DIVISORS,),
        further_fields=scaling_by_divisors,
        others=("bamboo", "turbosparse"),  # whose MLP has a ReLU on both sides
        as_checkpoints=FROM_PAIRS,
    ),
)
