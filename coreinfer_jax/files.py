"""Small file matters: reading that cannot hang, JSON with clear errors, outputs that appear whole or not at all."""

import errno
import fcntl
import glob
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from coreinfer_jax.errors import CoreInferError, shown, shown_name

SETTINGS = "settings.json"
# Bytes that files may have: several times what the largest known ones do, and little enough to be held in memory.
MOST_JSON, MOST_VOCABULARY, MOST_TEXT = 1 << 25, 1 << 28, 1 << 32


def to_path(value: object) -> Path:
    """A path the caller gave.

    Raises:
        CoreInferError: something that is no path, or cannot be one on this system.
    """
    try:
        path = Path(value)  # type: ignore[arg-type]
        nul = b"\0" in os.fsencode(path)
    except (TypeError, ValueError) as error:
        raise CoreInferError(f"path={shown(value)}: give the path of a file or directory ({error})") from error
    if nul:
        raise CoreInferError(f"path={shown(value)}: holds a NUL; give the path of a file or directory")
    if not os.fspath(value):  # type: ignore[call-overload]
        raise CoreInferError("path='': give the path of a file or directory")
    return path


def is_directory(path: Path) -> bool:
    """Whether there is a directory `path`; no name is too long to ask."""
    return os.path.isdir(path)  # noqa: PTH112 - Path.is_dir raises for a name that is too long


def check_directory(path: Path) -> None:
    """Refuse a path that is no directory, or one whose files cannot be looked up."""
    if not is_directory(path):
        raise CoreInferError(f"{path}: no such directory; name one with a checkpoint, or a hub id (org/name)")
    if not os.access(path, os.R_OK | os.X_OK):
        raise CoreInferError(f"{path}: permission denied; make the directory readable")


def open_regular(path: Path) -> int:
    """A descriptor to read `path` by, which is the caller's to close.

    Raises:
        OSError: it cannot be opened, or is no regular file: a pipe could be waited for, and a device read, for ever.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # so that opening a pipe does not wait either
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.EINVAL, "not a regular file", str(path))


def read_bytes(path: Path, most: int) -> bytes:
    """What the regular file `path` holds.

    Raises:
        OSError: it cannot be opened, is no regular file, has more than `most` bytes, or is cut short meanwhile.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise OSError(errno.EFBIG, f"{size} bytes, where such a file has {most} at most", str(path))
        content = file.read(size)
    if len(content) < size:
        raise OSError(errno.EIO, "cut short while it was read", str(path))
    return content


