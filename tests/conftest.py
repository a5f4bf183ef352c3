"""Strictness for every test, and where the data beside the project is."""

import os
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

# Silent promotion hides mistakes in model code; warnings are errors through pyproject.toml.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# GPUs may otherwise multiply float32 in TF32, which is too coarse to compare with.
jax.config.update("jax_default_matmul_precision", "highest")

REPOSITORY = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("COREINFER_DATA", REPOSITORY.parent / "shared" / "data"))


# Compiled programs each take several of the 65530 memory maps that Linux allows a process; beyond it XLA crashes.
MOST_MAPS = 30_000


@pytest.fixture(scope="module", autouse=True)
def few_maps() -> Iterator[None]:
    """Forget compiled programs, between files, where a process holds many."""
    yield
    maps = Path("/proc/self/maps")
    if maps.is_file() and maps.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()


@pytest.fixture(scope="session")
def data() -> Path:
    """Real models, texts and tokenizers; named by COREINFER_DATA, by default ../shared/data beside the repository."""
    if not DATA.is_dir():
        pytest.skip(f"no data beside the project: set COREINFER_DATA, {DATA} is no directory")
    return DATA


@pytest.fixture(scope="session")
def tinystories(data: Path) -> Path:
    return data / "models" / "tinystories-656k"
