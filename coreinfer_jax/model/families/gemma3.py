"""Gemma 3 for text (arXiv 2503.19786): Gemma 2 with norms for its caps, and another rotation in windowed layers."""

from typing import Any

from coreinfer_jax.errors import shown
from coreinfer_jax.model.config import ModelConfig
from coreinfer_jax.model.config_fields import ConfigFields, Fields, is_count
from coreinfer_jax.model.families import gemma2
from coreinfer_jax.model.family import GgufNames
from coreinfer_jax.model.rope_fields import ROPE_CHECKED, read_rope, rope_problems
from coreinfer_jax.model.rotary_decoder import rotary_family
from coreinfer_jax.model.rotary_fields import FULL, SLIDING, UNROTATED, WHOLE_HEADS
from coreinfer_jax.model.rotary_tables import (
    GGUF_FIELDS,
    GGUF_HEAD_NORMS,
    GGUF_SCALING,
    HEAD_NORMS,
    gguf_scaling,
)

_GLOBAL, _LOCAL = 1_000_000.0, 10_000.0


def _whole(fields: Fields) -> Fields:
    """The fields with the rotation of the layers that see all, in the spelling of the other families."""
    nested = fields.get("rope_parameters")
    return {**fields, "rope_parameters": nested.get(FULL)} if isinstance(nested, dict) else fields


def _windowed(fields: Fields) -> Fields:
    """The rotation of the layers with a window, in the same spelling."""
    nested = fields.get("rope_parameters")
    stated = {"rope_parameters": nested.get(SLIDING)} if isinstance(nested, dict) else {}
    return {**stated, **({"rope_theta": fields["rope_local_base_freq"]} if "rope_local_base_freq" in fields else {})}


def gemma3_rope_problems(fields: Fields) -> list[str]:
    """What is not implemented of both rotations, or contradicts itself."""
    nested = fields.get("rope_parameters", {})
    if not isinstance(nested, dict) or set(nested) - {FULL, SLIDING}:
        return [f"rope_parameters={shown(nested)} (give an object with {FULL!r} and {SLIDING!r})"]
    return [*rope_problems(_whole(fields)), *rope_problems(_windowed(fields), kinds=("default",))]


def gemma3_problems(fields: Fields) -> list[str]:
    """What is wrong with rotations, and whether both places that say which layers have a window say the same."""
    pattern, L = fields.get("sliding_window_pattern"), fields.get("num_hidden_layers")
    found = gemma3_rope_problems(fields)
    if is_count(pattern) and is_count(L) and fields.get("layer_types", types := _types(pattern, L)) != types:
        found.append(f"sliding_window_pattern={pattern} beside layer_types that say otherwise (keep one)")
    return found


def _types(pattern: int, L: int) -> list[str]:
    """The types of layers of which every one whose number is a multiple of `pattern` sees all."""
    return [SLIDING if (l + 1) % pattern else FULL for l in range(L)]


def read_config(fields: Fields) -> ModelConfig:
    """The model that a checked config.json describes."""
    return gemma2.read_gemma(
        {"max_position_embeddings": 131_072} | dict(_whole(fields)),
        "gemma3_text",
        _types(fields.get("sliding_window_pattern", 6), fields["num_hidden_layers"]),
        theta=_GLOBAL,
        local_rope=read_rope(_windowed(fields), _LOCAL),
        logit_cap=fields.get("final_logit_softcapping"),
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The fields of config.json that Gemma 3 has besides those of every family."""
    assert config.local_rope is not None, "a Gemma 3 model has a rotation for windowed layers"
    return {**gemma2.write_gemma(config), "rope_local_base_freq": config.local_rope.theta}


FAMILY = rotary_family(
    name="gemma3_text",
    architectures=("Gemma3ForCausalLM",),
    fields=UNROTATED.joined(WHOLE_HEADS)
    .joined(gemma2.OWN)
    .joined(
        ConfigFields(
            counts=("sliding_window_pattern",),
            numbers=("rope_local_base_freq",),
            # transformers states it beside `layer_types`, and reads nothing of it.
            fixed={"_sliding_window_pattern": 6, "attn_logit_softcapping": None},
            checked=ROPE_CHECKED,
            problems=gemma3_problems,
        )
    ),
    read_config=read_config,
    write_config=write_config,
    tensors=gemma2.NORMED_TENSORS | HEAD_NORMS,
    embed=gemma2.embed,
    gguf=GgufNames(
        architecture="gemma3",
        fields={
            **GGUF_FIELDS,
            "sliding_window": "attention.sliding_window",
            "rope_local_base_freq": "rope.freq_base_swa",
            "final_logit_softcapping": "final_logit_softcapping",
        },
        tensors=gemma2.NORMED_GGUF_TENSORS | GGUF_HEAD_NORMS,
        further_keys=GGUF_SCALING,
        further_fields=lambda facts: {**gguf_scaling(facts), **gemma2.scalar_of_size(facts, largest=62)},
        as_checkpoints=gemma2.norms_less_one(gemma2.NORMED_GGUF_TENSORS | GGUF_HEAD_NORMS),
    ),
)
