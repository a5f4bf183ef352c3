"""Files that are held open while they are read piece by piece, so that all pieces are of one file."""

import errno
import os
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import ml_dtypes  # noqa: F401 - lets NumPy know bfloat16 by its name
import numpy as np
from safetensors import safe_open

from coreinfer_jax.errors import CoreInferError, shown_name
from coreinfer_jax.files import open_regular

# Types of safetensors files that NumPy has: those of weights, and all.
WEIGHTS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_ALL = {
    **WEIGHTS,
    **{"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8"},
    **{"U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool"},
}


class HeldFile:
    """A regular file, held open as long as this is in use.

    What replaces it under its name is not seen. It is read and not mapped: pages of a mapped file that somebody cuts
    short kill the process.

    Attributes:
        path: its name when it was opened.
        size: its bytes.

    Raises:
        OSError: it cannot be opened, or is no regular file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = open_regular(path)
        weakref.finalize(self, os.close, self._descriptor)
        self._facts = self._stated()
        self.size = self._facts[0]

    @property
    def handle(self) -> str:
        """A name by which other libraries open this very file."""
        return f"/dev/fd/{self._descriptor}"

    def read(self, begin: int, size: int) -> np.ndarray:
        """The bytes from `begin`, uint8 [size], in memory of their own.

        Raises:
            OSError: the file ends before, was written to since it was opened, or cannot be read.
        """
        content = np.empty(size, np.uint8)
        done = 0
        while done < size:  # the system reads 2 GiB at once, at most
            count = os.preadv(self._descriptor, [content.data[done:]], begin + done)
            if not count:
                break
            done += count
        self.check()
        if done < size:
            raise OSError(errno.EIO, f"ends {size - done} bytes too early", str(self.path))
        return content

    def check(self) -> None:
        """Raise OSError if the file was written to, or cut short, since it was opened."""
        if self._stated() != self._facts:
            raise OSError(errno.EIO, "changed while it was read", str(self.path))

    def _stated(self) -> tuple[int, int]:
        facts = os.fstat(self._descriptor)
        return facts.st_size, facts.st_mtime_ns


def unreadable(path: Path, error: OSError) -> CoreInferError:
    """What to raise for a file that cannot be opened or read to its end."""
    reason = error.strerror or shown_name(str(error))
    return CoreInferError(f"{path}: {reason}; make it a file that can be read, and let nothing write to it meanwhile")


@dataclass(frozen=True)
class HeldTensor:
    """A tensor in a safetensors file.

    Attributes:
        file: where it lies.
        begin: its first byte there.
        shape: of its values.
        dtype: of its values.
    """

    file: HeldFile
    begin: int
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """Its values; errors as `HeldFile.read`."""
        return self.file.read(self.begin, self.nbytes).view(self.dtype).reshape(self.shape)

    def read_rows(self, begin: int, end: int) -> np.ndarray:
        """Its first axis from one number to before another, both within; it has axes."""
        shape = (end - begin, *self.shape[1:])
        row = prod(self.shape[1:]) * self.dtype.itemsize
        return self.file.read(self.begin + begin * row, shape[0] * row).view(self.dtype).reshape(shape)


def open_safetensors_file(
    path: Path, types: Mapping[str, str] = _ALL
) -> tuple[Mapping[str, str], dict[str, HeldTensor]]:
    """Metadata, and tensors by name, of a safetensors file. Only its header is read here.

    Raises:
        CoreInferError: it holds a tensor of none of the `types`.
        OSError: as `HeldFile`.
        safetensors.SafetensorError: it is damaged.
    """
    held = HeldFile(path)
    with safe_open(held.handle, framework="numpy", backend="pread") as opened:
        metadata = opened.metadata() or {}
        slices = {name: opened.get_slice(name) for name in opened.offset_keys()}
        stated = {name: (one.get_dtype(), tuple(one.get_shape())) for name, one in slices.items()}
    # safetensors has made sure that its tensors fill the file from here to its end, one behind the other.
    begin = 8 + int.from_bytes(held.read(0, 8).tobytes(), "little")
    tensors = {}
    for name, (kind, shape) in stated.items():
        if kind not in types:
            told = f"{path}: {shown_name(name)} is {kind}; only {', '.join(types)} are read"
            raise CoreInferError(f"{told}, quantised checkpoints are not")
        tensors[name] = HeldTensor(held, begin, shape, np.dtype(types[kind]))
        begin += tensors[name].nbytes
    return metadata, tensors


def load_arrays(path: Path) -> tuple[Mapping[str, str], dict[str, np.ndarray]]:
    """Metadata and all arrays of a safetensors file; errors as `open_safetensors_file`."""
    metadata, tensors = open_safetensors_file(path)
    return metadata, {name: tensor.read() for name, tensor in tensors.items()}
