"""The native format: `coreinfer.json` and safetensors shards named after the leaves of `Params`, beside a tokenizer."""

import json
from collections.abc import Iterator
from dataclasses import fields as fields_of
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from coreinfer_jax.errors import CoreInferError, shown, shown_name
from coreinfer_jax.files import read_json
from coreinfer_jax.io.config_json import hugging_face_fields, model_config
from coreinfer_jax.io.mapping import check_fit, check_layers, leaf_shapes
from coreinfer_jax.io.tensors import StoredTensor, open_safetensors
from coreinfer_jax.model.config import ModelConfig, Rope
from coreinfer_jax.model.config_fields import write_special_ids

MANIFEST = "coreinfer.json"
VERSION = 1

# A shard is held in memory while it is written, so this bounds the memory of a conversion.
SHARD_BYTES = 256 * 2**20


def is_native(directory: Path) -> bool:
    """Whether `directory` holds a native checkpoint."""
    return (directory / MANIFEST).is_file()


def write_native(
    directory: Path, config: ModelConfig, dtype: np.dtype, leaves: Iterator[tuple[str, np.ndarray]]
) -> None:
    """Write a checkpoint into an empty directory, holding no more than one shard of `leaves` at a time.

    Args:
        directory: where to.
        config: the model.
        dtype: of every leaf.
        leaves: (name, array) in the order of `leaf_shapes`.
    """
    files = _plan_shards(config, dtype)
    for number, names in enumerate(files, start=1):
        shard = {name: np.ascontiguousarray(next(leaves)[1]) for name in names}
        try:
            save_file(shard, directory / _shard_name(number, len(files)))
        except SafetensorError as error:
            raise OSError(str(error)) from error
    manifest = {"format": "coreinfer_jax", "version": VERSION, "dtype": dtype.name, "config": _stored(config)}
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _stored(config: ModelConfig | Rope) -> dict[str, Any]:
    """The fields that a manifest holds, so that the first release reads what it can compute."""
    values = {one.name: (one, getattr(config, one.name)) for one in fields_of(config)}
    return {
        name: _stored(value) if isinstance(value, Rope) else value
        for name, (one, value) in values.items()
        if not one.metadata.get("later") or value != one.default
    }


def _shard_name(number: int, total: int) -> str:
    return f"weights-{number:05d}-of-{total:05d}.safetensors"


def _plan_shards(config: ModelConfig, dtype: np.dtype) -> list[list[str]]:
    """Leaf names per shard: in order, up to SHARD_BYTES each; a larger leaf has a shard of its own."""
    shards: list[list[str]] = []
    filled = SHARD_BYTES
    for name, shape in leaf_shapes(config).items():
        size = int(np.prod(shape)) * dtype.itemsize
        if filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def open_native(directory: Path) -> tuple[ModelConfig, dict[str, StoredTensor]]:
    """Config and stored tensors of a native checkpoint.

    Raises:
        CoreInferError: a manifest of another version or without a config, weights that are missing, left over, of
            the wrong shape or unreadable.
    """
    config = _read_manifest(directory / MANIFEST)
    stored = open_safetensors(sorted(directory.glob("weights-*.safetensors"))).tensors
    check_layers(config, len(stored), str(directory))
    names = set(leaf_shapes(config))
    known = {name: stored[name] for name in names & set(stored)}
    check_fit(known, config, sorted(names - set(stored)), sorted(set(stored) - names), str(directory))
    return config, known


def _read_manifest(path: Path) -> ModelConfig:
    manifest = read_json(path)
    if manifest.get("format") != "coreinfer_jax" or manifest.get("version") != VERSION:
        found = f"format {shown(manifest.get('format'))}, version {shown(manifest.get('version'))}"
        raise CoreInferError(f"{path}: {found}; this release reads version {VERSION}, convert the checkpoint again")
    try:
        fields = _with_tuples(dict(manifest.get("config") or {}))
        stated = {name: fields[name] for name in ("rope", "local_rope") if fields.get(name) is not None}
        config = ModelConfig(**fields | {name: Rope(**_with_tuples(rope)) for name, rope in stated.items()})
        # What no config.json could have said was not written by a conversion.
        if model_config(hugging_face_fields(config) | write_special_ids(config), "config") != config:
            raise ValueError("its fields contradict each other")
    except (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise CoreInferError(
            f"{path}: its config is not a model's ({shown_name(str(error))}); convert the checkpoint again"
        ) from error
    return config


def _with_tuples(fields: dict[str, Any]) -> dict[str, Any]:
    """What a config holds as tuples and JSON as lists."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
