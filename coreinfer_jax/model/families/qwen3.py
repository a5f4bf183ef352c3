"""Qwen3 (arXiv 2505.09388), its dense models: LLaMA with RMSNorm of every head's queries and keys."""

from typing import Any

from coreinfer_jax.model.config import ModelConfig
from coreinfer_jax.model.config_fields import ConfigFields, Fields
from coreinfer_jax.model.families.qwen2 import WINDOWS, read_windows, write_windows
from coreinfer_jax.model.rotary_decoder import rotary_family
from coreinfer_jax.model.rotary_fields import SHARED, read_shared, write_shared
from coreinfer_jax.model.rotary_tables import (
    ATTENTION,
    GGUF_HEAD_NORMS,
    GGUF_TENSORS,
    HEAD_NORMS,
    TENSORS,
    biases,
    rotary_gguf,
)


def read_config(fields: Fields) -> ModelConfig:
    """The model that a checked config.json describes."""
    stated = {"max_position_embeddings": 32_768, "head_dim": 128} | dict(fields)
    bias = fields.get("attention_bias", False)
    return read_shared(stated, "qwen3", attention_bias=bias, windows=read_windows(fields))


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The fields of config.json that Qwen3 has besides those of every family."""
    return {**write_shared(config), **write_windows(config), "attention_bias": config.attention_bias}


FAMILY = rotary_family(
    name="qwen3",
    architectures=("Qwen3ForCausalLM",),
    fields=SHARED.joined(WINDOWS).joined(ConfigFields(switches=("attention_bias",))),
    read_config=read_config,
    write_config=write_config,
    tensors=TENSORS | HEAD_NORMS | biases(TENSORS, *ATTENTION),
    gguf=rotary_gguf(
        architecture="qwen3",
        tensors=GGUF_TENSORS | GGUF_HEAD_NORMS | biases(GGUF_TENSORS, *ATTENTION),
    ),
)
