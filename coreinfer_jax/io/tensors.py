"""Reading the tensors of a checkpoint one at a time: safetensors, PyTorch's `.bin`, sharded or not."""

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError

from coreinfer_jax.errors import CoreInferError, listed, shown_name
from coreinfer_jax.files import read_json
from coreinfer_jax.io.calibration_file import CALIBRATION
from coreinfer_jax.io.held import WEIGHTS, HeldFile, HeldTensor, open_safetensors_file, unreadable


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
    """Files of one format: the single file, else those an index names, else whatever fits the pattern.

    A whole file comes before an index, whose shards may never have been downloaded, as it does in transformers.
    """
    index, single = directory / f"{whole}.index.json", directory / whole
    if _is_file(single):
        return [single]
    if not _is_file(index):
        return sorted(path for path in directory.glob(pattern) if path.name != CALIBRATION)
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CoreInferError(f"{index}: has no weight_map; download it again")
    shards = sorted({directory / Path(str(name)).name for name in weight_map.values()})
    missing = [shown_name(shard.name) for shard in shards if not _is_file(shard)]
    if missing:
        raise CoreInferError(f"{directory}: missing {listed(missing)}, named in {index.name}; download them")
    return shards


def _is_file(path: Path) -> bool:
    return os.path.isfile(path)  # noqa: PTH113 - Path.is_file raises for a name that is too long


def open_safetensors(files: list[Path]) -> StoredTensors:
    """The tensors of safetensors files, which are held open. Only headers are read here."""
    tensors: dict[str, StoredTensor] = {}
    aliases: dict[str, str] = {}
    for file in files:
        with _named(file):
            metadata, found = open_safetensors_file(file, WEIGHTS)
        tensors |= {name: _stored(tensor) for name, tensor in found.items()}
        # Tensors that share memory are stored once; the metadata maps the other names to the stored one.
        aliases |= metadata
    return StoredTensors(tensors, {name: target for name, target in aliases.items() if target in tensors})


def _stored(tensor: HeldTensor) -> StoredTensor:
    file = tensor.file.path

    def read() -> np.ndarray:
        with _named(file):
            return tensor.read()

    def read_rows(begin: int, end: int) -> np.ndarray:
        with _named(file):
            return tensor.read_rows(begin, end)

    return StoredTensor(tensor.shape, tensor.dtype.name, read, read_rows=read_rows if tensor.shape else None)


@contextmanager
def _named(file: Path) -> Iterator[None]:
    """Let failures of reading a safetensors file name it, and the remedy."""
    try:
        yield
    except OSError as error:
        raise unreadable(file, error) from error
    except (SafetensorError, OverflowError) as error:
        reason = shown_name(str(error))  # which may quote whatever the file holds
        raise CoreInferError(
            f"{file}: not a readable safetensors file ({reason}); it may be truncated, download it again"
        ) from error


def _open_bins(files: list[Path]) -> StoredTensors:
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        try:
            held = HeldFile(file)
        except OSError as error:
            raise unreadable(file, error) from error
        tensors |= {name: _stored_torch(held, name, tensor) for name, tensor in _load_bin(held).items()}
    return StoredTensors(tensors)


def _load_bin(held: HeldFile) -> Mapping[str, Any]:
    """The state dict in a `.bin` file. `weights_only` admits tensors and refuses everything pickle could run."""
    file = held.path
    try:
        # PyTorch warns of unusual versions of pickle, whether or not it can read them.
        with warnings.catch_warnings(action="ignore", category=UserWarning):
            state = _load_state(held)
    except ImportError as error:
        raise CoreInferError(
            f"{file}: reading .bin needs PyTorch; pip install 'coreinfer_jax[torch]', or use a safetensors checkpoint"
        ) from error
    except Exception as error:  # damaged files make PyTorch raise all kinds, AssertionError and struct.error too
        raise _no_state_dict(file, error) from error
    if not isinstance(state, Mapping):
        raise CoreInferError(f"{file}: holds a {type(state).__name__}, not a state dict")
    return state


def _load_state(held: HeldFile) -> Any:
    import torch

    try:
        return torch.load(held.handle, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap" not in str(error):
            raise
        # Files of PyTorch before 1.6 are no zip archives and cannot be mapped.
        return torch.load(held.handle, map_location="cpu", weights_only=True)


def _no_state_dict(file: Path, error: Exception) -> CoreInferError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return CoreInferError(
        f"{file}: not a PyTorch state dict that loads with weights_only ({shown_name(reason)}); download it again, "
        "or use a safetensors checkpoint"
    )


def _stored_torch(held: HeldFile, name: str, tensor: Any) -> StoredTensor:
    import torch

    file = held.path
    names = {torch.float64: "float64", torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
    if not isinstance(tensor, torch.Tensor) or tensor.dtype not in names:
        kind = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise CoreInferError(f"{file}: {shown_name(str(name))} is {kind}; only floating-point tensors are read")
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        kind = f"{tensor.layout} on {tensor.device}"
        raise CoreInferError(f"{file}: {shown_name(str(name))} is {kind}; only dense tensors with values are read")

    def read() -> np.ndarray:
        try:
            held.check()  # mapped pages of a file that was cut short would kill the process
            array = _as_numpy(tensor)
            held.check()
        except OSError as error:
            raise unreadable(file, error) from error
        except RuntimeError as error:
            raise _no_state_dict(file, error) from error
        return array

    return StoredTensor(tuple(tensor.shape), names[tensor.dtype], read)


def _as_numpy(tensor: Any) -> np.ndarray:
    """The values of a PyTorch tensor, a parameter or a view included, in memory of their own."""
    import torch

    plain = tensor.detach().resolve_neg().contiguous()
    if plain.dtype == torch.bfloat16:  # NumPy has no bfloat16 of its own, so the bits travel as integers
        bits: np.ndarray = plain.view(torch.int16).numpy().copy()
        return bits.view(ml_dtypes.bfloat16)
    array: np.ndarray = plain.numpy().copy()
    return array
