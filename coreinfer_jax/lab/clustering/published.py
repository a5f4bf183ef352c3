"""Published lists of neurons: groups that others found, most frequent neuron first."""

import hashlib
import os
import re
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np

from coreinfer_jax.errors import CoreInferError, shown, shown_name
from coreinfer_jax.files import new_directory, refuse_existing, to_path
from coreinfer_jax.io.loading import model_path, open_model
from coreinfer_jax.lab.clustering.build import VECTORS
from coreinfer_jax.lab.clustering.grouping import DEPTH, deciding_layer
from coreinfer_jax.lab.clustering.storage import write_clusters
from coreinfer_jax.model.config import ModelConfig
from coreinfer_jax.model.fingerprint import fingerprint_of, thinned
from coreinfer_jax.sparsity.groups import Clusters
from coreinfer_jax.sparsity.votes import kept_neurons

_ENTRY = re.compile(r"L(0|[1-9]\d{0,5})_C(0|[1-9]\d{0,5})")


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
    lists = read_lists(path, config)
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
        "data": {"name": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()},
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
    arrays = _read_archive(path)
    groups = 1 + max(c for _, c in arrays)
    expected = {(l, c) for l in range(config.num_layers) for c in range(groups)}
    if set(arrays) != expected:
        layers = 1 + max(l for l, _ in arrays)
        raise CoreInferError(
            f"{path}: holds {len(arrays)} lists of {layers} layers and {groups} groups, but the model has "
            f"{config.num_layers} layers; name the lists of this model"
        )
    for (l, c), neurons in arrays.items():
        _check_list(path, l, c, neurons, config.mlp_size)
    return [[arrays[l, c].astype(np.int64) for l in range(config.num_layers)] for c in range(groups)]


def _read_archive(path: Path) -> dict[tuple[int, int], np.ndarray]:
    try:
        with path.open("rb") as file, np.lib.npyio.NpzFile(file, allow_pickle=False) as archive:
            names = {name: _ENTRY.fullmatch(name) for name in archive.files}
            strange = next((name for name, match in names.items() if match is None), None)
            if strange is not None or not names:
                raise CoreInferError(f"{path}: {shown(strange)} is no L{{layer}}_C{{group}}; name a file of such lists")
            return {(int(match[1]), int(match[2])): archive[name] for name, match in names.items() if match}
    except OSError as error:
        raise CoreInferError(f"{path}: {error.strerror or error}; name a .npz file of lists") from error
    except (ValueError, EOFError, RuntimeError, TypeError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise CoreInferError(f"{path}: not a .npz archive ({shown_name(str(error))}); download it again") from error


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
