"""What the config.json of every family has in common: kinds of fields, how they are checked, special tokens."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from coreinfer_jax.errors import shown, shown_name
from coreinfer_jax.model.config import ModelConfig

Fields = Mapping[str, Any]

_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_FIXED: dict[str, Any] = {"is_encoder_decoder": False, "add_cross_attention": False, "pruned_heads": {}}
# Fields that do not change what a trained model computes, whatever they say: of training, of bookkeeping, and defaults
# of generating, which older files state here (`generate` is told them, or reads generation_config.json).
_HARMLESS = frozenset(
    (
        *("initializer_range", "init_std", "pretraining_tp", "gradient_checkpointing", "neftune_noise_alpha"),
        *("dropout", "attention_dropout", "activation_dropout", "hidden_dropout", "embd_pdrop", "resid_pdrop"),
        "layerdrop",
        *("torch_dtype", "dtype", "transformers_version", "transformers.js_config", "_name_or_path", "_commit_hash"),
        *("_attn_implementation", "_attn_implementation_autoset", "_flash_attn_2_enabled", "_from_model_config"),
        *("use_cache", "return_dict", "output_attentions", "output_hidden_states", "torchscript", "use_bfloat16"),
        *("tf_legacy_loss", "problem_type", "id2label", "label2id", "num_labels", "finetuning_task", "is_decoder"),
        *("task_specific_params", "tokenizer_class", "prefix", "sep_token_id", "cls_token_id"),
        *("decoder_start_token_id", "tie_encoder_decoder", "cross_attention_hidden_size", "chunk_size_feed_forward"),
        *("max_sequence_length", "model_max_length", "is_llama_config", "unsloth_fixed", "unsloth_version"),
        *("do_sample", "temperature", "top_k", "top_p", "typical_p", "min_length", "max_length", "max_new_tokens"),
        *("num_beams", "num_beam_groups", "diversity_penalty", "length_penalty", "early_stopping"),
        *("repetition_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids"),
        *("exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id"),
        *("forced_eos_token_id", "remove_invalid_values", "num_return_sequences", "return_dict_in_generate"),
        *("output_scores", "cache_implementation"),
    )
)
# How many fields that nobody knows an error names.
_MOST_NAMED = 20


@dataclass(frozen=True)
class ConfigFields:
    """The fields of config.json that a family knows, by kind.

    Attributes:
        required: counts without which there is no model.
        counts: further whole numbers above 0.
        switches: true or false.
        numbers: numbers above 0.
        fixed: fields that change the computation, with the one value that is implemented.
        checked: fields that `problems` checks.
        problems: what is wrong with those, each in a few words.
        nullable: fields in which null is a value of its own, not how absence is written.
    """

    required: tuple[str, ...] = ()
    counts: tuple[str, ...] = ()
    switches: tuple[str, ...] = ()
    numbers: tuple[str, ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)
    checked: tuple[str, ...] = ()
    problems: Callable[[Fields], list[str]] = lambda fields: []
    nullable: tuple[str, ...] = ()

    def joined(self, other: "ConfigFields") -> "ConfigFields":
        """These and the fields of `other`, whose fixed values replace those of the same name here."""
        return ConfigFields(
            required=self.required + other.required,
            counts=self.counts + other.counts,
            switches=self.switches + other.switches,
            numbers=self.numbers + other.numbers,
            fixed={**self.fixed, **other.fixed},
            checked=self.checked + other.checked,
            problems=lambda fields: [*self.problems(fields), *other.problems(fields)],
            nullable=self.nullable + other.nullable,
        )

    @property
    def known(self) -> frozenset[str]:
        """All of them, and those that every family knows."""
        own = (*self.required, *self.counts, *self.switches, *self.numbers, *self.fixed, *self.checked)
        return frozenset((*own, "model_type", "architectures", *_IDS, *_FIXED))


def config_problems(fields: Fields, family: str, architectures: tuple[str, ...], known: ConfigFields) -> list[str]:
    """Everything that is wrong with the fields of a config.json; null ones must have been left out, but `nullable`.

    Args:
        fields: what is stated.
        family: its `model_type`.
        architectures: those that are implemented.
        known: the fields of the family.
    """
    absent = [name for name in known.required if name not in fields]
    stated = {name: value for name, value in fields.items() if value is not None}
    unimplemented = [
        *_other_values(fields, _FIXED | dict(known.fixed)),
        *known.problems(fields),
        *_other_architectures(fields, architectures),
        *_unknown(fields, family, known.known),
    ]
    return [
        *([f"missing {', '.join(absent)}"] if absent else []),
        *_bad_counts(stated, (*known.required, *known.counts)),
        *_bad_values(stated, known),
        *([f"not implemented: {', '.join(unimplemented)}"] if unimplemented else []),
    ]


def _bad_counts(fields: Fields, names: tuple[str, ...]) -> list[str]:
    given = {name: fields[name] for name in names if name in fields}
    wrong = [
        f"{name}={shown(value)} (give a whole number above 0 and below 2**31)"
        for name, value in given.items()
        if not is_count(value)
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


def _bad_values(fields: Fields, known: ConfigFields) -> list[str]:
    wrong = {name: "true or false" for name in known.switches if not isinstance(fields.get(name, True), bool)}
    wrong |= {name: "a number above 0" for name in known.numbers if not is_number(fields.get(name, 1))}
    wrong |= {name: "a token id" for name in _IDS if name in fields and not _is_ids(name, fields[name])}
    return [f"{name}={shown(fields[name])} (give {wanted})" for name, wanted in wrong.items()]


def _other_values(fields: Fields, fixed: Mapping[str, Any]) -> list[str]:
    return [f"{name}={shown(fields[name])}" for name, value in fixed.items() if fields.get(name, value) != value]


def _other_architectures(fields: Fields, known: tuple[str, ...]) -> list[str]:
    given = fields.get("architectures")
    listed = given if isinstance(given, list) else []
    if not given or any(name in listed for name in known):
        return []
    return [f"architectures={shown(given)} (only {known[0]})"]


def _unknown(fields: Fields, family: str, known: frozenset[str]) -> list[str]:
    """Fields that nobody here knows, unless they say what transformers takes for granted."""
    further = {name: value for name, value in fields.items() if name not in known | _HARMLESS}
    if not further:
        return []
    from transformers import AutoConfig  # takes seconds, and hardly a checkpoint has such fields

    try:
        usual = AutoConfig.for_model(family).to_dict()
    except ValueError:  # a family with code of its own
        usual = {}
    found = [
        f"{shown_name(name)}={shown(value)}"
        for name, value in further.items()
        if name not in usual or usual[name] != value
    ]
    return found if len(found) <= _MOST_NAMED else [*found[:_MOST_NAMED], f"and {len(found) - _MOST_NAMED} more"]


def is_count(value: object) -> TypeGuard[int]:
    """Whether a value is a whole number above 0 that an int32 holds."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31


def _is_ids(name: str, value: object) -> bool:
    ids = value if isinstance(value, list) and name == "eos_token_id" else [value]
    return all(isinstance(i, int) and not isinstance(i, bool) and abs(i) < 2**31 for i in ids)


def is_number(value: object) -> bool:
    """Whether a value is a number above 0 that float32 can compute with; NaN compares false."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 1e-30 <= value <= 1e30


def read_special_ids(fields: Fields) -> dict[str, Any]:
    """The ids of special tokens, as `ModelConfig` names them."""
    eos = fields.get("eos_token_id")
    return {
        "bos_id": fields.get("bos_token_id"),
        "eos_ids": () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        "pad_id": fields.get("pad_token_id"),
    }


def write_special_ids(config: ModelConfig) -> dict[str, Any]:
    """The same as config.json and generation_config.json name them."""
    return {
        "bos_token_id": config.bos_id,
        "eos_token_id": config.eos_ids[0] if len(config.eos_ids) == 1 else list(config.eos_ids),
        "pad_token_id": config.pad_id,
    }
