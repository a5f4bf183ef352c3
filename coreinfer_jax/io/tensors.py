"""Reading the tensors of a checkpoint one at a time: safetensors, PyTorch's `.bin`, sharded or not."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from coreinfer_jax.errors import CoreInferError, shown_name
from coreinfer_jax.files import read_json
from coreinfer_jax.io.calibration_file import CALIBRATION

_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: its facts, and how to read it into memory of its own.

    Attributes:
        shape: of its values.
        dtype: of what `read` gives.
        read: its values.
        stored: the type and the number of bytes it has in its file, where that is more or less than its values in
            `dtype`.
        read_rows: what `read` gives, of its first axis only from one number to before another, where that can be read
            by itself.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]
    stored: tuple[str, int] | None = None
    read_rows: Callable[[int, int], np.ndarray] | None = None


@dataclass(frozen=True)
class StoredTensors:
    """All tensors of a checkpoint by name, and `aliases`: names that stand for another tensor."""

    tensors: Mapping[str, StoredTensor]
    aliases: Mapping[str, str] = field(default_factory=dict)


def open_checkpoint(directory: Path) -> StoredTensors:
    """The tensors of a Hugging Face directory; safetensors are preferred to `.bin` files.

    Raises:
        CoreInferError: no weights, a shard missing, a file that is truncated or not what its name says.
    """
    safetensors = _shards(directory, "model.safetensors", "*.safetensors")
    if safetensors:
        return open_safetensors(safetensors)
    bins = _shards(directory, "pytorch_model.bin", "pytorch_model*.bin")
    if bins:
        return _open_bins(bins)
    raise CoreInferError(f"{directory}: no weights; expected model.safetensors or pytorch_model.bin, whole or sharded")


def _shards(directory: Path, whole: str, pattern: str) -> list[Path]:
    """Files of one format: those an index names, else the single file, else whatever fits the pattern."""
    index = directory / f"{whole}.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CoreInferError(f"{index}: has no weight_map; download it again")
        shards = sorted({directory / Path(str(name)).name for name in weight_map.values()})
        missing = [shown_name(shard.name) for shard in shards if not _is_file(shard)]
        if missing:
            raise CoreInferError(f"{directory}: missing {', '.join(missing)}, named in {index.name}; download them")
        return shards
    single = directory / whole
    return (
        [single] if single.is_file() else sorted(path for path in directory.glob(pattern) if path.name != CALIBRATION)
    )


def _is_file(path: Path) -> bool:
    return os.path.isfile(path)  # noqa: PTH113 - Path.is_file raises for a name that is too long


def open_safetensors(files: list[Path]) -> StoredTensors:
    """The tensors of safetensors files. Only headers are read here."""
    tensors: dict[str, StoredTensor] = {}
    aliases: dict[str, str] = {}
    for file in files:
        with _opened(file) as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dict
                part = opened.get_slice(name)
                _check_dtype(file, name, part.get_dtype())
                shape = tuple(part.get_shape())
                read, read_rows = _reader(file, name), _rows_reader(file, name) if shape else None
                tensors[name] = StoredTensor(shape, _DTYPES[part.get_dtype()], read, read_rows=read_rows)
            # Tensors that share memory are stored once; the metadata maps the other names to the stored one.
            aliases |= opened.metadata() or {}
    return StoredTensors(tensors, {name: target for name, target in aliases.items() if target in tensors})


def _reader(file: Path, name: str) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        with _opened(file) as opened:
            array: np.ndarray = opened.get_tensor(name)
            return array

    return read


def _rows_reader(file: Path, name: str) -> Callable[[int, int], np.ndarray]:
    def read_rows(begin: int, end: int) -> np.ndarray:
        with _opened(file) as opened:
            rows: np.ndarray = opened.get_slice(name)[begin:end]
            return rows

    return read_rows


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """`safe_open` whose failures name the file and the remedy."""
    if not os.access(file, os.R_OK):  # safetensors would say that there is no such file
        raise CoreInferError(f"{file}: permission denied; make it readable")
    try:
        opened = safe_open(file, framework="numpy")
    except (SafetensorError, OSError, ValueError) as error:
        reason = shown_name(str(error))  # which may quote whatever the file holds
        raise CoreInferError(
            f"{file}: not a readable safetensors file ({reason}); it may be truncated, download it again"
        ) from error
    with opened:
        yield opened


def _check_dtype(file: Path, name: str, dtype: str) -> None:
    if dtype not in _DTYPES:
        raise CoreInferError(
            f"{file}: {shown_name(name)} is {dtype}; only {', '.join(_DTYPES)} are read, quantised checkpoints are not"
        )


def _open_bins(files: list[Path]) -> StoredTensors:
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in _load_bin(file).items():
            tensors[name] = _stored_torch(file, name, tensor)
    return StoredTensors(tensors)


def _load_bin(file: Path) -> Mapping[str, Any]:
    """The state dict in a `.bin` file. `weights_only` admits tensors and refuses everything pickle could run."""
    try:
        import torch
    except ImportError as error:
        raise CoreInferError(
            f"{file}: reading .bin needs PyTorch; pip install 'coreinfer_jax[torch]', or use a safetensors checkpoint"
        ) from error
    try:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            # Files of PyTorch before 1.6 are no zip archives and cannot be mapped.
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files make PyTorch raise all kinds, AssertionError and struct.error too
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CoreInferError(
            f"{file}: not a PyTorch state dict that loads with weights_only ({reason}); download it again, "
            "or use a safetensors checkpoint"
        ) from error
    if not isinstance(state, Mapping):
        raise CoreInferError(f"{file}: holds a {type(state).__name__}, not a state dict")
    return state


def _stored_torch(file: Path, name: str, tensor: Any) -> StoredTensor:
    import torch

    names = {torch.float64: "float64", torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
    if not isinstance(tensor, torch.Tensor) or tensor.dtype not in names:
        kind = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise CoreInferError(f"{file}: {shown_name(str(name))} is {kind}; only floating-point tensors are read")

    def read() -> np.ndarray:
        if tensor.dtype == torch.bfloat16:  # NumPy has no bfloat16 of its own, so the bits travel as integers
            bits: np.ndarray = tensor.contiguous().view(torch.int16).numpy().copy()
            return bits.view(ml_dtypes.bfloat16)
        array: np.ndarray = tensor.contiguous().numpy().copy()
        return array

    return StoredTensor(tuple(tensor.shape), names[tensor.dtype], read)
