"""GGUF files, the format of llama.cpp: metadata and tensors, the latter as checkpoints hold them."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from coreinfer_jax.errors import CoreInferError, shown_name
from coreinfer_jax.io.gguf_header import HeaderTensor, read_header
from coreinfer_jax.io.held import unreadable
from coreinfer_jax.io.tensors import StoredTensor, StoredTensors
from coreinfer_jax.model.config import ModelConfig
from coreinfer_jax.model.families import family_of
from coreinfer_jax.model.family import GgufNames

_SHARD = re.compile(r"(.*)-(\d{5})-of-(?!00000)(\d{5})\.gguf")


@dataclass(frozen=True)
class Gguf:
    """What a GGUF file holds: metadata by key, and tensors, read dequantised, by their names in the format."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]


def whole_file(file: Path) -> Path:
    """`file` with links resolved, unless that leads to another kind of name.

    In the hub's cache a link has the name of the file, and lies beside the other parts; what it leads to is called by
    its digest.
    """
    resolved = Path(os.path.realpath(file))  # Path.resolve raises for links in a circle
    return resolved if resolved.suffix == ".gguf" else file.absolute()


def stored_tensors(file: Path, config: ModelConfig) -> StoredTensors:
    """The tensors of a GGUF file under the names, and in the layout, of the family's Hugging Face checkpoints.

    Raises:
        CoreInferError: as `open_gguf`.
    """
    family = family_of(config)
    assert family.gguf is not None, "only families that GGUF files are read of are unpacked"
    found = {}
    ours = {theirs: leaf for leaf, theirs in family.gguf.tensors.items()}
    for name, tensor in open_gguf(file).tensors.items():
        number = re.match(r"blk\.(\d+)\.", name)
        leaf = ours.get(name if number is None else name.replace(number[0], "blk.{l}.", 1))
        if leaf is not None:
            found[family.tensors[leaf].format(l=number and number[1])] = _laid_out(tensor, leaf, family.gguf, config)
        elif name not in family.gguf.further_tensors:
            found[name] = tensor
    return StoredTensors(found)


def _laid_out(tensor: StoredTensor, leaf: str, names: GgufNames, config: ModelConfig) -> StoredTensor:
    """`tensor` as checkpoints hold it."""
    change = names.as_checkpoints.get(leaf)
    if change is None:
        return tensor
    return replace(tensor, read=lambda: change(tensor.read(), config), read_rows=None)


def open_gguf(file: Path) -> Gguf:
    """The metadata and tensors of a GGUF file, with all parts of one that is split. Tensors are read when asked for.

    Raises:
        CoreInferError: it cannot be read, a part is missing, it is damaged, or a type that cannot be dequantised.
    """
    headers = [_header(part) for part in _parts(file)]
    tensors: dict[str, StoredTensor] = {}
    for _, found in headers:
        if twice := sorted(set(tensors) & set(found)):
            raise CoreInferError(f"{file}: {shown_name(twice[0])} is in two parts; download them again")
        tensors |= {name: _stored(file, name, tensor) for name, tensor in found.items()}
    return Gguf(headers[0][0], tensors)


def part_names(name: str) -> list[str]:
    """The names of all parts of a model, in order, by that of one of them; a model that is whole is its only part."""
    split = _SHARD.fullmatch(name)
    if split is None:
        return [name]
    return [f"{split[1]}-{i:05d}-of-{split[3]}.gguf" for i in range(1, int(split[3]) + 1)]


def _parts(file: Path) -> list[Path]:
    """All files of a model, in order."""
    whole = whole_file(file)
    parts = [whole.with_name(name) for name in part_names(whole.name)]
    if len(parts) == 1:
        return [file]
    if missing := [part.name for part in parts if not part.is_file()]:
        raise CoreInferError(f"{file}: missing {', '.join(missing[:3])}, other parts of the model; download them")
    return parts


def _header(file: Path) -> tuple[dict[str, Any], dict[str, HeaderTensor]]:
    try:
        return read_header(file)
    except OSError as error:
        raise unreadable(file, error) from error
    except ValueError as error:
        raise damaged(file, error) from error


def damaged(file: Path, error: Exception) -> CoreInferError:
    """What to raise for a file whose reading made `error`."""
    told = str(error).strip().splitlines() or [type(error).__name__]
    why = shown_name(told[0])
    return CoreInferError(f"{file}: not a readable GGUF file ({why}); it may be truncated, download it again")


def _stored(file: Path, name: str, tensor: HeaderTensor) -> StoredTensor:
    kind, shape = tensor.kind, tensor.byte_shape
    plain = _PLAIN.get(kind.name)
    if plain is None and not _is_read(kind):
        told = shown_name(name)
        raise CoreInferError(f"{file}: {told} is {kind.name}, which gguf does not read; take another file")

    def read_rows(begin: int, end: int) -> np.ndarray:
        try:
            rows = tensor.read(begin, end)
        except OSError as error:
            raise unreadable(file, error) from error
        return _dequantised(rows, kind) if plain is None else rows.view(plain)

    def read() -> np.ndarray:
        return read_rows(0, shape[0])

    # The bytes of a tensor with one axis are not cut: its entries are single values.
    several = len(tensor.shape) > 1
    dtype = np.dtype(np.float32 if plain is None else plain).name
    return StoredTensor(tensor.shape, dtype, read, (kind.name, prod(shape)), read_rows if several else None)


def _dequantised(data: np.ndarray, kind: Any) -> np.ndarray:
    from gguf.quants import dequantize

    with np.errstate(all="ignore"):  # what is not finite is refused where it is read
        wide: np.ndarray = dequantize(data, kind)
    return wide


@cache
def _is_read(kind: Any) -> bool:
    """Whether gguf dequantises a type, which it only says when asked to."""
    from gguf.constants import GGML_QUANT_SIZES
    from gguf.quants import dequantize

    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


_PLAIN = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
