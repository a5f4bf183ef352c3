"""Documents out of a file: plain text, JSON lines, or a table with columns of text and labels."""

import csv
import hashlib
import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coreinfer_jax.errors import CoreInferError, shown, shown_name
from coreinfer_jax.files import MOST_TEXT, parse_json, read_bytes, to_path

SEPARATOR = "<|endoftext|>"
Column = str | int
_SEPARATOR_LINE = re.compile(rf"^{re.escape(SEPARATOR)}[ \t]*$", re.MULTILINE)
_TABS: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}


@dataclass(frozen=True)
class Documents:
    """The documents of one file, empty ones left out.

    Attributes:
        name: the file's name, without its folder.
        digest: SHA-256 of its bytes.
        texts: one per document.
        labels: one per document, or None.
    """

    name: str
    digest: str
    texts: tuple[str, ...]
    labels: tuple[str, ...] | None = None


def read_documents(
    path: str | os.PathLike[str], text_column: Column | None = None, label_column: Column | None = None
) -> Documents:
    """The documents of a UTF-8 file.

    `.csv` and `.tsv` (without quotes) are tables, `.jsonl` and `.ndjson` hold an object per line; anything else is
    text, whose documents lines with only `<|endoftext|>` end, or, where there are no such lines, one document per line.

    Args:
        path: the file.
        text_column: of a table: the name in its first row, or, for a table without such a row, the number from 0. Of
            JSON lines: the field, by default `text`.
        label_column: likewise; None for texts without labels.

    Raises:
        CoreInferError: a file that cannot be read, a column that is not there or not given, no documents.
    """
    file = to_path(path)
    content, digest = read_utf8(file)
    rows = _rows(file, content, text_column, label_column)
    kept = [row for row in rows if row[0].strip()]
    if not kept:
        raise CoreInferError(f"{file}: holds no documents; give a file with some text")
    return Documents(
        name=file.name,
        digest=digest,
        texts=tuple(row[0] for row in kept),
        labels=None if label_column is None else tuple(row[1] for row in kept),
    )


def _rows(path: Path, content: str, text_column: Column | None, label_column: Column | None) -> list[tuple[str, ...]]:
    """(text,) or (text, label) of every document, empty ones included."""
    kind = path.suffix.lower()
    labels = [] if label_column is None else [label_column]
    if kind in (".jsonl", ".ndjson"):
        return _json_lines(path, content, ["text" if text_column is None else text_column, *labels])
    if kind in (".csv", ".tsv"):
        if text_column is None:
            raise CoreInferError(f"{path}: is a table; name the column of the text, or its number from 0")
        return _table(path, content, [text_column, *labels])
    if kind == ".json":
        raise CoreInferError(f"{path}: give JSON lines, a .jsonl file with one object per line")
    if text_column is not None or labels:
        raise CoreInferError(f"{path}: plain text has no columns; give a .csv, .tsv or .jsonl file, or leave them out")
    return [(text,) for text in split_text(path, content)]


def read_table(path: Path, columns: Sequence[Column]) -> list[tuple[str, ...]]:
    """Columns of a table, row by row: a `.csv`, or any other file, whose values tabs separate and no quotes enclose.

    Args:
        path: the file.
        columns: names in its first row, or, for a table without such a row, numbers from 0.

    Raises:
        CoreInferError: as `read_documents`.
    """
    return _table(path, read_utf8(path)[0], columns)


def read_utf8(path: Path) -> tuple[str, str]:
    """The text of a UTF-8 file, its line ends those of Unix, and the SHA-256 of its bytes.

    Raises:
        CoreInferError: a file that cannot be read, or is not text in UTF-8.
    """
    try:
        path.name.encode()  # Python smuggles undecodable bytes of a file's name in as surrogates
        raw = read_bytes(path, MOST_TEXT)
        content = raw.decode("utf-8-sig").replace("\r\n", "\n")  # as editors on Windows save text
    except OSError as error:
        raise CoreInferError(f"{path}: {error.strerror or error}; name a text file") from error
    except UnicodeDecodeError as error:
        raise CoreInferError(
            f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); convert it, or name another file"
        ) from error
    except UnicodeEncodeError as error:
        raise CoreInferError(f"{str(path)!r}: its name is not valid text; rename it") from error
    if "\0" in content:
        raise CoreInferError(f"{path}: not text (NUL at character {content.index(chr(0))}); name a text file")
    return content, hashlib.sha256(raw).hexdigest()


