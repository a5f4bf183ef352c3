"""Qwen3 (arXiv 2505.09388), its dense models: LLaMA with RMSNorm of every head's queries and keys."""

from typing import Any

from coreinfer_jax.model import rotary_decoder as decoder
from coreinfer_jax.model.config import ModelConfig
from coreinfer_jax.model.config_fields import ConfigFields, Fields
from coreinfer_jax.model.families.qwen2 import WINDOWS, read_windows, write_windows
from coreinfer_jax.model.family import Family, GgufNames
from coreinfer_jax.model.rotary_fields import SHARED, read_shared, write_shared
from coreinfer_jax.model.rotary_tables import (
    ATTENTION,
    GGUF_FIELDS,
    GGUF_HEAD_NORMS,
    GGUF_SCALING,
    GGUF_TENSORS,
    HEAD_NORMS,
    IGNORED_TENSORS,
    TENSORS,
    biases,
    gguf_scaling,
)


def read_config(fields: Fields) -> ModelConfig:
    """The model that a checked config.json describes."""
    stated = {"max_position_embeddings": 32_768, "head_dim": 128} | dict(fields)
    bias = fields.get("attention_bias", False)
    return read_shared(stated, "qwen3", attention_bias=bias, windows=read_windows(fields))


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The fields of config.json that Qwen3 has besides those of every family."""
    return {**write_shared(config), **write_windows(config), "attention_bias": config.attention_bias}


FAMILY = Family(
    name="qwen3",
    architectures=("Qwen3ForCausalLM",),
    fields=SHARED.joined(WINDOWS).joined(ConfigFields(switches=("attention_bias",))),
    read_config=read_config,
    write_config=write_config,
    tensors=TENSORS | HEAD_NORMS | biases(TENSORS, *ATTENTION),
    ignored_tensors=IGNORED_TENSORS,
    embed=decoder.embed,
    block=decoder.block,
    finish=decoder.finish,
    gguf=GgufNames(
        architecture="qwen3",
        fields=GGUF_FIELDS,
        tensors=GGUF_TENSORS | GGUF_HEAD_NORMS | biases(GGUF_TENSORS, *ATTENTION),
        further_keys=GGUF_SCALING,
        further_fields=gguf_scaling,
    ),
)
