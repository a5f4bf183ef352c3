"""How much longer a sentencepiece model may make a text before it splits it.

A model can hold a table of replacements, such as NFKC's, which writes one Arabic ligature as 33 bytes. A table of its
own could write megabytes for every character. The file is a serialised protocol buffer (sentencepiece_model.proto):
field 3 of the model is the normaliser's settings, of which field 2 is the table. The table is the size of an index, in
4 bytes, the index, and all replacements, each with a zero byte behind it.
"""

from collections.abc import Iterator

MOST_EXPANSION = 256
_NORMALIZER, _TABLE = 3, 2
_VARINT, _FIXED_64, _BYTES, _FIXED_32 = 0, 1, 2, 5
_SIZES = {_FIXED_64: 8, _FIXED_32: 4}


def check_expansion(model: bytes) -> None:
    """Refuse a serialised model with replacements that are too long.

    Raises:
        ValueError: one is longer than `MOST_EXPANSION` bytes, or the bytes are no protocol buffer.
    """
    longest = max((len(one) for one in _replacements(model)), default=0)
    if longest > MOST_EXPANSION:
        raise ValueError(f"it replaces characters by up to {longest} bytes, more than {MOST_EXPANSION}")


def _replacements(model: bytes) -> list[bytes]:
    # A message that comes in several parts is that of all parts behind each other, and of a field the last one counts.
    settings = b"".join(_fields(model, _NORMALIZER))
    *_, table = b"", *_fields(settings, _TABLE)
    return table[4 + int.from_bytes(table[:4], "little") :].split(b"\0")


def _fields(message: bytes, wanted: int) -> Iterator[bytes]:
    """The contents of a field of bytes, each time that it comes."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, kind = key >> 3, key & 7
        if kind == _VARINT:
            _, at = _varint(message, at)
        elif kind == _BYTES:
            size, at = _varint(message, at)
            if number == wanted:
                yield message[at : at + size]
            at += size
        elif kind in _SIZES:
            at += _SIZES[kind]
        else:
            raise ValueError("no protocol buffer")


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """A number in 7 bits of each byte, the lowest first, and where the next field begins."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            break
        byte = message[at]
        value |= (byte & 127) << shift
        at += 1
        if byte < 128:
            return value, at
    raise ValueError("no protocol buffer")
