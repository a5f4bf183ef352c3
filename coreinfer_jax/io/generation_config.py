"""What generation_config.json recommends for drawing tokens, every field of it accounted for."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coreinfer_jax.engine.options import drawing_of
from coreinfer_jax.errors import CoreInferError, shown, shown_name
from coreinfer_jax.files import read_json
from coreinfer_jax.model.config import ModelConfig
from coreinfer_jax.model.config_fields import Fields

FILE = "generation_config.json"

# What transformers takes for granted when it draws, where the file does not say.
_DRAWN: dict[str, Any] = {"temperature": 1.0, "top_k": 50, "top_p": None, "min_p": None}
_PENALTIES = ("repetition_penalty", "no_repeat_ngram_size")
# Fields with the values that change nothing, null apart; with others they are not honoured. Those of the first kind
# only act where tokens are drawn.
_NEUTRAL_WHERE_DRAWN: dict[str, tuple[object, ...]] = {
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "top_h": (),
}
_NEUTRAL: dict[str, tuple[object, ...]] = {
    **{"num_beams": (1,), "num_return_sequences": (1,), "num_beam_groups": (1,)},
    **{"min_length": (0,), "min_new_tokens": (0,), "max_time": (), "stop_strings": ([],)},
    **{"encoder_repetition_penalty": (1.0,), "encoder_no_repeat_ngram_size": (0,)},
    **{"bad_words_ids": ([],), "suppress_tokens": ([],), "begin_suppress_tokens": ([],), "sequence_bias": ({}, [])},
    **{"forced_bos_token_id": (), "forced_eos_token_id": (), "exponential_decay_length_penalty": ()},
    **{"constraints": ([],), "force_words_ids": ([],), "guidance_scale": (1.0,), "watermarking_config": ()},
    **{"token_healing": (False,), "penalty_alpha": (0.0,), "dola_layers": (), "diversity_penalty": (0.0,)},
}
# Fields that do not change what is generated here, whatever they say: lengths, which `--max-new-tokens` alone decides;
# ids, which the model's config holds; settings of beams, of speed, of memory, of what is handed back, of files.
_OF_NO_EFFECT = frozenset(
    (
        *("max_length", "max_new_tokens", "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"),
        *("early_stopping", "length_penalty", "renormalize_logits", "remove_invalid_values", "low_memory"),
        *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "return_legacy_cache"),
        *("prefill_chunk_size", "compile_config", "disable_compile", "continuous_batching_config", "use_mtp"),
        *("is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
        *("assistant_early_exit", "assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight"),
        *("prompt_lookup_num_tokens", "max_matching_ngram_size", "speculation_type"),
        *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
        *("transformers_version", "_from_model_config", "_commit_hash"),
    )
)


@dataclass(frozen=True)
class Recommended:
    """How a model's files recommend to draw tokens.

    Attributes:
        sampling: options of generating, as `GenerateOptions` names them; empty where nothing is recommended.
        not_honoured: fields that would change what is generated in a way that is not implemented, each as name=value.
        where: the file.
    """

    sampling: Mapping[str, Any]
    not_honoured: tuple[str, ...]
    where: Path


def read_recommended(directory: Path, config: ModelConfig) -> Recommended:
    """What generation_config.json says of drawing tokens, as transformers reads it.

    Without `do_sample` the most probable token is taken, whatever the file says of drawing; penalties of what repeats
    hold in any case. With it, an absent field means what it means to transformers: 50 for top_k.

    Raises:
        CoreInferError: the file cannot be read, or holds a setting outside its range.
    """
    where = directory / FILE
    fields = _stated(read_json(where)) if where.is_file() else {}
    draws = fields.get("do_sample", False)
    if not isinstance(draws, bool):
        raise CoreInferError(f"{where}: do_sample={shown(draws)}: give true or false; correct it")
    sampling = {name: fields[name] for name in _PENALTIES if name in fields}
    if draws:
        sampling |= _DRAWN | {name: fields[name] for name in _DRAWN if name in fields}
        sampling["top_k"] = sampling["top_k"] or None  # 0 is how a file says that there is no limit
    try:
        drawing_of({**sampling, "key": 0}, config)  # type: ignore[typeddict-item] # all of them are options
    except CoreInferError as error:
        raise CoreInferError(f"{where}: {error}; correct the file, or generate with --temperature 0") from error
    return Recommended(sampling, _not_honoured(fields, draws), where)


def _stated(fields: Fields) -> Fields:
    """Fields without those that are null, which is how absence is written."""
    return {name: value for name, value in fields.items() if value is not None}


def _not_honoured(fields: Fields, draws: bool) -> tuple[str, ...]:
    known = {"do_sample", *_DRAWN, *_PENALTIES} | _OF_NO_EFFECT | (set() if draws else set(_NEUTRAL_WHERE_DRAWN))
    neutral = _NEUTRAL | _NEUTRAL_WHERE_DRAWN
    others = {name: value for name, value in fields.items() if name not in known}
    return tuple(
        f"{shown_name(name)}={shown(value)}" for name, value in others.items() if value not in neutral.get(name, ())
    )
