"""What config.json says of decoders with rotary positions, RMSNorm and a gated MLP: LLaMA and its relatives."""

from collections.abc import Iterable
from typing import Any

from coreinfer_jax.errors import shown
from coreinfer_jax.model.config import ModelConfig
from coreinfer_jax.model.config_fields import ConfigFields, Fields, is_count, read_special_ids
from coreinfer_jax.model.rope_fields import ROPE_CHECKED, read_rope, rope_problems, write_rope

# The names of activation functions in config.json, and ours.
ACTIVATIONS = {"silu": "silu", "relu": "relu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
FULL, SLIDING = "full_attention", "sliding_attention"
# A config holds a window for each layer; one of a damaged file must not fill the memory.
_MOST_LAYERS = 10_000


def activation_problems(fields: Fields, name: str = "hidden_act") -> list[str]:
    """What is not implemented of the activation function in the field `name`."""
    given = fields.get(name, "silu")
    if isinstance(given, str) and given in ACTIVATIONS:
        return []
    return [f"{name}={shown(given)} (only {', '.join(map(repr, ACTIVATIONS))})"]


# All that these families share but what turns positions into angles.
UNROTATED = ConfigFields(
    required=("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads"),
    counts=("num_key_value_heads", "head_dim", "max_position_embeddings"),
    switches=("tie_word_embeddings",),
    numbers=("rms_norm_eps", "rope_theta"),
    # The pairs that RoPE rotates are (i, i + H/2); `rope_interleaved` would make them (2i, 2i + 1).
    fixed={"rope_interleaved": False},
    checked=("hidden_act",),
    problems=activation_problems,
)
WHOLE_HEADS = ConfigFields(fixed={"partial_rotary_factor": 1.0})
SHARED = UNROTATED.joined(WHOLE_HEADS).joined(ConfigFields(checked=ROPE_CHECKED, problems=rope_problems))


def read_shared(fields: Fields, family: str, theta: float = 10_000.0, **own: Any) -> ModelConfig:
    """The model that a checked config.json describes.

    Args:
        fields: its fields.
        family: the name of the family.
        theta: the base of rotation where none is stated.
        own: what of `ModelConfig` the family sets beside what all of them do, or in its place.
    """
    D, N = fields["hidden_size"], fields["num_attention_heads"]
    facts: dict[str, Any] = {
        "vocab_size": fields["vocab_size"],
        "hidden_size": D,
        "embed_size": D,
        "mlp_size": fields["intermediate_size"],
        "num_layers": fields["num_hidden_layers"],
        "num_heads": N,
        "num_kv_heads": fields.get("num_key_value_heads", N),
        "head_size": fields.get("head_dim", D // N),
        "max_positions": fields.get("max_position_embeddings", 2048),
        "activation": ACTIVATIONS[fields.get("hidden_act", "silu")],
        "norm_eps": float(fields.get("rms_norm_eps", 1e-6)),
        "tied": fields.get("tie_word_embeddings", False),
        "rope": read_rope(fields, theta),
        **read_special_ids(fields),
    }
    return ModelConfig(family=family, **(facts | own))


def write_shared(config: ModelConfig) -> dict[str, Any]:
    """The fields of config.json that these families have besides those of every family."""
    assert config.rope is not None, "the model has rotary positions"
    return {
        "hidden_act": activation_name(config),
        "intermediate_size": config.mlp_size,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_size,
        "rms_norm_eps": config.norm_eps,
        **write_rope(config.rope),
    }


def activation_name(config: ModelConfig) -> str:
    """How config.json calls the activation function; ValueError where it has no name for it."""
    names = [name for name, ours in ACTIVATIONS.items() if ours == config.activation]
    if not names:
        raise ValueError(f"activation={shown(config.activation)}")
    return names[0]


def layer_problems(fields: Fields) -> list[str]:
    """What is wrong with `layer_types`, or with the number of layers for a family whose layers differ."""
    types, L = fields.get("layer_types"), fields.get("num_hidden_layers")
    if is_count(L) and L > _MOST_LAYERS:
        return [f"num_hidden_layers={L} (at most {_MOST_LAYERS})"]
    if types is None:
        return []
    if not isinstance(types, list) or any(kind not in (FULL, SLIDING) for kind in types):
        return [f"layer_types={shown(types)} (a list of {FULL!r} and {SLIDING!r})"]
    return [f"layer_types of {len(types)} layers"] if len(types) != L else []


def window_problems(fields: Fields, window: int | None) -> list[str]:
    """Whether `layer_types`, in which nothing else is wrong, asks for a window that the other fields do not give."""
    types = fields.get("layer_types")
    asked = isinstance(types, list) and SLIDING in types
    return [f"layer_types with {SLIDING!r} without a sliding window"] if asked and window is None else []


def windows_of(types: Iterable[str], window: int | None) -> tuple[int | None, ...]:
    """`ModelConfig.windows` of layers of these types."""
    windows = tuple(window if kind == SLIDING else None for kind in types)
    return windows if any(windows) else ()


def window_of(config: ModelConfig) -> int | None:
    """The window of those layers that have one."""
    return next(filter(None, config.windows), None)


def layer_types(config: ModelConfig) -> list[str]:
    """The types of all layers."""
    return [FULL if window is None else SLIDING for window in config.windows or (None,) * config.num_layers]
