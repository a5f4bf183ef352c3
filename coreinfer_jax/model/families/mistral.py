"""Mistral 7B (arXiv 2310.06825) and Nemo: LLaMA without biases, in early releases with a sliding window."""

from typing import Any

from coreinfer_jax.model.config import ModelConfig
from coreinfer_jax.model.config_fields import ConfigFields, Fields
from coreinfer_jax.model.rotary_decoder import rotary_family
from coreinfer_jax.model.rotary_fields import (
    SHARED,
    SLIDING,
    layer_problems,
    read_shared,
    window_of,
    windows_of,
    write_shared,
)
from coreinfer_jax.model.rotary_tables import TENSORS

FIELDS = SHARED.joined(
    ConfigFields(
        required=("num_key_value_heads",),  # absent, they are 8, whatever the size
        counts=("sliding_window",),
        nullable=("sliding_window",),
        fixed={"attention_bias": False, "mlp_bias": False},
        problems=layer_problems,
    )
)


def read_config(fields: Fields) -> ModelConfig:
    """The model that a checked config.json describes. Absent, the window is 4096; null, there is none."""
    types = [SLIDING] * fields["num_hidden_layers"]
    stated = {"max_position_embeddings": 131_072} | dict(fields)
    return read_shared(stated, "mistral", windows=windows_of(types, fields.get("sliding_window", 4096)))


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The fields of config.json that Mistral has besides those of every family."""
    return {**write_shared(config), "sliding_window": window_of(config)}


FAMILY = rotary_family(
    name="mistral",
    architectures=("MistralForCausalLM",),
    fields=FIELDS,
    read_config=read_config,
    write_config=write_config,
    tensors=TENSORS,
    # GGUF files of Mistral say that they are LLaMA.
)
