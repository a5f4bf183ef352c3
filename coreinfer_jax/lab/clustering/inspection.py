"""What clusters are, for people: sizes, overlaps, the documents that stand for each group."""

import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from coreinfer_jax.checks import check_fraction
from coreinfer_jax.files import to_path
from coreinfer_jax.lab.clustering.storage import read_clusters
from coreinfer_jax.sparsity.groups import Clusters
from coreinfer_jax.sparsity.similarity import Similarity


@dataclass(frozen=True, eq=False)
class Inspection:
    """Facts of a directory of clusters.

    Attributes:
        clusters: the clusters.
        facts: what clusters.json says of the texts and how they were grouped.
        gamma: the keep ratio that overlaps are of.
        overlaps: float64 [L, C, C]; the share of a group's K neurons that are also those of another.
    """

    clusters: Clusters
    facts: dict[str, Any]
    gamma: float
    overlaps: np.ndarray


def inspect_clusters(directory: str | os.PathLike[str], gamma: float | None = None) -> Inspection:
    """Look at a directory of clusters; a gamma of None is the default, or what published lists are long enough for.

    Raises:
        CoreInferError: as `load_clusters`; a gamma outside (0, 1], or that published lists are too short for.
    """
    if gamma is not None:
        check_fraction("gamma", gamma)
    stored = read_clusters(to_path(directory))
    ratio = min(Similarity().gamma, stored.clusters.largest_ratio()) if gamma is None else gamma
    return Inspection(stored.clusters, dict(stored.facts), ratio, overlaps(stored.clusters, ratio))


def overlaps(clusters: Clusters, gamma: float) -> np.ndarray:
    """The share of K neurons that any two groups have in common, in every layer: float64 [L, C, C]."""
    sets = clusters.sets(gamma, tuple(range(clusters.frequencies.shape[1])))
    C, L, F = clusters.frequencies.shape
    chosen = np.zeros((L, C, F), np.float64)
    for c, group in enumerate(sets):
        for l, indices in enumerate(group.layers):
            chosen[l, c, indices] = 1
    shared: np.ndarray = chosen @ chosen.swapaxes(1, 2)
    return shared / chosen[0, 0].sum()
