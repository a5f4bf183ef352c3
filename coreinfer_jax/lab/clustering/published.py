"""Published lists of neurons: groups that others found, most frequent neuron first."""

import hashlib
import io
import os
import re
import zipfile
from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np

from coreinfer_jax.errors import CoreInferError, shown, shown_name
from coreinfer_jax.files import new_directory, read_bytes, refuse_existing, to_path
from coreinfer_jax.io.loading import model_path, open_model
from coreinfer_jax.lab.clustering.build import VECTORS
from coreinfer_jax.lab.clustering.grouping import DEPTH, deciding_layer
from coreinfer_jax.lab.clustering.storage import write_clusters
from coreinfer_jax.model.config import ModelConfig
from coreinfer_jax.model.fingerprint import fingerprint_of, thinned
from coreinfer_jax.sparsity.groups import Clusters
from coreinfer_jax.sparsity.votes import kept_neurons
from coreinfer_jax.text.tokenizer_files import reason

_ENTRY = re.compile(r"L(0|[1-9]\d{0,5})_C(0|[1-9]\d{0,5})")
# What NumPy writes before a list's numbers, with room to spare; what all lists of a file may take.
_HEADER_BYTES, _MOST_BYTES = 4096, 1 << 28


def import_published(
    source: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    model: str | os.PathLike[str],
    *,
    depth: float = DEPTH,
    beta: float = VECTORS.beta,
) -> Clusters:
    """Published lists as a directory of clusters for a model.

    The lists give an order and no frequencies, so any keep ratio up to their length can be taken and `fused` cannot.
    They say nothing of how a prompt finds its group either: a group's centroid is the vector of the first
    max(1, floor(beta F)) neurons of its list in the deciding layer, so a prompt belongs to the group whose first
    neurons overlap most with its own.

    Args:
        source: a `.npz` file with an integer array `L{layer}_C{group}` of neurons for every layer and group.
        directory: to write; must not exist.
        model: the checkpoint they belong to, as for `load`; its weights are not loaded.
        depth: of the layer that decides, as a fraction.
        beta: share of F in a prompt's vector.

    Raises:
        CoreInferError: no such file, one that is no archive of lists, lists that do not fit the model or are too
            short for `beta` in the deciding layer, an unusable directory.
    """
    path, target = to_path(source), to_path(directory)
    refuse_existing(target)
    vectors = replace(VECTORS, beta=beta)
    config, tensors = open_model(model_path(model))
    layer = deciding_layer(config.num_layers, depth)
    content = _content(path)
    lists = lists_in(content, config, path)
    kept = kept_neurons(vectors.beta, config.mlp_size)
    shortest = min(len(group[layer]) for group in lists)
    if shortest < kept:
        raise CoreInferError(
            f"{path}: its shortest list in layer {layer} has {shortest} neurons, fewer than the {kept} of beta={beta}; "
            "give a smaller --beta, or another --depth"
        )
    clusters = Clusters(
        frequencies=np.stack([[_descending(neurons, config.mlp_size) for neurons in group] for group in lists]),
        centroids=np.stack([_indicator(group[layer][:kept], config.mlp_size) for group in lists]),
        names=tuple(f"group {c}" for c in range(len(lists))),
        sizes=(0,) * len(lists),
        layer=layer,
        vectors=vectors,
        origin="published",
        fingerprint=fingerprint_of(config, lambda name: thinned(tensors[name].read())),
    )
    lengths = [len(neurons) for group in lists for neurons in group]
    facts = {
        "data": {"name": path.name, "sha256": hashlib.sha256(content).hexdigest()},
        "list_lengths": {"shortest": min(lengths), "longest": max(lengths)},
    }
    with new_directory(target) as partial:
        write_clusters(partial, clusters, facts, np.zeros(0, np.int32))
    return clusters


def read_lists(path: Path, config: ModelConfig) -> list[list[np.ndarray]]:
    """Neurons by group and layer, most frequent first: int64 [n], n differing from list to list.

    Raises:
        CoreInferError: as `import_published`.
    """
    return lists_in(_content(path), config, path)


def _content(path: Path) -> bytes:
    try:
        return read_bytes(path, _MOST_BYTES)
    except OSError as error:
        raise CoreInferError(f"{path}: {error.strerror or error}; name a .npz file of lists") from error


