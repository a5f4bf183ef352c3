"""The conversion engine: a Hugging Face checkpoint or GGUF file, tensor by tensor, into the native format."""

import os
import shutil
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

from coreinfer_jax.errors import CoreInferError
from coreinfer_jax.files import (
    check_directory,
    copy_existing,
    new_directory,
    read_back,
    refuse_existing,
    remove_leftovers,
    to_path,
)
from coreinfer_jax.io.calibration_file import read_calibration, read_facts, write_calibration
from coreinfer_jax.io.loading import model_path, open_model, stored_fingerprint
from coreinfer_jax.io.mapping import DTYPES, count_bytes, leaf_shapes, parse_dtype, read_as
from coreinfer_jax.io.native import is_native, write_native
from coreinfer_jax.io.tensors import StoredTensor
from coreinfer_jax.model.config import ModelConfig
from coreinfer_jax.progress import progress
from coreinfer_jax.text import TOKENIZER_FILES

# Room for the manifest, headers and tokenizer beside the weights.
OVERHEAD_BYTES = 16 * 2**20


def convert(source: str | os.PathLike[str], destination: str | os.PathLike[str], dtype: object = None) -> Path:
    """Convert a checkpoint. `destination` appears whole or not at all.

    Memory stays below twice the largest tensor as written plus 1 GiB, whatever the checkpoint's size: tensors are read
    one by one, large ones by rows. Only `.bin` files of PyTorch before 1.6 are held whole, one file at a time.

    Args:
        source: as for `load`, but nothing that is converted already.
        destination: a directory that does not exist yet.
        dtype: `float32`, `bfloat16` or `float16`; None keeps that of the checkpoint's token embedding.

    Returns:
        The path of `destination`.

    Raises:
        CoreInferError: as `load`; also a destination that exists, or a disk without room.
    """
    target = to_path(destination)
    wanted = None if dtype is None else parse_dtype(dtype)
    refuse_existing(target)
    path = model_path(source)
    check_directory(path)
    if is_native(path):
        raise CoreInferError(f"{path}: converted already; copy the directory, or convert its source again")
    config, tensors = open_model(path)
    stored = DTYPES.get(tensors["token_embedding"].dtype, DTYPES["float32"])
    wanted = stored if wanted is None else wanted
    remove_leftovers(target)
    _check_room(target, count_bytes(config, wanted))
    with new_directory(target) as partial:
        names = progress(list(leaf_shapes(config)), desc="converting", unit="tensor", leave=True)
        write_native(
            partial, config, wanted, ((name, read_as(tensors[name], name, wanted, str(path))) for name in names)
        )
        # The original configs too: tokenizers look there for the model's type.
        copy_existing(path, partial, (*TOKENIZER_FILES, "config.json", "generation_config.json"))
        with read_back(target):
            converted = open_model(partial)
        _copy_calibration(path, partial, cache(lambda: stored_fingerprint(config, tensors)), *converted)
    return target


def _copy_calibration(
    source: Path,
    target: Path,
    fingerprint: Callable[[], str],
    config: ModelConfig,
    written: Mapping[str, StoredTensor],
) -> None:
    """Give the model just written in `target` the calibration of the one in `source`, if there is any."""
    calibration, known = read_calibration(source, config, fingerprint), read_facts(source, config, fingerprint)
    if calibration is not None and known is not None:
        write_calibration(target, config, stored_fingerprint(config, written), calibration, known[1])


def _check_room(target: Path, needed: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if free < needed + OVERHEAD_BYTES:
        raise CoreInferError(
            f"{target}: needs {needed / 1e9:.2f} GB but the disk has {free / 1e9:.2f} GB free; "
            "free some, choose another disk, or a 16-bit --dtype"
        )