def split_at_separators(content: str) -> list[str]:
    """What lines holding only `<|endoftext|>` end, empty documents left out."""
    return [part.strip("\n") for part in _SEPARATOR_LINE.split(content) if part.strip("\n")]


def split_text(path: Path, content: str) -> list[str]:
    """The documents of plain text: ended by separators where there are any, otherwise one per line."""
    if SEPARATOR not in content:
        return content.split("\n")
    documents = split_at_separators(content)
    if any(SEPARATOR in document for document in documents):
        raise CoreInferError(f"{path}: has {SEPARATOR} within a line; put it on a line of its own")
    return documents


def _table(path: Path, content: str, columns: Sequence[Column]) -> list[tuple[str, ...]]:
    # Strict: a quote that is never closed would swallow the rest of the file.
    form: dict[str, Any] = {"delimiter": ",", "strict": True} if path.suffix.lower() == ".csv" else _TABS
    try:
        rows = [row for row in csv.reader(io.StringIO(content, newline=""), **form) if row]
    except csv.Error as error:
        raise CoreInferError(f"{path}: not a table ({error}); check its quotes, or shorten its longest cell") from error
    for column in columns:
        if not isinstance(column, str | int) or isinstance(column, bool):
            raise CoreInferError(f"{path}: column {shown(column)}; give a name, or a number from 0")
    named = any(isinstance(column, str) for column in columns)
    header, body = (rows[0], rows[1:]) if named and rows else ([], rows)
    numbers = [_column_number(path, header, column) for column in columns]
    for i, row in enumerate(body, start=2 if named else 1):
        missing = next((number for number in numbers if number >= len(row)), None)
        if missing is not None:
            raise CoreInferError(
                f"{path}: row {i} has {len(row)} columns, none with number {missing}; count from 0, or name columns"
            )
    return [tuple(row[number] for number in numbers) for row in body]


def _column_number(path: Path, header: Sequence[str], column: Column) -> int:
    if isinstance(column, int):
        if column < 0:
            raise CoreInferError(f"{path}: column {column}; count columns from 0")
        return column
    if column not in header:
        names = ", ".join(shown_name(name) for name in header[:20]) or "nothing"
        raise CoreInferError(f"{path}: no column {column!r} in its first row ({names}); name one of these")
    return header.index(column)


def _json_lines(path: Path, content: str, fields: Sequence[Column]) -> list[tuple[str, ...]]:
    rows = []
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = parse_json(line)
        except ValueError as error:
            raise CoreInferError(f"{path}: line {number} is not JSON ({error}); mend or remove it") from error
        rows.append(tuple(_json_field(path, number, value, field) for field in fields))
    return rows


def _json_field(path: Path, number: int, value: object, field: Column) -> str:
    if not isinstance(field, str):
        raise CoreInferError(f"{path}: field {shown(field)}; JSON lines have names for their fields: give one")
    if not isinstance(value, dict) or field not in value:
        names = ", ".join(shown_name(name) for name in list(value)[:20]) if isinstance(value, dict) else "no object"
        raise CoreInferError(f"{path}: line {number} has no field {field!r} ({names}); name one that every line has")
    found = value[field]
    if not isinstance(found, str | int) or isinstance(found, bool):
        raise CoreInferError(f"{path}: line {number}: {field!r} is {shown(found)}; give a text, or a whole number")
    if isinstance(found, str) and not found.isprintable() and any("\ud800" <= c <= "\udfff" for c in found):
        raise CoreInferError(f"{path}: line {number}: {field!r} holds a lone surrogate, which is no character; mend it")
    return str(found)