def lists_in(content: bytes, config: ModelConfig, path: Path) -> list[list[np.ndarray]]:
    """`read_lists` of a file's content; `path` is named in errors."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            arrays = _read_archive(path, archive, config)
    except CoreInferError:
        raise
    # NumPy, zipfile and what decompresses raise their own, and NumPy those of Python's own parser.
    except Exception as error:
        raise CoreInferError(f"{path}: not a .npz archive ({shown_name(reason(error))}); download it again") from error
    for (l, c), neurons in arrays.items():
        _check_list(path, l, c, neurons, config.mlp_size)
    groups = len(arrays) // config.num_layers
    return [[arrays[l, c].astype(np.int64) for l in range(config.num_layers)] for c in range(groups)]


def _read_archive(path: Path, archive: zipfile.ZipFile, config: ModelConfig) -> dict[tuple[int, int], np.ndarray]:
    """The lists by layer and group, whose names and sizes are checked before anything is unpacked."""
    members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
    names = {name: _ENTRY.fullmatch(name) for name in members}
    strange = next((name for name, match in names.items() if match is None), None)
    if strange is not None or not names:
        raise CoreInferError(f"{path}: {shown(strange)} is no L{{layer}}_C{{group}}; name a file of such lists")
    numbers = {name: (int(match[1]), int(match[2])) for name, match in names.items() if match}
    layers, groups = (1 + max(axis) for axis in zip(*numbers.values(), strict=True))
    if layers != config.num_layers or len(numbers) != layers * groups:
        raise CoreInferError(
            f"{path}: holds {len(numbers)} lists of {layers} layers and {groups} groups, but the model has "
            f"{config.num_layers} layers; name the lists of this model"
        )
    most = _HEADER_BYTES + config.mlp_size * np.dtype(np.int64).itemsize
    for name, member in members.items():
        if member.file_size > most:
            raise CoreInferError(
                f"{path}: {name} takes {member.file_size} bytes, but the model has {config.mlp_size} neurons per "
                "layer; name the lists of this model"
            )
    if sum(member.file_size for member in members.values()) > _MOST_BYTES:
        raise CoreInferError(f"{path}: its lists take more than {_MOST_BYTES} bytes; take fewer groups")
    return {numbers[name]: _read_list(archive.read(member)) for name, member in members.items()}


def _read_list(member: bytes) -> np.ndarray:
    """The array in a `.npy` file, whose header must not promise more than the file holds: NumPy would make room."""
    content = io.BytesIO(member)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    shape, _, dtype = read_header[np.lib.format.read_magic(content)](content)
    if prod(shape) * dtype.itemsize != len(member) - content.tell():
        raise ValueError(f"an array {list(shape)} of {dtype} in {len(member)} bytes")
    content.seek(0)
    array: np.ndarray = np.lib.format.read_array(content, allow_pickle=False)
    return array


def _check_list(path: Path, layer: int, group: int, neurons: np.ndarray, mlp_size: int) -> None:
    what = f"{path}: L{layer}_C{group}"
    if neurons.ndim != 1 or not neurons.size or not np.issubdtype(neurons.dtype, np.integer):
        raise CoreInferError(f"{what} is {neurons.dtype} {list(neurons.shape)}; give a list of neuron numbers")
    if neurons.min() < 0 or neurons.max() >= mlp_size:
        raise CoreInferError(
            f"{what} holds neurons {neurons.min()} .. {neurons.max()}, but the model has {mlp_size} per layer; "
            "name the lists of this model"
        )
    if len(np.unique(neurons)) < len(neurons):
        raise CoreInferError(f"{what} holds a neuron twice; download it again")


def _descending(neurons: np.ndarray, mlp_size: int) -> np.ndarray:
    """Numbers above 0 that fall down the list, 0 for neurons that are not on it: float32 [F]."""
    frequencies = np.zeros(mlp_size, np.float32)
    frequencies[neurons] = (len(neurons) - np.arange(len(neurons))) / len(neurons)
    return frequencies


def _indicator(neurons: np.ndarray, mlp_size: int) -> np.ndarray:
    vector = np.zeros(mlp_size, np.float32)
    vector[neurons] = 1
    return vector