def parse_json(text: str) -> Any:
    """The value that a JSON text stands for.

    Raises:
        ValueError: the text is no JSON, or nested more deeply than Python reads it.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def read_json(path: Path, most: int = MOST_JSON) -> dict[str, Any]:
    """The JSON object in `path`, of at most `most` bytes.

    Raises:
        CoreInferError: the file cannot be read, is no JSON, or holds something other than an object.
    """
    try:
        value = parse_json(read_bytes(path, most).decode("utf-8"))
    except OSError as error:
        raise CoreInferError(f"{path}: {error.strerror or error}; make it a readable file") from error
    except ValueError as error:
        raise CoreInferError(f"{path}: not valid JSON ({error}); download or write it again") from error
    if not isinstance(value, dict):
        raise CoreInferError(f"{path}: holds a JSON {type(value).__name__}, not an object")
    return value


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A temporary directory that becomes `path` in one rename when the block succeeds and vanishes when it fails.

    Raises:
        CoreInferError: `path` exists, its parent does not, or the disk is full or not writable.
    """
    refuse_existing(path)
    with _partial(path) as partial:
        try:
            yield partial
            _sync(partial)
            refuse_existing(path)
            _readable(partial)
            partial.rename(path)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise CoreInferError(f"{path}: {reason}; nothing was written") from error


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A temporary path whose file replaces `path` in one rename when the block succeeds and vanishes when it fails.

    Raises:
        CoreInferError: the disk is full or not writable; `path` is as it was.
    """
    with _partial(path) as partial:
        try:
            yield partial / path.name
            _sync(partial)
            _readable(partial)
            (partial / path.name).replace(path)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise CoreInferError(f"{path}: cannot be written ({reason}); it is left as it was") from error


def check_new_file(path: Path) -> None:
    """Refuse a path that `new_file` could not write, before there is anything to write.

    Raises:
        CoreInferError: it is a directory, or lies in none that can be written.
    """
    if is_directory(path):
        raise CoreInferError(f"{path}: is a directory; name a file")
    with _partial(path):
        pass


@contextmanager
def read_back(path: Path) -> Iterator[None]:
    """Let nothing take its place at `path` that its own reader, which the block calls, refuses.

    Raises:
        CoreInferError: the reader refused it.
    """
    try:
        yield
    except CoreInferError as error:
        raise CoreInferError(
            f"{path}: not written, because reading it back failed ({error}); please report this"
        ) from error


@contextmanager
def _partial(path: Path) -> Iterator[Path]:
    """A locked directory beside `path`, gone when the block ends; those of processes that were killed go first.

    Files are written into one too, because safetensors adds a temporary file of its own beside the one it writes.
    """
    remove_leftovers(path)
    with ExitStack() as stack:
        partial = _locked_directory(path, stack)
        stack.callback(shutil.rmtree, partial, ignore_errors=True)
        yield partial


def _locked_directory(path: Path, stack: ExitStack) -> Path:
    """A new directory beside `path` whose lock `stack` holds.

    Before it is locked it looks like a leftover, and another process may be removing it: then there is a next one.
    """
    while True:
        try:
            partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=path.parent))
        except OSError as error:
            raise CoreInferError(
                f"{path.parent}: {error.strerror or error}; name a directory that can be written"
            ) from error
        try:
            stack.enter_context(locked(partial))
        except (BlockingIOError, FileNotFoundError):
            continue
        if partial.is_dir():
            return partial


def copy_existing(source: Path, target: Path, names: Iterable[str]) -> None:
    """Copy those files `names` that are in directory `source` into directory `target`.

    Raises:
        CoreInferError: a file that cannot be read.
    """
    for name in names:
        if not (source / name).is_file():
            continue
        try:
            content = read_bytes(source / name, MOST_VOCABULARY)
        except OSError as error:
            raise CoreInferError(f"{source / name}: {error.strerror or error}; make it readable") from error
        (target / name).write_bytes(content)


def refuse_existing(path: Path) -> None:
    """Refuse an output path that is taken, or whose parent directory is missing."""
    try:
        taken = path.exists() or path.is_symlink()
    except OSError as error:
        raise CoreInferError(f"{path}: {error.strerror}; name another directory") from error
    if taken:
        raise CoreInferError(f"{path}: exists already; name a new directory or remove it first")
    if not path.parent.is_dir():
        raise CoreInferError(f"{path.parent}: no such directory; create it first")


def remove_leftovers(path: Path) -> None:
    """Remove what killed processes left half-written beside `path`: partial directories whose lock nobody holds."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.partial-*"):
        try:
            with locked(leftover):
                shutil.rmtree(leftover, ignore_errors=True)
        except OSError:
            continue  # another process is writing it, or it is not ours to remove


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold a directory's lock, which the system releases however the process ends; OSError where it is held."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def begun(directory: Path, settings: Mapping[str, Any], work: str) -> Iterator[None]:
    """Hold the directory of work that can be resumed: a new one, or one begun with the same `settings`.

    Args:
        directory: where the work is kept; `settings.json` in it says what it was begun with.
        settings: all that the results follow from, as JSON has it.
        work: what it is, in a word, for messages.

    Raises:
        CoreInferError: a directory of something else or of other settings, or one in which another process is at work.
    """
    if not is_directory(directory):
        with new_directory(directory) as partial:
            (partial / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    if not (directory / SETTINGS).is_file():
        raise CoreInferError(f"{directory}: holds no {work} ({SETTINGS} is not there); name a new directory")
    check_same_settings(directory, read_json(directory / SETTINGS), settings, "directory")
    with alone(directory, work):
        yield


def check_same_settings(path: Path, before: Mapping[str, Any], settings: Mapping[str, Any], what: str) -> None:
    """Refuse to go on with `path`, a `what`, with settings other than those it was begun with.

    Raises:
        CoreInferError: they differ; all that do are named.
    """
    changed = [name for name in {**before, **settings} if before.get(name) != settings.get(name)]
    if changed:
        told = ", ".join(shown_name(name) for name in changed)
        raise CoreInferError(
            f"{path}: was begun with other settings ({told}); repeat them, or remove it, or name a new {what}"
        )


@contextmanager
def alone(directory: Path, work: str) -> Iterator[None]:
    """Keep other processes from the same work in a directory.

    Args:
        directory: which is there.
        work: what it is, in a word, for messages.

    Raises:
        CoreInferError: another process is at it.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(directory))
        except BlockingIOError as error:
            raise CoreInferError(
                f"{directory}: another {work} is at work here; wait for it, or name a new directory"
            ) from error
        yield


def _readable(directory: Path) -> None:
    """Give a directory and its files the usual permissions; mkdtemp and safetensors leave them to the owner alone."""
    directory.chmod(0o755)
    for file in directory.iterdir():
        file.chmod(0o644)


def _sync(directory: Path) -> None:
    """Force files to disk before the rename, so that a crash cannot leave a whole-looking directory of holes."""
    for file in [*directory.iterdir(), directory]:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
