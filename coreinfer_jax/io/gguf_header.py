"""What a GGUF file says of itself: metadata, and the type, shape and bytes of each tensor.

gguf's own reader makes several arrays of every entry of a list, which takes seconds for a vocabulary, and believes
whatever lengths a file states: a damaged one can keep it busy for ever. Here lengths are held against the file's first.
"""

import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from coreinfer_jax.errors import shown, shown_name

# How struct and NumPy call the plain types of metadata, by their numbers; text and lists are besides.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _LIST = 8, 9
# More than any vocabulary has, and few enough to be held as Python's objects.
MOST_ENTRIES = 1 << 22
# A name's length, the number of axes, one axis, type and offset.
_LEAST_BYTES_OF_A_TENSOR = 8 + 4 + 8 + 4 + 8
_LEAST_BYTES_OF_A_FACT = 8 + 4 + 1


@dataclass(frozen=True)
class HeaderTensor:
    """A tensor as it lies in a file.

    Attributes:
        kind: its `gguf.GGMLQuantizationType`.
        shape: of its values, as NumPy orders axes.
        data: its bytes, mapped: uint8 [..., bytes of a row].
    """

    kind: Any
    shape: tuple[int, ...]
    data: np.ndarray


def read_header(file: Path) -> tuple[dict[str, Any], dict[str, HeaderTensor]]:
    """Metadata by key and tensors by name. No tensor's bytes are read.

    Raises:
        ValueError: the file is no GGUF file, or is damaged; the text says how.
        OSError: it cannot be read.
    """
    if file.stat().st_size == 0:
        raise ValueError("it is empty")
    content = np.memmap(file, np.uint8, mode="r").view(np.ndarray)
    cursor = _Cursor(content)
    if bytes(cursor.take(4)) != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    version = cursor.number("I")
    if version not in (2, 3):
        raise ValueError(f"version {version}, of which 2 and 3 are read, little-endian")
    tensors, facts = cursor.number("Q"), cursor.number("Q")
    cursor.expect(tensors * _LEAST_BYTES_OF_A_TENSOR + facts * _LEAST_BYTES_OF_A_FACT)
    metadata: dict[str, Any] = {}
    for _ in range(facts):
        key = cursor.text()
        if key in metadata:
            raise ValueError(f"{shown_name(key)} is stated twice")
        metadata[key] = cursor.value(cursor.number("I"))
    return metadata, _tensors(cursor, tensors, _alignment(metadata))


class _Cursor:
    """A place in a file's bytes, from which values are taken one after the other."""

    def __init__(self, content: np.ndarray) -> None:
        self.content = content
        self.bytes = content.data
        self.position = 0

    def expect(self, size: int) -> None:
        """Refuse a file that ends before the next `size` bytes."""
        if size > len(self.bytes) - self.position:
            raise ValueError(f"it ends {size - len(self.bytes) + self.position} bytes too early")

    def take(self, size: int) -> memoryview:
        """The next `size` bytes."""
        self.expect(size)
        self.position += size
        return self.bytes[self.position - size : self.position]

    def number(self, code: str) -> Any:
        """The next number, of a type as struct calls it."""
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def text(self) -> str:
        """The next text, which its length comes before."""
        return str(self.take(self.number("Q")), "utf-8")

    def value(self, kind: int) -> Any:
        """The next value of metadata, of a type by its number."""
        if kind == _TEXT:
            return self.text()
        if kind == _LIST:
            return self._list(self.number("I"), self.number("Q"))
        return self.number(_code(kind))

    def _list(self, kind: int, count: int) -> list[Any]:
        if count > MOST_ENTRIES:
            raise ValueError(f"a list of {count} entries, more than any vocabulary has")
        if kind == _TEXT:
            return [self.text() for _ in range(count)]
        dtype = np.dtype(_code(kind)).newbyteorder("<")
        entries: list[Any] = np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()
        return entries


def _code(kind: int) -> str:
    if kind not in _NUMBERS:
        raise ValueError(f"metadata of type {kind}, which is not of the format")
    return _NUMBERS[kind]


def _alignment(metadata: dict[str, Any]) -> int:
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment {shown(alignment)}, which is no power of two")
    return alignment


def _tensors(cursor: _Cursor, count: int, alignment: int) -> dict[str, HeaderTensor]:
    """The tensors, whose list begins at the cursor."""
    stated: dict[str, tuple[Any, tuple[int, ...], int]] = {}
    for _ in range(count):
        name = cursor.text()
        if name in stated:
            raise ValueError(f"tensor {shown_name(name)} is there twice")
        stated[name] = _stated(cursor, name)
    begin = cursor.position + -cursor.position % alignment
    end, found = 0, {}
    for name, (kind, shape, offset) in stated.items():
        if offset != end:  # as llama.cpp asks: one after the other, in the order of the list
            raise ValueError(f"tensor {shown_name(name)} lies at {offset} instead of {end}")
        rows = _byte_shape(name, kind, shape)
        found[name] = HeaderTensor(kind, shape, _slice(cursor.content, begin + end, rows))
        end += prod(rows) + -prod(rows) % alignment
    return found


def _stated(cursor: _Cursor, name: str) -> tuple[Any, tuple[int, ...], int]:
    """Type, shape and offset of the next tensor in the list."""
    from gguf import GGMLQuantizationType

    axes = cursor.number("I")
    if not 1 <= axes <= 4:
        raise ValueError(f"tensor {shown_name(name)} has {axes} axes, not 1 to 4")
    shape = tuple(cursor.number("Q") for _ in range(axes))[::-1]
    if not all(shape):
        raise ValueError(f"tensor {shown_name(name)} is empty, of shape {list(shape)}")
    return GGMLQuantizationType(cursor.number("I")), shape, cursor.number("Q")


def _byte_shape(name: str, kind: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a tensor's bytes; a row holds whole blocks of values."""
    from gguf.constants import GGML_QUANT_SIZES

    values, size = GGML_QUANT_SIZES[kind]
    if shape[-1] % values:
        raise ValueError(f"tensor {shown_name(name)}, {kind.name}, has rows of {shape[-1]}, no multiple of {values}")
    return (*shape[:-1], shape[-1] // values * size)


def _slice(content: np.ndarray, begin: int, shape: tuple[int, ...]) -> np.ndarray:
    missing = begin + prod(shape) - len(content)
    if missing > 0:
        raise ValueError(f"it ends {missing} bytes too early")
    return content[begin : begin + prod(shape)].reshape(shape)
