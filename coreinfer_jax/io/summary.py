"""What a checkpoint is, without loading it: `coreinfer info`."""

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import jax.numpy as jnp

from coreinfer_jax.checks import check_fraction
from coreinfer_jax.io.calibration_file import read_facts
from coreinfer_jax.io.loading import model_path, open_model, stored_fingerprint
from coreinfer_jax.io.mapping import DTYPES
from coreinfer_jax.io.tensors import StoredTensor
from coreinfer_jax.model.config import ModelConfig
from coreinfer_jax.model.structure import abstract_params
from coreinfer_jax.model.weights import weight_bytes_per_step
from coreinfer_jax.sparsity.stability import CoreConfig
from coreinfer_jax.sparsity.votes import kept_neurons
from coreinfer_jax.text import Tokenizer, load_tokenizer

PARTS = ("embeddings", "attention", "mlp", "norms")


@dataclass(frozen=True)
class Summary:
    """A checkpoint's facts.

    Attributes:
        config: the model.
        parameters: number of weights, a tied output projection counted once.
        dtype: of the stored weights, as GGUF files name types where it is one; several are joined by commas, the one
            with most bytes first.
        bytes_per_part: stored bytes of embeddings, attention, mlp and norms.
        kept_neurons: K at the keep ratio asked for.
        read_dtype: of the weights in memory that the next three are about: the widest of several; quantised weights
            are float32 there.
        bytes_per_token: weight bytes a decode step reads for one row, dense, in `read_dtype`.
        core_bytes_per_token: the same with every MLP narrowed to K neurons.
        cache_bytes_per_position: keys and values of one position, which a step reads besides.
        tokenizer: the tokenizer, None where there is none.
        fingerprint: see `coreinfer_jax.model.fingerprint`.
        calibration: the setting found for the model (None: all neurons) and how; None where there is no calibration.
    """

    config: ModelConfig
    parameters: int
    dtype: str
    bytes_per_part: dict[str, int]
    kept_neurons: int
    read_dtype: str
    bytes_per_token: int
    core_bytes_per_token: int
    cache_bytes_per_position: int
    tokenizer: Tokenizer | None
    fingerprint: str
    calibration: tuple[dict[str, Any] | None, Mapping[str, Any]] | None


def summarise(model: str | os.PathLike[str], beta: float | None = None) -> Summary:
    """Read a checkpoint's facts; of the weights only the few matrices of the fingerprint.

    Args:
        model: as for `load`.
        beta: keep ratio, in (0, 1]; None for that of the model's calibration, or `CoreConfig()`'s where it has none.

    Raises:
        CoreInferError: as `load`; a keep ratio outside its range.
    """
    if beta is not None:
        check_fraction("beta", beta)
    path = model_path(model)
    config, tensors = open_model(path)
    fingerprint = stored_fingerprint(config, tensors)
    calibration = read_facts(path, config, lambda: fingerprint)
    kept = kept_neurons(_calibrated_beta(calibration) if beta is None else beta, config.mlp_size)
    widest = jnp.dtype(max((_dtype(tensor) for tensor in tensors.values()), key=lambda dtype: dtype.itemsize))
    return Summary(
        config=config,
        parameters=sum(prod(tensor.shape) for tensor in tensors.values()),
        dtype=", ".join(_stored_types(tensors)),
        bytes_per_part=_bytes_per_part(tensors),
        kept_neurons=kept,
        read_dtype=widest.name,
        bytes_per_token=weight_bytes_per_step(abstract_params(config, widest), rows=1),
        core_bytes_per_token=weight_bytes_per_step(abstract_params(replace(config, mlp_size=kept), widest), rows=1),
        cache_bytes_per_position=2 * config.num_layers * config.num_kv_heads * config.head_size * widest.itemsize,
        tokenizer=load_tokenizer(path),
        fingerprint=fingerprint,
        calibration=calibration,
    )


def _calibrated_beta(calibration: tuple[dict[str, Any] | None, Mapping[str, Any]] | None) -> float:
    if calibration is None:
        return CoreConfig().beta
    core, _ = calibration
    return 1.0 if core is None else float(core["gamma"] if "gamma" in core else core["beta"])


def _dtype(tensor: StoredTensor) -> jnp.dtype:
    return jnp.dtype(DTYPES.get(tensor.dtype, DTYPES["float32"]))


def _stored(tensor: StoredTensor) -> tuple[str, int]:
    """The type and bytes of a tensor in its file."""
    return tensor.stored or (tensor.dtype, prod(tensor.shape) * jnp.dtype(tensor.dtype).itemsize)


def _stored_types(tensors: Mapping[str, StoredTensor]) -> list[str]:
    sizes: Counter[str] = Counter()
    for tensor in tensors.values():
        name, size = _stored(tensor)
        sizes[name] += size
    return [name for name, _ in sizes.most_common()]


def _bytes_per_part(tensors: dict[str, StoredTensor]) -> dict[str, int]:
    parts = dict.fromkeys(PARTS, 0)
    for name, tensor in tensors.items():
        parts[_part(name)] += _stored(tensor)[1]
    return parts


def _part(leaf: str) -> str:
    if "norm." in leaf:
        return "norms"
    return next((part for part in ("attention", "mlp") if f".{part}." in leaf), "embeddings")
