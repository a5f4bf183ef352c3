"""What a GGUF file says of itself: metadata, and the type, shape and bytes of each tensor.

gguf's own reader makes several arrays of every entry of a list, which takes seconds for a vocabulary, and believes
whatever lengths a file states: a damaged one can keep it busy for ever. Here lengths are held against the file's first.
It also maps the file, whose pages kill the process where somebody cuts it short; here they are read.
"""

import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from coreinfer_jax.errors import shown, shown_name
from coreinfer_jax.io.held import HeldFile

# How struct and NumPy call the plain types of metadata, by their numbers; text and lists are besides.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _LIST = 8, 9
# More than any vocabulary has, and few enough to be held as Python's objects.
MOST_ENTRIES = 1 << 22
# Several times the longest chat template.
MOST_BYTES_OF_A_TEXT = 1 << 22
# Bytes read at once.
READ_AHEAD = 1 << 20
# A name's length, the number of axes, one axis, type and offset.
_LEAST_BYTES_OF_A_TENSOR = 8 + 4 + 8 + 4 + 8
_LEAST_BYTES_OF_A_FACT = 8 + 4 + 1


@dataclass(frozen=True)
class HeaderTensor:
    """A tensor as it lies in a file.

    Attributes:
        kind: its `gguf.GGMLQuantizationType`.
        shape: of its values, as NumPy orders axes.
        file: where it lies.
        begin: its first byte there.
        byte_shape: of its bytes: [..., bytes of a row].
    """

    kind: Any
    shape: tuple[int, ...]
    file: HeldFile
    begin: int
    byte_shape: tuple[int, ...]

    def read(self, begin: int, end: int) -> np.ndarray:
        """Its bytes, of the first axis from one number to before another, both within: uint8 [..., bytes of a row].

        Raises:
            OSError: as `HeldFile.read`.
        """
        shape = (end - begin, *self.byte_shape[1:])
        return self.file.read(self.begin + begin * prod(shape[1:]), prod(shape)).reshape(shape)


def read_header(file: Path) -> tuple[dict[str, Any], dict[str, HeaderTensor]]:
    """Metadata by key and tensors by name. No tensor's bytes are read.

    Raises:
        ValueError: the file is no GGUF file, or is damaged; the text says how.
        OSError: it cannot be read.
    """
    cursor = _Cursor(HeldFile(file))
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

    def __init__(self, file: HeldFile) -> None:
        self.file = file
        self.position = 0
        # What was read ahead, and where in the file it ends.
        self._ahead, self._end = memoryview(b""), 0

    def expect(self, size: int) -> None:
        """Refuse a file that ends before the next `size` bytes."""
        if size > self.file.size - self.position:
            raise ValueError(f"it ends {size - self.file.size + self.position} bytes too early")

    def take(self, size: int) -> memoryview:
        """The next `size` bytes."""
        if size > self._end - self.position:
            self._read_ahead(size)
        begin = self.position - self._end + len(self._ahead)
        self.position += size
        return self._ahead[begin : begin + size]

    def _read_ahead(self, size: int) -> None:
        self.expect(size)
        count = min(max(size, READ_AHEAD), self.file.size - self.position)
        self._ahead, self._end = self.file.read(self.position, count).data, self.position + count

    def number(self, code: str) -> Any:
        """The next number, of a type as struct calls it."""
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def text(self) -> str:
        """The next text, which its length comes before."""
        size = self.number("Q")
        if size > MOST_BYTES_OF_A_TEXT:
            raise ValueError(f"a text of {size} bytes, where {MOST_BYTES_OF_A_TEXT} are read at most")
        return str(self.take(size), "utf-8")

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
        missing = begin + end + prod(rows) - cursor.file.size
        if missing > 0:
            raise ValueError(f"it ends {missing} bytes too early")
        found[name] = HeaderTensor(kind, shape, cursor.file, begin + end, rows)
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
