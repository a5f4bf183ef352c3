"""Answers, one JSON line each, in a file that a second run goes on with wherever the first one was stopped."""

import errno
import fcntl
import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import Any, BinaryIO

from coreinfer_jax.errors import CoreInferError, shown
from coreinfer_jax.files import check_same_settings, new_file, parse_json, read_json

# What a crash of the whole system may take with it.
SYNC_SECONDS = 5.0
SETTINGS_SUFFIX = ".settings.json"


def settings_path(path: Path) -> Path:
    """The file beside an output that says what it was made with."""
    return path.with_name(path.name + SETTINGS_SUFFIX)


class Output:
    """A file of answers; each is a JSON object whose `line` is the number of the line that it answers.

    Attributes:
        done: numbers of the lines that are answered.
    """

    def __init__(self, file: BinaryIO, done: set[int], in_order: bool) -> None:
        self.done = done
        self._file, self._in_order = file, in_order
        self._held: dict[int, Mapping[str, Any]] = {}
        self._next, self._synced = 1, monotonic()

    def write(self, answer: Mapping[str, Any]) -> None:
        """Add an answer, and hold it back where those of earlier lines are to come first."""
        if not self._in_order:
            self._append(answer)
            return
        self._held[answer["line"]] = answer
        while self._next in self._held or self._next in self.done:
            if self._next in self._held:
                self._append(self._held.pop(self._next))
            self._next += 1

    def _append(self, answer: Mapping[str, Any]) -> None:
        """Write a line in one piece: a process that is killed leaves whole lines, but perhaps for the last."""
        rest = memoryview((json.dumps(answer, ensure_ascii=False) + "\n").encode())
        while rest:
            rest = rest[self._file.write(rest) :]
        self.done.add(answer["line"])
        if monotonic() - self._synced > SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Force what was written to disk."""
        os.fsync(self._file.fileno())
        self._synced = monotonic()


@contextmanager
def opened(path: Path, settings: Mapping[str, Any], lines: int, in_order: bool) -> Iterator[Output]:
    """A new output, or one that was begun with the same settings, without a last line that was cut off.

    Args:
        path: of the output; `path.settings.json` says what it was begun with.
        settings: all that the answers follow from, as JSON has it.
        lines: of the input.
        in_order: whether answers stand in the order of the input.

    Raises:
        CoreInferError: a file of something else or of other settings, or one that another process writes.
    """
    with _locked(path) as file:
        if os.fstat(file.fileno()).st_size:
            _check_settings(path, settings)
        else:
            with new_file(settings_path(path)) as partial:
                partial.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        output = Output(file, _read_back(file, path, lines), in_order)
        try:
            yield output
        finally:
            output.sync()


@contextmanager
def _locked(path: Path) -> Iterator[BinaryIO]:
    try:
        # Without waiting for whoever should read a pipe.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise CoreInferError(f"{path}: {error.strerror}; name a file that can be written") from error
    with os.fdopen(descriptor, "r+b", buffering=0) as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise CoreInferError(f"{path}: no regular file; name one, which a second run can go on with")
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            raise CoreInferError(f"{path}: another batch writes it; wait for it, or name another file") from error
        yield file


def _check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    beside = settings_path(path)
    if not beside.is_file():
        raise CoreInferError(f"{path}: holds something, and {beside.name} is not beside it; name a new file")
    check_same_settings(path, read_json(beside), settings, "file")


def _read_back(file: BinaryIO, path: Path, lines: int) -> set[int]:
    """The numbers of the lines that are answered; the file is cut behind its last whole line, to go on from there."""
    done: set[int] = set()
    whole = 0
    with open(file.fileno(), "rb", closefd=False) as reading:
        for number, raw in enumerate(reading, start=1):
            if not raw.endswith(b"\n"):
                break
            done.add(_answered(path, number, raw, lines, done))
            whole += len(raw)
    file.truncate(whole)
    file.seek(whole)
    return done


def _answered(path: Path, number: int, raw: bytes, lines: int, done: set[int]) -> int:
    """The line that line `number` of an output answers."""
    try:
        value = parse_json(raw.decode("utf-8"))
    except ValueError as error:
        raise CoreInferError(f"{path}: line {number} is damaged ({error}); name a new file") from error
    answered = value.get("line") if isinstance(value, dict) else None
    if not isinstance(answered, int) or not 1 <= answered <= lines:
        raise CoreInferError(
            f"{path}: line {number} answers line {shown(answered)}, and the input has lines 1 .. {lines}; "
            "name a new file"
        )
    if answered in done:
        raise CoreInferError(f"{path}: line {number} answers line {answered} a second time; name a new file")
    return answered
