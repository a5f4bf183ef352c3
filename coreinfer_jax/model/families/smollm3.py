"""SmolLM3: LLaMA of which every fourth layer does not rotate queries and keys."""

from collections.abc import Mapping
from typing import Any

from coreinfer_jax.errors import shown
from coreinfer_jax.model.config import ModelConfig
from coreinfer_jax.model.config_fields import ConfigFields, Fields, is_count
from coreinfer_jax.model.families.llama import FROM_PAIRS
from coreinfer_jax.model.rotary_decoder import rotary_family
from coreinfer_jax.model.rotary_fields import (
    FULL,
    SHARED,
    SLIDING,
    layer_problems,
    layer_types,
    read_shared,
    window_of,
    window_problems,
    windows_of,
    write_shared,
)
from coreinfer_jax.model.rotary_tables import (
    ATTENTION,
    GGUF_TENSORS,
    MLP,
    TENSORS,
    biases,
    rotary_gguf,
)

_INTERVAL = 4


def smollm3_problems(fields: Fields) -> list[str]:
    """What is wrong with the lists of layers."""
    given, L = fields.get("no_rope_layers"), fields.get("num_hidden_layers")
    found = [*layer_problems(fields), *window_problems(fields, _window(fields))]
    is_listed = isinstance(given, list) and len(given) == L and all(turned in (0, 1) for turned in given)
    if given is not None and not is_listed:
        found.append(f"no_rope_layers={shown(given)} (give 0 or 1 for each layer)")
    return found or _other_layers(fields)


def _other_layers(fields: Fields) -> list[str]:
    """Whether `no_rope_layer_interval` says otherwise than `no_rope_layers`, in which nothing else is wrong."""
    interval, turned = fields.get("no_rope_layer_interval"), fields.get("no_rope_layers")
    # transformers writes its usual interval beside any list.
    if turned is None or not is_count(interval) or interval == _INTERVAL or turned == _turned(interval, len(turned)):
        return []
    return [f"no_rope_layer_interval={interval} beside no_rope_layers that say otherwise (keep one)"]


def _turned(interval: int, L: int) -> list[bool]:
    """Which layers rotate: all but those whose number is a multiple of `interval`."""
    return [(l + 1) % interval != 0 for l in range(L)]


def _window(fields: Fields) -> int | None:
    return fields.get("sliding_window") if fields.get("use_sliding_window", False) else None


def read_config(fields: Fields) -> ModelConfig:
    """The model that a checked config.json describes. Layers that do not rotate may have a window."""
    usual = _turned(fields.get("no_rope_layer_interval", _INTERVAL), fields["num_hidden_layers"])
    turned = fields.get("no_rope_layers", usual)
    types = fields.get("layer_types", [FULL if turns else SLIDING for turns in turned])
    own: Mapping[str, Any] = {name: fields.get(name, False) for name in ("attention_bias", "mlp_bias")}
    return read_shared(
        {"tie_word_embeddings": True, "max_position_embeddings": 32_768} | dict(fields),
        "smollm3",
        theta=2_000_000.0,
        windows=windows_of(types, _window(fields)),
        rotated=() if all(turned) else tuple(map(bool, turned)),
        **own,
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The fields of config.json that SmolLM3 has besides those of every family."""
    return {
        **write_shared(config),
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "no_rope_layers": [int(turns) for turns in config.rotated or (True,) * config.num_layers],
        "use_sliding_window": bool(config.windows),
        "sliding_window": window_of(config),
        "layer_types": layer_types(config),
    }


FAMILY = rotary_family(
    name="smollm3",
    architectures=("SmolLM3ForCausalLM",),
    fields=SHARED.joined(
        ConfigFields(
            required=("num_key_value_heads",),  # absent, they are 4, whatever the size
            counts=("sliding_window", "no_rope_layer_interval"),
            switches=("attention_bias", "mlp_bias", "use_sliding_window"),
            # Published files state `max_window_layers`, and transformers reads nothing of it.
            checked=("no_rope_layers", "layer_types", "max_window_layers"),
            problems=smollm3_problems,
        )
    ),
    read_config=read_config,
    write_config=write_config,
    tensors=TENSORS | biases(TENSORS, *ATTENTION, *MLP),
    gguf=rotary_gguf(
        architecture="smollm3",
        tensors=GGUF_TENSORS | biases(GGUF_TENSORS, *ATTENTION, *MLP),
        as_checkpoints=FROM_PAIRS,
    ),
)
