"""Lines of prompts (JSON Lines): each checked by itself, so that one that is wrong can be told and passed over."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import isfinite
from os import fdopen
from pathlib import Path
from typing import Any, BinaryIO

from coreinfer_jax.engine.options import is_whole
from coreinfer_jax.errors import CoreInferError, one_line, shown, shown_name
from coreinfer_jax.files import open_regular, parse_json

# Bytes of a line: more than any model has positions for.
MOST_BYTES = 1 << 26
FIELDS = ("prompt", "messages", "id", "max_new_tokens")

Id = str | int | float | None


@dataclass(frozen=True)
class Line:
    """A line to be answered.

    Attributes:
        number: from 1.
        id: what it calls itself; None for nothing.
        prompt: the text to continue; None where there are messages.
        messages: a conversation for the chat template; None where there is a prompt.
        max_new_tokens: its own; None as for all.
    """

    number: int
    id: Id = None
    prompt: str | None = None
    messages: list[dict[str, str]] | None = None
    max_new_tokens: int | None = None


@dataclass(frozen=True)
class BadLine:
    """A line that cannot be answered.

    Attributes:
        number: from 1.
        error: why, and what to do.
        id: what it calls itself, as far as that is known.
    """

    number: int
    error: str
    id: Id = None


@dataclass(frozen=True)
class Summary:
    """What a whole file is.

    Attributes:
        digest: SHA-256 of its bytes.
        lines: how many there are.
        bad: those that cannot be answered.
    """

    digest: str
    lines: int
    bad: tuple[BadLine, ...]


def read_lines(path: Path) -> Iterator[Line | BadLine]:
    """The lines of a file, read as they are needed.

    Raises:
        CoreInferError: the file cannot be read, or a line is larger than any prompt.
    """
    known: set[tuple[bool, Id]] = set()
    for number, raw in enumerate(_raw_lines(path), start=1):
        yield _checked(number, raw, known)


def summarise(path: Path) -> Summary:
    """Read a file through, before there is any work on it; errors are those of `read_lines`."""
    digest, known, bad, number = hashlib.sha256(), set[tuple[bool, Id]](), list[BadLine](), 0
    for number, raw in enumerate(_raw_lines(path), start=1):
        digest.update(raw)
        line = _checked(number, raw, known)
        if isinstance(line, BadLine):
            bad.append(line)
    return Summary(digest.hexdigest(), number, tuple(bad))


def _raw_lines(path: Path) -> Iterator[bytes]:
    try:
        with fdopen(open_regular(path), "rb") as file:
            yield from _limited(file, path)
    except OSError as error:
        raise CoreInferError(f"{path}: {error.strerror or error}; name a readable file") from error


def _limited(file: BinaryIO, path: Path) -> Iterator[bytes]:
    number = 0
    while raw := file.readline(MOST_BYTES + 1):
        number += 1
        if len(raw) > MOST_BYTES:
            raise CoreInferError(f"{path}: line {number} has more than {MOST_BYTES} bytes; give one JSON object a line")
        yield raw


def _checked(number: int, raw: bytes, known: set[tuple[bool, Id]]) -> Line | BadLine:
    """A line as it stands in the file, whose id joins those that are `known`."""
    own: Id = None
    try:
        value = parse_json(raw.decode("utf-8"))
        if not isinstance(value, dict):
            raise CoreInferError(f"{shown(value)}: give a JSON object with 'prompt' or 'messages'")
        own = _id(value, known)
        return _line(number, own, value)
    except CoreInferError as error:
        return BadLine(number, one_line(str(error)), own)
    except UnicodeDecodeError:
        return BadLine(number, "not UTF-8; save the file as UTF-8")
    except ValueError as error:
        return BadLine(number, one_line(f"not valid JSON ({error}); give one JSON object a line"))


def _line(number: int, own: Id, value: Mapping[str, Any]) -> Line:
    if unknown := [name for name in value if name not in FIELDS]:
        raise CoreInferError(f"unknown field {shown_name(unknown[0])!r}; there are {', '.join(FIELDS)}")
    if ("prompt" in value) == ("messages" in value):
        raise CoreInferError("give either 'prompt', a text, or 'messages', a conversation")
    new = value.get("max_new_tokens")
    if new is not None and (not is_whole(new) or new < 1):
        raise CoreInferError(f"max_new_tokens={shown(new)}: give a whole number of at least 1")
    prompt = _text("prompt", value["prompt"]) if "prompt" in value else None
    messages = _messages(value["messages"]) if "messages" in value else None
    return Line(number, own, prompt, messages, new)


def _id(value: Mapping[str, Any], known: set[tuple[bool, Id]]) -> Id:
    own = value.get("id")
    if own is None and "id" not in value:
        return None
    if (
        isinstance(own, bool)
        or not isinstance(own, str | int | float)
        or (isinstance(own, float) and not isfinite(own))
    ):
        raise CoreInferError(f"id={shown(own)}: give a text or a number")
    if isinstance(own, str):
        _check_encodable("id", own)
    key = (isinstance(own, str), own)
    if key in known:
        raise CoreInferError(f"id={shown(own)}: an earlier line has it too; give each line its own, or none")
    known.add(key)
    return own


def _messages(value: object) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise CoreInferError(f"messages={shown(value)}: give a list of objects with 'role' and 'content'")
    for message in value:
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            raise CoreInferError(f"messages: {shown(message)}: give an object with 'role' and 'content'")
        for name, text in message.items():
            _text(f"messages: {name}", text)
    return value


def _text(name: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise CoreInferError(f"{name}={shown(value)}: give a text that is not empty")
    _check_encodable(name, value)
    return value


def _check_encodable(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise CoreInferError(f"{name}={shown(text)}: holds half of a surrogate pair; give whole characters") from error
