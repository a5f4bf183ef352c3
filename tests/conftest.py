"""Strictness for every test, and where the data beside the project is."""

import atexit
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import mkdtemp

import jax
import pytest

from coreinfer_jax.engine import lossless
from tests.stand_ins import write_data, write_shallow

# Silent promotion hides mistakes in model code; warnings are errors through pyproject.toml.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# GPUs may otherwise multiply float32 in TF32, which is too coarse to compare with.
jax.config.update("jax_default_matmul_precision", "highest")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--one-of-each", action="store_true", help="run only the first case of every parametrized test")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--one-of-each"):
        return
    first = set({item.nodeid.partition("[")[0]: item for item in reversed(items)}.values())
    config.hook.pytest_deselected(items=[item for item in items if item not in first])
    items[:] = [item for item in items if item in first]


# Most of the time of a test run would go into optimising small programs. Without, the suite takes half of it, and half
# of that with the older emitter, which the newer JAX does not have: an unknown flag ends the process. Set XLA_FLAGS, to
# nothing for XLA's own choice, to test what is optimised: .ci/long does so where numbers depend on it, .ci/run in part.
HAS_OLDER_EMITTER = jax.__version_info__ < (0, 11)
QUICK_TO_COMPILE = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
OLDER_EMITTER = " --xla_cpu_use_fusion_emitters=false" if HAS_OLDER_EMITTER else ""
os.environ.setdefault("XLA_FLAGS", QUICK_TO_COMPILE + OLDER_EMITTER)


# Of this machine's processors JAX makes so many devices, for models that are spread over several.
jax.config.update("jax_num_cpu_devices", 8)


def share_programs() -> None:
    """Compile equal programs once for all processes of a run: the workers of xdist, and commands that tests start."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    directory = mkdtemp(prefix="coreinfer-programs-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    settings = {
        "jax_compilation_cache_dir": directory,
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    for name, value in settings.items():
        os.environ[name.upper()] = str(value)
        jax.config.update(name, value)


share_programs()

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


@pytest.fixture
def drafts_always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every lossless pass verifies a draft of one step of core neurons, where there are any, whatever that costs."""
    monkeypatch.setattr(lossless, "BEST", 2)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Published models, texts and tokenizers; named by COREINFER_DATA, by default ../shared/data beside the project."""
    if not DATA.is_dir():
        pytest.skip(f"only published data has these values: set COREINFER_DATA, {DATA} is no directory")
    return DATA


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published data where it is there, else what stands for it under the same names."""
    return DATA if DATA.is_dir() else write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def tinystories(data: Path) -> Path:
    return data / "models" / "tinystories-656k"


@pytest.fixture(scope="session")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The embedded models cut down to two layers, by family: real tokenizers and words, a quarter of the compiling."""
    directory = tmp_path_factory.mktemp("shallow")
    return {family: write_shallow(family, directory / family) for family in ("opt", "llama")}
