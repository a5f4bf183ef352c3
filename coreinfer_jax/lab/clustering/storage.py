"""A directory of clusters: `clusters.json` says what they are, `clusters.safetensors` holds the numbers."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from coreinfer_jax.errors import CoreInferError, shown, shown_name
from coreinfer_jax.files import is_directory, read_back, read_json, to_path
from coreinfer_jax.io.held import load_arrays
from coreinfer_jax.sparsity.groups import Clusters, TextVectors
from coreinfer_jax.sparsity.rules import Votes

MANIFEST, ARRAYS = "clusters.json", "clusters.safetensors"
FORMAT, VERSION = "coreinfer_jax clusters", 1


@dataclass(frozen=True, eq=False)
class Stored:
    """A directory of clusters.

    Attributes:
        clusters: what is needed to predict.
        facts: what else clusters.json says, of the texts and how they were grouped.
        assigned: int32 [n], the group of every document; empty where not known.
    """

    clusters: Clusters
    facts: Mapping[str, Any]
    assigned: np.ndarray


def voting_settings(vectors: TextVectors) -> dict[str, Any]:
    """How texts get their vectors, as files have it."""
    votes = vectors.votes
    return {"alpha": votes.alpha, "beta": vectors.beta, "budget": votes.budget, "count_bos": vectors.count_bos}


def _text_vectors(voting: Mapping[str, Any]) -> TextVectors:
    votes = Votes(alpha=voting["alpha"], budget=voting["budget"])
    return TextVectors(votes=votes, beta=voting["beta"], count_bos=voting["count_bos"])


def write_clusters(directory: Path, clusters: Clusters, facts: Mapping[str, Any], assigned: np.ndarray) -> None:
    """Write clusters into an empty directory.

    Raises:
        CoreInferError: `read_clusters` does not take them.
    """
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "model": clusters.fingerprint,
        "origin": clusters.origin,
        "layer": clusters.layer,
        "voting": voting_settings(clusters.vectors),
        "names": clusters.names,
        "sizes": clusters.sizes,
        "facts": facts,
    }
    arrays = {"frequencies": clusters.frequencies, "centroids": clusters.centroids, "assigned": assigned}
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, directory / ARRAYS)
    text = json.dumps(manifest, indent=2, ensure_ascii=False)
    (directory / MANIFEST).write_text(text + "\n", encoding="utf-8")
    with read_back(directory):
        read_clusters(directory)


def load_clusters(directory: str | os.PathLike[str]) -> Clusters:
    """The clusters in a directory that `coreinfer clusters build` or `import` wrote.

    Raises:
        CoreInferError: no such directory, one that is half-written, damaged or of another version.
    """
    return read_clusters(to_path(directory)).clusters


def read_clusters(directory: Path) -> Stored:
    """All that a directory of clusters holds; errors as `load_clusters`."""
    if not is_directory(directory):
        raise CoreInferError(f"{directory}: no such directory; build clusters with 'coreinfer clusters build'")
    missing = [name for name in (MANIFEST, ARRAYS) if not (directory / name).is_file()]
    if missing:
        raise CoreInferError(f"{directory}: no clusters, {missing[0]} is missing; build them again")
    manifest = read_json(directory / MANIFEST)
    if manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
        found = f"format {shown(manifest.get('format'))}, version {shown(manifest.get('version'))}"
        raise CoreInferError(f"{directory / MANIFEST}: {found}; this release reads version {VERSION}, build them again")
    try:
        return _stored(manifest, load_arrays(directory / ARRAYS)[1])
    except (OSError, SafetensorError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        reason = shown_name(str(error))
        raise CoreInferError(f"{directory}: damaged clusters ({reason}); build them again") from error


def _stored(manifest: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Stored:
    clusters = Clusters(
        frequencies=arrays["frequencies"],
        centroids=arrays["centroids"],
        names=tuple(manifest["names"]),
        sizes=tuple(manifest["sizes"]),
        layer=manifest["layer"],
        vectors=_text_vectors(manifest["voting"]),
        origin=manifest["origin"],
        fingerprint=manifest["model"],
    )
    _check(clusters, arrays["assigned"])
    facts = dict(manifest["facts"])
    _check_facts(facts, len(clusters.names))
    return Stored(clusters, facts, arrays["assigned"])


def _check_facts(facts: Mapping[str, Any], groups: int) -> None:
    """Raise ValueError or the like unless the facts can be shown."""
    nearest = facts.get("nearest", [[]] * groups)
    if not isinstance(facts["data"]["name"], str) or len(nearest) != groups:
        raise ValueError("its facts do not say what the groups were made from")
    for near in (document for group in nearest for document in group):
        if (type(near["document"]), type(near["distance"]), type(near["text"])) != (int, float, str):
            raise ValueError("its facts hold documents that are none")


def _check(clusters: Clusters, assigned: np.ndarray) -> None:
    """Raise ValueError unless everything fits together."""
    frequencies, centroids = clusters.frequencies, clusters.centroids
    C, L, F = frequencies.shape
    if not C or centroids.shape != (C, F) or len(clusters.names) != C or len(clusters.sizes) != C:
        raise ValueError("its arrays are of different numbers of groups or neurons")
    if frequencies.dtype != np.float32 or centroids.dtype != np.float32 or assigned.dtype != np.int32:
        raise ValueError("its arrays are of other types")
    shares = all(bool(((array >= 0) & (array <= 1)).all()) for array in (frequencies, centroids))
    if not shares or not ((assigned >= 0) & (assigned < C)).all():
        raise ValueError("its numbers are out of range")
    if type(clusters.layer) is not int or not 0 <= clusters.layer < L:
        raise ValueError(f"layer {shown(clusters.layer)} of {L}")
    if clusters.origin not in ("topics", "k-means", "published") or not isinstance(clusters.fingerprint, str):
        raise ValueError("it does not say what it was made from")
    if not all(isinstance(name, str) for name in clusters.names) or not all(type(n) is int for n in clusters.sizes):
        raise ValueError("its groups have no names or sizes")
