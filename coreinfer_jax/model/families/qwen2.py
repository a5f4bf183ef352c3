"""Qwen2 and Qwen2.5 (arXiv 2407.10671, 2412.15115): LLaMA with biases of queries, keys and values."""

from typing import Any

from coreinfer_jax.errors import shown
from coreinfer_jax.model.config import ModelConfig
from coreinfer_jax.model.config_fields import ConfigFields, Fields
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
    GGUF_TENSORS,
    TENSORS,
    biases,
    rotary_gguf,
)

# What transformers writes where nobody has said otherwise, also beside `layer_types`: there it says nothing.
USUAL_FIRST_WINDOW = 28

PROJECTIONS = ("attention.query", "attention.key", "attention.value")


def qwen_problems(fields: Fields) -> list[str]:
    """What is wrong with the fields of sliding windows."""
    first = fields.get("max_window_layers", 0)
    found = [*layer_problems(fields), *window_problems(fields, _window(fields))]
    if isinstance(first, bool) or not isinstance(first, int) or first < 0:
        found.append(f"max_window_layers={shown(first)} (give a whole number)")
    return found or _other_types(fields)


# What Qwen2 and Qwen3 know beside the fields that their relatives share.
WINDOWS = ConfigFields(
    required=("num_key_value_heads",),  # absent, they are 32, whatever the size
    counts=("sliding_window",),
    nullable=("sliding_window",),
    switches=("use_sliding_window",),
    checked=("max_window_layers", "layer_types"),
    problems=qwen_problems,
)


def _other_types(fields: Fields) -> list[str]:
    """Whether `layer_types` and `max_window_layers`, in which nothing else is wrong, give windows to other layers."""
    if "layer_types" not in fields or fields.get("max_window_layers", USUAL_FIRST_WINDOW) == USUAL_FIRST_WINDOW:
        return []
    by_number = {name: value for name, value in fields.items() if name != "layer_types"}
    if read_windows(fields) == read_windows(by_number):
        return []
    return [f"max_window_layers={fields['max_window_layers']} beside layer_types that say otherwise (keep one)"]


def _window(fields: Fields) -> int | None:
    window: int | None = fields.get("sliding_window", 4096)
    return window if fields.get("use_sliding_window", False) else None


def read_windows(fields: Fields) -> tuple[int | None, ...]:
    """The windows of all layers. Without `layer_types`, those from `max_window_layers` on have one."""
    L, first = fields["num_hidden_layers"], fields.get("max_window_layers", USUAL_FIRST_WINDOW)
    types = fields.get("layer_types", [FULL if l < first else SLIDING for l in range(L)])
    return windows_of(types, _window(fields))


def write_windows(config: ModelConfig) -> dict[str, Any]:
    """The fields that say so; releases of transformers without `layer_types` read `max_window_layers`."""
    types = layer_types(config)
    first = types.index(SLIDING) if SLIDING in types else config.num_layers
    return {
        "use_sliding_window": SLIDING in types,
        "sliding_window": window_of(config),
        **({} if FULL in types[first:] else {"max_window_layers": first}),
        "layer_types": types,
    }


def read_config(fields: Fields) -> ModelConfig:
    """The model that a checked config.json describes."""
    stated = {"max_position_embeddings": 32_768} | dict(fields)
    return read_shared(stated, "qwen2", attention_bias=True, windows=read_windows(fields))


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The fields of config.json that Qwen2 has besides those of every family."""
    return {**write_shared(config), **write_windows(config)}


FAMILY = rotary_family(
    name="qwen2",
    architectures=("Qwen2ForCausalLM",),
    fields=SHARED.joined(WINDOWS).joined(ConfigFields(fixed={"use_mrope": False})),
    read_config=read_config,
    write_config=write_config,
    tensors=TENSORS | biases(TENSORS, *PROJECTIONS),
    gguf=rotary_gguf(
        architecture="qwen2",
        tensors=GGUF_TENSORS | biases(GGUF_TENSORS, *PROJECTIONS),
    ),
)
