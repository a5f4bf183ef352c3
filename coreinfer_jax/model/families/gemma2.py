"""Gemma 2 (arXiv 2408.00118): GeGLU, norms before and after each part, soft caps, every second layer with a window."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from coreinfer_jax.errors import shown
from coreinfer_jax.model import rotary_decoder as decoder
from coreinfer_jax.model.config import ModelConfig
from coreinfer_jax.model.config_fields import ConfigFields, Fields
from coreinfer_jax.model.family import GgufFacts, GgufNames
from coreinfer_jax.model.layers import LayerContext
from coreinfer_jax.model.rotary_decoder import rotary_family
from coreinfer_jax.model.rotary_fields import (
    ACTIVATIONS,
    FULL,
    SHARED,
    SLIDING,
    activation_name,
    activation_problems,
    layer_problems,
    layer_types,
    read_shared,
    window_of,
    windows_of,
    write_shared,
)
from coreinfer_jax.model.rotary_tables import (
    ATTENTION,
    GGUF_FIELDS,
    GGUF_SCALING,
    GGUF_TENSORS,
    TENSORS,
    biases,
    gguf_scaling,
)
from coreinfer_jax.model.weights import Params

GELU = "gelu_pytorch_tanh"


def gemma_problems(fields: Fields) -> list[str]:
    """What is wrong with the fields that Gemma 2 and 3 have."""
    activation, window = fields.get("hidden_activation", GELU), fields.get("sliding_window", 4096)
    found = [*activation_problems({"hidden_activation": activation}, "hidden_activation"), *layer_problems(fields)]
    for name, beside, meant in (
        ("hidden_act", "hidden_activation", activation),
        ("sliding_window_size", "sliding_window", window),
    ):
        if name in fields and fields[name] != meant:
            found.append(f"{name}={shown(fields[name])} beside {beside}={shown(meant)}")
    return found if window is not None else [*found, "sliding_window=None"]


# What Gemma 2 and 3 know beside the fields that their relatives share.
OWN = ConfigFields(
    required=("num_key_value_heads", "head_dim"),  # absent, they are 4 and 256, whatever the size
    counts=("sliding_window", "query_pre_attn_scalar"),
    nullable=("sliding_window",),
    switches=("attention_bias",),
    numbers=("final_logit_softcapping",),
    fixed={"use_bidirectional_attention": False},
    checked=("hidden_activation", "layer_types", "sliding_window_size"),
    problems=gemma_problems,
)


def read_gemma(fields: Fields, family: str, types: Sequence[str], **own: Any) -> ModelConfig:
    """The model that a checked config.json of Gemma 2 or 3 describes, `types` where it states no `layer_types`."""
    return read_shared(
        {"tie_word_embeddings": True} | dict(fields),
        family,
        activation=ACTIVATIONS[fields.get("hidden_activation", GELU)],
        attention_bias=fields.get("attention_bias", False),
        windows=windows_of(fields.get("layer_types", types), fields.get("sliding_window", 4096)),
        query_scalar=fields.get("query_pre_attn_scalar", 256),
        norm_plus_one=True,
        **own,
    )


def write_gemma(config: ModelConfig) -> dict[str, Any]:
    """The fields of config.json that Gemma 2 and 3 have besides those of every family."""
    return {
        **write_shared(config),
        "hidden_activation": activation_name(config),
        "attention_bias": config.attention_bias,
        "query_pre_attn_scalar": config.query_scalar,
        "final_logit_softcapping": config.logit_cap,
        "layer_types": layer_types(config),
        "sliding_window": window_of(config) or 4096,
    }


def read_config(fields: Fields) -> ModelConfig:
    """The model that a checked config.json describes. Absent, the caps are 50 and 30; null, there are none."""
    return read_gemma(
        {"max_position_embeddings": 8192} | dict(fields),
        "gemma2",
        [FULL if l % 2 else SLIDING for l in range(fields["num_hidden_layers"])],
        score_cap=fields.get("attn_logit_softcapping", 50.0),
        logit_cap=fields.get("final_logit_softcapping", 30.0),
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The fields of config.json that Gemma 2 has besides those of every family."""
    return {**write_gemma(config), "attn_logit_softcapping": config.score_cap}


def embed(params: Params, tokens: Array, positions: Array, capacity: int) -> tuple[Array, tuple[LayerContext, ...]]:
    """As its relatives do, times the square root of D, rounded to the model's dtype."""
    x, contexts = decoder.embed(params, tokens, positions, capacity)
    return x * jnp.asarray(params.config.hidden_size**0.5, x.dtype), contexts


NORMED_TENSORS = {
    **TENSORS,
    **biases(TENSORS, *ATTENTION),
    "layers.{l}.attention_out_norm.scale": "layers.{l}.post_attention_layernorm.weight",
    "layers.{l}.mlp_norm.scale": "layers.{l}.pre_feedforward_layernorm.weight",
    "layers.{l}.mlp_out_norm.scale": "layers.{l}.post_feedforward_layernorm.weight",
}
NORMED_GGUF_TENSORS = {
    **GGUF_TENSORS,
    **biases(GGUF_TENSORS, *ATTENTION),
    "layers.{l}.attention_out_norm.scale": "blk.{l}.post_attention_norm.weight",
    "layers.{l}.mlp_out_norm.scale": "blk.{l}.post_ffw_norm.weight",
}


def norms_less_one(tensors: Mapping[str, str]) -> dict[str, Callable[[np.ndarray, ModelConfig], np.ndarray]]:
    """What is to be done to those of `tensors` that are scales of norms: GGUF files add 1 to them."""
    return {leaf: _less_one for leaf in tensors if leaf.endswith("norm.scale")}


def _less_one(stored: np.ndarray, config: ModelConfig) -> np.ndarray:
    return stored - np.asarray(1, stored.dtype)


def scalar_of_size(facts: GgufFacts, largest: int) -> dict[str, Any]:
    """`query_pre_attn_scalar`, which no file states: D/N in the model of `largest` layers, 27B, and H in all others."""
    D, N, L = (facts.fields.get(name) for name in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    H = facts.metadata.get("attention.key_length")
    return {"query_pre_attn_scalar": D // N if largest == L and D and N else H}


FAMILY = rotary_family(
    name="gemma2",
    architectures=("Gemma2ForCausalLM",),
    fields=SHARED.joined(OWN).joined(
        ConfigFields(
            numbers=("attn_logit_softcapping",), nullable=("attn_logit_softcapping", "final_logit_softcapping")
        )
    ),
    read_config=read_config,
    write_config=write_config,
    tensors=NORMED_TENSORS,
    embed=embed,
    gguf=GgufNames(
        architecture="gemma2",
        fields={
            **GGUF_FIELDS,
            "sliding_window": "attention.sliding_window",
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
        },
        tensors=NORMED_GGUF_TENSORS,
        further_keys=GGUF_SCALING,
        further_fields=lambda facts: {**gguf_scaling(facts), **scalar_of_size(facts, largest=46)},
        as_checkpoints=norms_less_one(NORMED_GGUF_TENSORS),
    ),
)
