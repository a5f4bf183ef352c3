"""Checkpoints of the Hugging Face hub, downloaded only when the user names one: `org/name`, `org/name:FILE.gguf`.

They stay in the hub client's own cache. A calibration is written there too, beside the links to the weights: it belongs
to these very weights, as the folder of a revision does, and the client neither removes nor counts as damage what it
did not put there. Whoever deletes the revision deletes the calibration with it.
"""

import glob
import os
import re
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from coreinfer_jax.errors import CoreInferError, shown_name
from coreinfer_jax.io.gguf import part_names
from coreinfer_jax.text import TOKENIZER_FILES

_NAME = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?::([^:\0]+\.gguf))?")


def looks_like_hub_id(source: str) -> bool:
    """Whether `source` is no existing path and has the form `org/name` or `org/name:FILE.gguf`."""
    exists = os.path.exists(source)  # noqa: PTH110 - Path.exists raises for a name that is too long
    return not exists and _NAME.fullmatch(source) is not None


def needed_files(available: Sequence[str]) -> list[str]:
    """The files to fetch among a repository's: configs, tokenizer, and one set of weights, safetensors preferred."""
    texts = {"config.json", "generation_config.json", *TOKENIZER_FILES}
    for suffix, pattern in (
        ("safetensors", r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?"),
        ("bin", r"pytorch_model(-\d+-of-\d+)?\.bin(\.index\.json)?"),
    ):
        weights = [name for name in available if re.fullmatch(pattern, name)]
        if any(name.endswith(suffix) for name in weights):
            return sorted([name for name in available if name in texts] + weights)
    if ggufs := _told_ggufs(available):
        raise CoreInferError(f"the repository holds GGUF files; name one behind a colon: {ggufs}")
    raise CoreInferError("the repository holds neither safetensors nor PyTorch .bin weights")


def needed_parts(available: Sequence[str], file: str) -> list[str]:
    """The files to fetch among a repository's for its GGUF file `file`: all parts of one that is split."""
    parts = part_names(file)
    if missing := [part for part in parts if part not in available]:
        there = _told_ggufs(available) or "no GGUF files"
        raise CoreInferError(f"{shown_name(missing[0])} is not in the repository; there are {there}")
    return parts


def _told_ggufs(available: Sequence[str]) -> str:
    """The first few of a repository's GGUF files, for a message; of those that are split, the first parts."""
    found = sorted(name for name in available if name.endswith(".gguf") and name == part_names(name)[0])
    return ", ".join(map(shown_name, found[:8])) + (f" and {len(found) - 8} more" if len(found) > 8 else "")


@cache
def fetch(name: str) -> Path:
    """Download what a model needs into the hub client's cache: the path of its directory, or of its GGUF file.

    A command asks more than once for a model's path; a process keeps to the revision that it found first.

    Args:
        name: for which `looks_like_hub_id` is true.

    Raises:
        CoreInferError: no network and nothing in the cache, no such repository, no access, or no weights in it.
    """
    from huggingface_hub import HfApi, snapshot_download

    match = _NAME.fullmatch(name)
    assert match is not None, "only names of the hub's form are fetched"
    repository, file = match.groups()
    try:
        available = [sibling.rfilename for sibling in HfApi().model_info(repository).siblings or []]
    except Exception as error:  # the hub client raises its own, its HTTP library's and the system's errors
        cached = _cached(repository, file)
        if cached is None:
            raise _unreachable(name, error) from error
        return cached
    try:
        files = needed_files(available) if file is None else needed_parts(available, file)
    except CoreInferError as error:
        raise CoreInferError(f"{name}: {error}") from error
    if any(needed.endswith(".bin") for needed in files) and find_spec("torch") is None:
        raise CoreInferError(f"{name}: holds only .bin weights, which need PyTorch; pip install 'coreinfer_jax[torch]'")
    try:
        directory = Path(snapshot_download(repository, allow_patterns=[glob.escape(needed) for needed in files]))
    except Exception as error:
        raise _unreachable(name, error) from error
    return directory if file is None else directory / file


def _cached(repository: str, file: str | None) -> Path | None:
    """What an earlier download left of a model, None for nothing."""
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(repository, file or "config.json")
    except ValueError:  # a name that the hub does not allow
        return None
    if not isinstance(found, str):
        return None
    return Path(found) if file is not None else Path(found).parent


def _unreachable(name: str, error: Exception) -> CoreInferError:
    from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError

    if isinstance(error, OfflineModeIsEnabled):
        return CoreInferError(
            f"{name}: not on this disk, not in the hub's cache, and HF_HUB_OFFLINE forbids to download it; "
            "unset that, or give a local directory or file"
        )
    if isinstance(error, RepositoryNotFoundError):  # which a gated one is as well
        return CoreInferError(
            f"{name}: not on this disk, and the hub has no such repository or does not show it to you; check the name, "
            "or ask for access and run 'hf auth login'"
        )
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return CoreInferError(
        f"{name}: no such directory here, and the hub could not be reached or refused ({reason}); "
        "check the name and the network, or give a local directory"
    )
