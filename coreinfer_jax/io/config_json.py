"""config.json of a Hugging Face checkpoint, read and written for every family."""

from pathlib import Path
from typing import Any

from coreinfer_jax.errors import CoreInferError
from coreinfer_jax.files import read_json
from coreinfer_jax.model.config import ModelConfig
from coreinfer_jax.model.config_fields import Fields, config_problems
from coreinfer_jax.model.families import family_named, family_of


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


def model_config(fields: Fields, where: str = "config.json") -> ModelConfig:
    """`ModelConfig` of the fields of a config.json, in the spelling of transformers 4 or 5.

    Args:
        fields: the parsed JSON object.
        where: named in errors.

    Raises:
        CoreInferError: another family, missing fields, values that are no sizes, or fields that change the computation
            in a way that is not implemented, among them those that nobody here knows and that differ from what
            transformers takes for granted; one error names them all.
    """
    family = family_named(fields.get("model_type"), f"{where}: model_type")
    # Null is how absence is written.
    fields = {name: value for name, value in fields.items() if value is not None or name in family.fields.nullable}
    problems = config_problems(fields, family.name, family.architectures, family.fields)
    if problems:
        raise CoreInferError(f"{where}: " + "; ".join(problems))
    return family.read_config(fields)


def hugging_face_fields(config: ModelConfig) -> dict[str, Any]:
    """The fields of config.json that say what `config` computes; `model_config` reads them back."""
    family = family_of(config)
    return {
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.tied,
        "architectures": [family.architectures[0]],
        **family.write_config(config),
    }
