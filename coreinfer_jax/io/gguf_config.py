"""The metadata of GGUF files as config.json, generation_config.json and the tokenizer's files."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from coreinfer_jax.errors import CoreInferError, shown, shown_name
from coreinfer_jax.io.gguf import Gguf
from coreinfer_jax.model.families import FAMILIES
from coreinfer_jax.model.family import Family, GgufFacts, GgufNames
from coreinfer_jax.text import files_of_gguf

# What of an architecture's metadata is known beside its fields: told twice, or checked by itself.
_HEAD_SIZES = ("attention.key_length", "attention.value_length", "rope.dimension_count")
_CHECKED = ("vocab_size", "expert_count", *_HEAD_SIZES)
_IDS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}


def small_files(gguf: Gguf, where: str) -> dict[str, bytes]:
    """config.json, generation_config.json and the tokenizer's files."""
    fields = _config_fields(gguf, where)
    ends = [gguf.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    generation = {"eos_token_id": sorted({int(i) for i in ends if i is not None})}
    return {
        "config.json": json.dumps(fields, indent=2).encode(),
        **({"generation_config.json": json.dumps(generation).encode()} if generation["eos_token_id"] else {}),
        **files_of_gguf(gguf.metadata, where),
    }


def _config_fields(gguf: Gguf, where: str) -> dict[str, Any]:
    """The fields of config.json."""
    family, names = _family(gguf, where)
    prefix = f"{names.architecture}."
    own = {key.removeprefix(prefix): value for key, value in gguf.metadata.items() if key.startswith(prefix)}
    if unknown := sorted(set(own) - {*names.fields.values(), *names.further_keys, *_CHECKED}):
        told = ", ".join(f"{prefix}{shown_name(key)}={shown(own[key])}" for key in unknown)
        raise CoreInferError(f"{where}: not implemented: {told}")
    embedding = gguf.tensors.get(names.tensors["token_embedding"])
    if embedding is None or len(embedding.shape) != 2:
        raise CoreInferError(f"{where}: holds no token embedding; take a GGUF file of a whole language model")
    heads = [own[key] for key in _HEAD_SIZES if key in own and key not in names.further_keys]
    if any(size != heads[0] for size in heads):
        raise CoreInferError(f"{where}: not implemented: heads of {heads}")
    if own.get("expert_count"):
        raise CoreInferError(f"{where}: not implemented: {prefix}expert_count={own['expert_count']}")
    stated = {field: own[key] for field, key in names.fields.items() if key in own}
    ids = {name: gguf.metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in _IDS.items()}
    return {
        "model_type": family.name,
        "architectures": [family.architectures[0]],
        "vocab_size": embedding.shape[0],
        "tie_word_embeddings": names.tensors["unembedding"] not in gguf.tensors,
        **_biases(gguf, family, names),
        **stated,
        **({"head_dim": heads[0]} if heads else {}),
        **_further_fields(gguf, names, own, stated, where),
        **{name: int(i) for name, i in ids.items() if i is not None},
    }


def _family(gguf: Gguf, where: str) -> tuple[Family, GgufNames]:
    readable = {family.gguf.architecture: family for family in FAMILIES.values() if family.gguf is not None}
    architecture = gguf.metadata.get("general.architecture")
    family = readable.get(architecture) if isinstance(architecture, str) else None
    if family is None or family.gguf is None:
        known = ", ".join(readable)
        raise CoreInferError(f"{where}: architecture {shown(architecture)} is not implemented in GGUF; {known} is")
    name = str(gguf.metadata.get("general.name", ""))
    if any(other in name.lower() for other in family.gguf.others):
        raise CoreInferError(
            f"{where}: {shown(name)} is not implemented in GGUF, where it is not told from {architecture}; "
            "take its Hugging Face directory"
        )
    return family, family.gguf


def _biases(gguf: Gguf, family: Family, names: GgufNames) -> dict[str, bool]:
    """The switches of those biases that not every model of the family has."""
    leaves = {"attention_bias": "layers.{l}.attention.query.bias", "mlp_bias": "layers.{l}.mlp.up.bias"}
    return {
        field: names.tensors[leaf].format(l=0) in gguf.tensors
        for field, leaf in leaves.items()
        if field in family.fields.switches
    }


def _further_fields(
    gguf: Gguf, names: GgufNames, own: Mapping[str, Any], stated: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """Fields of config.json that only the family knows how to read."""

    def tensor(name: str) -> np.ndarray | None:
        return gguf.tensors[name].read() if name in gguf.tensors else None

    try:
        return names.further_fields(GgufFacts(own, stated, tensor))
    except CoreInferError as error:
        raise CoreInferError(f"{where}: {error}") from error
