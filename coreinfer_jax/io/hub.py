"""Fetching a checkpoint from the Hugging Face hub, only when the user names a hub id."""

import os
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from coreinfer_jax.errors import CoreInferError
from coreinfer_jax.text import TOKENIZER_FILES


def looks_like_hub_id(source: str) -> bool:
    """Whether `source` is no existing path and has the form `organisation/name`."""
    exists = os.path.exists(source)  # noqa: PTH110 - Path.exists raises for a name that is too long
    return not exists and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source) is not None


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
    raise CoreInferError("the repository holds neither safetensors nor PyTorch .bin weights")


def fetch(hub_id: str) -> Path:
    """Download a checkpoint into the hub's own cache and return its directory.

    Raises:
        CoreInferError: no network, no such repository, no access, or no weights in it.
    """
    from huggingface_hub import HfApi, snapshot_download

    try:
        files = needed_files(HfApi().list_repo_files(hub_id))
        if any(file.endswith(".bin") for file in files) and find_spec("torch") is None:
            raise CoreInferError("holds only .bin weights, which need PyTorch; pip install 'coreinfer_jax[torch]'")
        return Path(snapshot_download(hub_id, allow_patterns=files))
    except CoreInferError as error:
        raise CoreInferError(f"{hub_id}: {error}") from error
    except Exception as error:  # the hub client raises its own, its HTTP library's and the system's errors
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CoreInferError(
            f"{hub_id}: no such directory here, and the hub could not be reached or refused ({reason}); "
            "check the name and the network, or give a local directory"
        ) from error
