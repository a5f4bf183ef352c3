"""Phi-3 and Phi-4 (arXiv 2404.14219, 2503.01743), the dense models: LLaMA whose projections are stored together."""

from collections.abc import Mapping
from typing import Any

from coreinfer_jax.model.config import ModelConfig
from coreinfer_jax.model.config_fields import ConfigFields, Fields
from coreinfer_jax.model.family import GgufFacts, GgufNames
from coreinfer_jax.model.rope_fields import ROPE_FIELDS, rope_problems
from coreinfer_jax.model.rotary_decoder import rotary_family
from coreinfer_jax.model.rotary_fields import (
    SLIDING,
    UNROTATED,
    layer_problems,
    read_shared,
    window_of,
    windows_of,
    write_shared,
)
from coreinfer_jax.model.rotary_tables import GGUF_FIELDS, GGUF_TENSORS, TENSORS

# Published files name the code that came with them; it computes what transformers' own does.
_CODE = {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}
_PARTS = ("attention.query", "attention.key", "attention.value", "mlp.gate", "mlp.up")


def phi3_problems(fields: Fields) -> list[str]:
    """What is not implemented of rotation and layers, or contradicts itself."""
    return [*layer_problems(fields), *rope_problems(fields, kinds=("default", "longrope"), is_partial=True)]


FIELDS = UNROTATED.joined(
    ConfigFields(
        counts=("sliding_window", "original_max_position_embeddings"),
        numbers=("partial_rotary_factor",),
        fixed={"attention_bias": False, "mlp_bias": False, "lm_head_bias": False, "auto_map": _CODE}
        | {"full_attn_mod": 1, "interpolate_factor": 1},
        checked=ROPE_FIELDS,
        problems=phi3_problems,
    )
)


def read_config(fields: Fields) -> ModelConfig:
    """The model that a checked config.json describes."""
    stated = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5} | dict(fields)
    types = [SLIDING] * fields["num_hidden_layers"]
    return read_shared(stated, "phi3", windows=windows_of(types, fields.get("sliding_window")))


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The fields of config.json that Phi-3 has besides those of every family."""
    assert config.rope is not None, "a Phi-3 model has rotary positions"
    is_scaled = config.rope.scaling == "longrope"
    return {
        **write_shared(config),
        "sliding_window": window_of(config),
        "original_max_position_embeddings": config.rope.original_max_positions if is_scaled else None,
    }


def _with_joined(tensors: Mapping[str, str], attention: str, mlp: str) -> dict[str, str]:
    """The table with the projections that are stored as the rows of one tensor."""
    joined = {f"layers.{{l}}.{part}.weight": mlp if part.startswith("mlp.") else attention for part in _PARTS}
    return {**tensors, **joined}


def gguf_rope(facts: GgufFacts) -> dict[str, Any]:
    """The fields of rotation, and the window, which a file that has none calls 0."""
    D, N = (facts.fields.get(name) for name in ("hidden_size", "num_attention_heads"))
    H = D // N if D and N else 0
    turned, window = facts.metadata.get("rope.dimension_count"), facts.metadata.get("attention.sliding_window")
    stated: dict[str, Any] = {"sliding_window": window} if window else {}
    if H and turned != H and turned is not None:
        stated["partial_rotary_factor"] = turned / H
    short, long = facts.tensor("rope_factors_short.weight"), facts.tensor("rope_factors_long.weight")
    if short is None or long is None:
        return stated
    scaling = {"rope_type": "longrope", "short_factor": short.tolist(), "long_factor": long.tolist()}
    return {
        **stated,
        "rope_scaling": scaling | {"attention_factor": facts.metadata.get("rope.scaling.attn_factor")},
        "original_max_position_embeddings": facts.metadata.get("rope.scaling.original_context_length"),
    }


FAMILY = rotary_family(
    name="phi3",
    architectures=("Phi3ForCausalLM",),
    fields=FIELDS,
    read_config=read_config,
    write_config=write_config,
    tensors=_with_joined(TENSORS, "layers.{l}.self_attn.qkv_proj.weight", "layers.{l}.mlp.gate_up_proj.weight"),
    gguf=GgufNames(
        architecture="phi3",
        fields=GGUF_FIELDS,
        tensors=_with_joined(GGUF_TENSORS, "blk.{l}.attn_qkv.weight", "blk.{l}.ffn_up.weight"),
        further_keys=(
            "rope.dimension_count",
            "rope.scaling.attn_factor",
            "rope.scaling.original_context_length",
            "attention.sliding_window",
        ),
        further_tensors=("rope_factors_short.weight", "rope_factors_long.weight"),
        further_fields=gguf_rope,
    ),
)
