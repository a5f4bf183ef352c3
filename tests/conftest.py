"""Strictness for every test, and where the data beside the project is."""

import os
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


@pytest.fixture(scope="session")
def data() -> Path:
    """Real models, texts and tokenizers; named by COREINFER_DATA, by default ../shared/data beside the repository."""
    if not DATA.is_dir():
        pytest.skip(f"no data beside the project: set COREINFER_DATA, {DATA} is no directory")
    return DATA


@pytest.fixture(scope="session")
def tinystories(data: Path) -> Path:
    return data / "models" / "tinystories-656k"
