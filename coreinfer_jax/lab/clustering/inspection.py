"""What clusters are, for people: sizes, overlaps, the documents that stand for each group."""

import os
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from coreinfer_jax.files import to_path
from coreinfer_jax.lab.clustering.storage import read_clusters
from coreinfer_jax.model.config import CoreConfig
from coreinfer_jax.sparsity.groups import Clusters


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
    core = CoreConfig(gamma=gamma)
    stored = read_clusters(to_path(directory))
    if gamma is None:
        core = replace(core, gamma=min(core.group_ratio, stored.clusters.largest_ratio()))
    return Inspection(stored.clusters, dict(stored.facts), core.group_ratio, overlaps(stored.clusters, core))


def overlaps(clusters: Clusters, core: CoreConfig) -> np.ndarray:
    """The share of K neurons that any two groups have in common, in every layer: float64 [L, C, C]."""
    sets = clusters.sets(replace(core, layers=(0.0, 1.0)))
    C, L, F = clusters.frequencies.shape
    chosen = np.zeros((L, C, F), np.float64)
    for c, group in enumerate(sets):
        for l, indices in enumerate(group.layers):
            chosen[l, c, indices] = 1
    shared: np.ndarray = chosen @ chosen.swapaxes(1, 2)
    return shared / chosen[0, 0].sum()
