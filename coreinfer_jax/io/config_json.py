"""config.json of a Hugging Face checkpoint -> `ModelConfig`, refusing what is not implemented."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from coreinfer_jax.errors import CoreInferError, shown
from coreinfer_jax.files import read_json
from coreinfer_jax.model.config import ModelConfig, Rope

Fields = Mapping[str, Any]

# Fields that change the computation, with the one value that is implemented. Everything else that is not read below
# (dropout, initialisation, cache flags, bookkeeping) does not change what a trained model computes.
_NEUTRAL: dict[str, dict[str, Any]] = {
    "opt": {"activation_function": "relu", "layer_norm_elementwise_affine": True},
    "llama": {"partial_rotary_factor": 1.0, "sliding_window": None},
}
_NEUTRAL_EVERYWHERE: dict[str, Any] = {
    "quantization_config": None,
    "auto_map": None,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
}
_ARCHITECTURES = {"opt": ("OPTForCausalLM",), "llama": ("LlamaForCausalLM", "LLaMAForCausalLM")}
_REQUIRED = {
    "opt": ("vocab_size", "hidden_size", "num_hidden_layers", "ffn_dim", "num_attention_heads"),
    "llama": ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads"),
}
_COUNTS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "ffn_dim",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "word_embed_proj_dim",
    "max_position_embeddings",
)
_SWITCHES = (
    "tie_word_embeddings",
    "do_layer_norm_before",
    "_remove_final_layer_norm",
    "enable_bias",
    "attention_bias",
    "mlp_bias",
)
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def read_model_config(directory: Path) -> ModelConfig:
    """The model a Hugging Face directory describes; EOS ids from generation_config.json where it names them."""
    where = directory / "config.json"
    fields = read_json(where)
    generation = directory / "generation_config.json"
    config = model_config(fields, str(where))
    if generation.is_file() and (eos := read_json(generation).get("eos_token_id")) is not None:
        where = generation
        config = model_config({**fields, "eos_token_id": eos}, str(where))
    outside = [i for i in config.eos_ids if not 0 <= i < config.vocab_size]
    if outside:
        raise CoreInferError(
            f"{where}: eos_token_id {outside[0]} is outside the vocabulary 0 .. {config.vocab_size - 1}; correct it"
        )
    return config


def read_sampling(directory: Path) -> dict[str, Any]:
    """The `temperature`, `top_k` and `top_p` that generation_config.json recommends, as far as it does.

    As transformers reads it: without `do_sample` the most probable token is taken, whatever else stands there.
    """
    file = directory / "generation_config.json"
    fields = read_json(file) if file.is_file() else {}
    if fields.get("do_sample") is not True:
        return {}
    told = {name: fields[name] for name in ("temperature", "top_k", "top_p") if fields.get(name) is not None}
    return {"temperature": 1.0} | told


def model_config(fields: Fields, where: str = "config.json") -> ModelConfig:
    """`ModelConfig` of the fields of a config.json, in the spelling of transformers 4 or 5.

    Args:
        fields: the parsed JSON object.
        where: named in errors.

    Raises:
        CoreInferError: another family, missing fields, values that are no sizes, or fields that change the
            computation in a way that is not implemented; one error names them all.
    """
    family = fields.get("model_type")
    if not isinstance(family, str) or family not in _ARCHITECTURES:
        raise CoreInferError(f"{where}: model_type {shown(family)} is not implemented; supported are 'opt' and 'llama'")
    fields = {name: value for name, value in fields.items() if value is not None}  # null is how absence is written
    problems = [
        *_missing(fields, family),
        *_bad_counts(fields),
        *_bad_values(fields),
        *_unimplemented(fields, family),
    ]
    if problems:
        raise CoreInferError(f"{where}: " + "; ".join(problems))
    build: Callable[[Fields], ModelConfig] = {"opt": _opt, "llama": _llama}[family]
    return build(fields)


def _missing(fields: Fields, family: str) -> list[str]:
    absent = [name for name in _REQUIRED[family] if fields.get(name) is None]
    return [f"missing {', '.join(absent)}"] if absent else []


def _bad_counts(fields: Fields) -> list[str]:
    given = {name: fields[name] for name in _COUNTS if fields.get(name) is not None}
    wrong = [
        f"{name}={shown(value)} (give a whole number above 0 and below 2**31)"
        for name, value in given.items()
        if not _is_count(value)
    ]
    if wrong:
        return wrong
    D, N = given.get("hidden_size", 0), given.get("num_attention_heads", 1)
    G = given.get("num_key_value_heads", N)
    if "head_dim" not in given and D % N:
        wrong.append(f"hidden_size={D} is not a multiple of num_attention_heads={N}")
    if given.get("head_dim", 2) % 2:
        wrong.append(f"head_dim={given['head_dim']} is odd")
    if N % G:
        wrong.append(f"num_attention_heads={N} is not a multiple of num_key_value_heads={G}")
    return wrong


def _bad_values(fields: Fields) -> list[str]:
    wrong = [
        f"{name}={shown(fields[name])} (give true or false)"
        for name in _SWITCHES
        if not isinstance(fields.get(name, True), bool)
    ]
    wrong += [
        f"{name}={shown(fields[name])} (give a number above 0)"
        for name in ("rms_norm_eps", "rope_theta")
        if name in fields and not _is_number(fields, name)
    ]
    return wrong + [
        f"{name}={shown(fields[name])} (give a token id)"
        for name in _IDS
        if name in fields and not _is_ids(name, fields[name])
    ]


def _is_ids(name: str, value: object) -> bool:
    ids = value if isinstance(value, list) and name == "eos_token_id" else [value]
    return all(isinstance(i, int) and not isinstance(i, bool) and abs(i) < 2**31 for i in ids)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31


def _unimplemented(fields: Fields, family: str) -> list[str]:
    neutral = _NEUTRAL_EVERYWHERE | _NEUTRAL[family]
    found = [
        f"{name}={shown(fields[name])}"
        for name, value in neutral.items()
        if fields.get(name) is not None and fields[name] != value
    ]
    if family == "llama":
        found += _unimplemented_llama(fields)
    architectures = fields.get("architectures")
    listed = architectures if isinstance(architectures, list) else []
    if architectures and not any(name in listed for name in _ARCHITECTURES[family]):
        found.append(f"architectures={shown(architectures)} (only {_ARCHITECTURES[family][0]})")
    return [f"not implemented: {', '.join(found)}"] if found else []


def _unimplemented_llama(fields: Fields) -> list[str]:
    found = []
    if fields.get("hidden_act", "silu") not in ("silu", "relu"):
        found.append(f"hidden_act={shown(fields['hidden_act'])} (only 'silu' and 'relu')")
    spelling, settings = _rope_settings(fields)
    if not isinstance(settings, Mapping):
        return [*found, f"{spelling}={shown(settings)} (give an object)"]
    if fields.get("rope_parameters") and fields.get("rope_scaling"):
        found.append("rope_parameters and rope_scaling together (keep one)")
    kind = _rope_kind(settings)
    if kind == "default" and settings.get("factor", 1.0) != 1.0:
        found.append(f"{spelling} with a factor but without a type")
    if kind not in ("default", "linear", "llama3"):
        found.append(f"{spelling} of type {shown(kind)} (only 'default', 'linear' and 'llama3')")
    if settings.get("partial_rotary_factor", 1.0) != 1.0:
        found.append(f"{spelling} with partial_rotary_factor={shown(settings['partial_rotary_factor'])}")
    found += [
        f"{spelling}.{name}={shown(settings[name])} (give a number above 0)"
        for name in ("rope_theta", "original_max_position_embeddings")
        if settings.get(name) is not None and not _is_number(settings, name)
    ]
    if kind == "llama3" and settings.get("low_freq_factor") == settings.get("high_freq_factor"):
        found.append(f"{spelling} with low_freq_factor equal to high_freq_factor")
    wanted = {"linear": ["factor"], "llama3": ["factor", "low_freq_factor", "high_freq_factor"]}.get(str(kind), [])
    found += [
        f"{spelling} of type {kind!r} without a number {name!r}" for name in wanted if not _is_number(settings, name)
    ]
    return found


def _is_number(settings: Fields, name: str) -> bool:
    """Whether a setting is a number above 0 that float32 can compute with; NaN compares false."""
    value = settings.get(name)
    return isinstance(value, int | float) and not isinstance(value, bool) and 1e-30 <= value <= 1e30


def _rope_settings(fields: Fields) -> tuple[str, Fields]:
    """Spelling and settings of RoPE: `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (4)."""
    spelling = "rope_parameters" if fields.get("rope_parameters") is not None else "rope_scaling"
    return spelling, fields.get(spelling) or {}


def _rope_kind(settings: Fields) -> object:
    return settings.get("rope_type", settings.get("type", "default"))


def _rope(fields: Fields) -> Rope:
    _, settings = _rope_settings(fields)
    kind = _rope_kind(settings)
    theta = float(settings.get("rope_theta") or fields.get("rope_theta") or 10_000.0)
    if kind == "linear":
        return Rope(theta=theta, scaling="linear", factor=float(settings["factor"]))
    if kind == "llama3":
        original = settings.get("original_max_position_embeddings") or fields.get("max_position_embeddings", 2048)
        return Rope(
            theta=theta,
            scaling="llama3",
            factor=float(settings["factor"]),
            low_freq_factor=float(settings["low_freq_factor"]),
            high_freq_factor=float(settings["high_freq_factor"]),
            original_max_positions=int(original),
        )
    return Rope(theta=theta)


def _opt(fields: Fields) -> ModelConfig:
    D, N = fields["hidden_size"], fields["num_attention_heads"]
    bias = fields.get("enable_bias", True)
    norm_first = fields.get("do_layer_norm_before", True)
    return ModelConfig(
        family="opt",
        vocab_size=fields["vocab_size"],
        hidden_size=D,
        embed_size=fields.get("word_embed_proj_dim") or D,
        mlp_size=fields["ffn_dim"],
        num_layers=fields["num_hidden_layers"],
        num_heads=N,
        num_kv_heads=N,
        head_size=D // N,
        max_positions=fields.get("max_position_embeddings", 2048),
        activation="relu",
        norm_eps=1e-5,  # PyTorch's default; OPT configs do not state it
        norm_first=norm_first,
        final_norm=norm_first and not fields.get("_remove_final_layer_norm", False),
        attention_bias=bias,
        mlp_bias=bias,
        tied=fields.get("tie_word_embeddings", True),
        **_special_ids(fields),
    )


def _llama(fields: Fields) -> ModelConfig:
    D, N = fields["hidden_size"], fields["num_attention_heads"]
    return ModelConfig(
        family="llama",
        vocab_size=fields["vocab_size"],
        hidden_size=D,
        embed_size=D,
        mlp_size=fields["intermediate_size"],
        num_layers=fields["num_hidden_layers"],
        num_heads=N,
        num_kv_heads=fields.get("num_key_value_heads") or N,
        head_size=fields.get("head_dim") or D // N,
        max_positions=fields.get("max_position_embeddings", 2048),
        activation=fields.get("hidden_act", "silu"),
        norm_eps=float(fields.get("rms_norm_eps", 1e-6)),
        attention_bias=fields.get("attention_bias", False),
        mlp_bias=fields.get("mlp_bias", False),
        tied=fields.get("tie_word_embeddings", False),
        rope=_rope(fields),
        **_special_ids(fields),
    )


def _special_ids(fields: Fields) -> dict[str, Any]:
    eos = fields.get("eos_token_id")
    return {
        "bos_id": fields.get("bos_token_id"),
        "eos_ids": () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        "pad_id": fields.get("pad_token_id"),
    }
