"""Small file matters: JSON with clear errors, directories that appear whole or not at all."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from coreinfer_jax.errors import CoreInferError


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        CoreInferError: the file cannot be read, is no JSON, or holds something other than an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CoreInferError(f"{path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
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
    try:
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=path.parent))
    except OSError as error:
        raise CoreInferError(
            f"{path.parent}: {error.strerror or error}; name a directory that can be written"
        ) from error
    try:
        yield partial
        _sync(partial)
        refuse_existing(path)
        partial.chmod(0o755)
        partial.rename(path)
    except OSError as error:
        raise CoreInferError(f"{path}: {error.strerror or error}; nothing was written") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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


def _sync(directory: Path) -> None:
    """Force files to disk before the rename, so that a crash cannot leave a whole-looking directory of holes."""
    for file in [*directory.iterdir(), directory]:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
