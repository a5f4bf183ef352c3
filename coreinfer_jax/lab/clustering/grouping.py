"""Texts into groups, by binary core-neuron vectors of one deep layer or by given topics (paper, section 3.3)."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor
from numbers import Real

import numpy as np

from coreinfer_jax.errors import CoreInferError, shown
from coreinfer_jax.progress import progress

# The paper groups by the 25th of 32 layers.
DEPTH = 25 / 32

# The elbow is looked for among 1 .. 12 groups.
MOST_GROUPS = 12

# k-means starts this often from different centroids and keeps the best.
STARTS = 10


@dataclass(frozen=True, eq=False)
class Grouping:
    """Texts in groups, numbered from the largest (of k-means) or in the order of their names (of topics).

    Attributes:
        assigned: int32 [n], the group of each text.
        centroids: float32 [C, F], the mean vector of each group's texts.
        names: one per group.
        within: the within-cluster sums of squares for 1, 2, ... groups that the elbow was found in; () without one.
    """

    assigned: np.ndarray
    centroids: np.ndarray
    names: tuple[str, ...]
    within: tuple[float, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Texts per group."""
        return tuple(np.bincount(self.assigned, minlength=len(self.names)).tolist())


def require_sklearn() -> None:
    """Refuse early what could not be grouped at the end."""
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise CoreInferError("k-means needs scikit-learn: pip install 'coreinfer_jax[clusters]'") from error


def deciding_layer(num_layers: int, depth: float = DEPTH) -> int:
    """The layer whose vectors decide on a text's group, at a fraction of depth in [0, 1); the paper's 25 of 32.

    Raises:
        CoreInferError: a depth outside [0, 1).
    """
    if not isinstance(depth, Real) or not 0 <= depth < 1:
        raise CoreInferError(f"depth={shown(depth)}: give a fraction of depth, at least 0 and below 1")
    return floor(depth * num_layers)


def check_seed(seed: object) -> None:
    """Refuse what k-means cannot be seeded with."""
    if type(seed) is not int or not 0 <= seed < 2**32:
        raise CoreInferError(f"seed={shown(seed)}: give a whole number from 0 to 2^32 - 1")


def check_groups_asked(k: object, texts: int, what: str) -> None:
    """Refuse a number of groups that is none, or above `texts`, the number of texts that `what` says more of."""
    if k is not None and (type(k) is not int or not 1 <= k <= texts):
        raise CoreInferError(f"k={shown(k)}: give a whole number of groups from 1 to {texts}, the {what}")


def group_by_labels(vectors: np.ndarray, labels: Sequence[str]) -> Grouping:
    """One group per distinct label.

    Args:
        vectors: bool [n, F].
        labels: of the n texts.
    """
    names, assigned = np.unique(np.asarray(labels, dtype=object).astype(str), return_inverse=True)
    return _grouping(vectors, assigned, tuple(names.tolist()), ())


def group_by_kmeans(vectors: np.ndarray, k: int | None, seed: int) -> Grouping:
    """Groups by k-means, their number by the elbow where it is not given.

    The elbow is the number of groups whose point on the curve of within-cluster sums of squares, for 1 .. 12 groups
    or as many as there are texts, is farthest below the chord between the curve's ends (Satopaa et al., "Finding a
    'Kneedle' in a Haystack", 2011, both axes scaled to [0, 1]).

    Args:
        vectors: bool [n, F].
        k: number of groups, or None.
        seed: of the starting centroids; the same seed gives the same groups.

    Raises:
        CoreInferError: fewer than two texts, more groups than different texts, scikit-learn is not installed.
    """
    require_sklearn()
    different = len(np.unique(np.packbits(vectors, axis=1), axis=0))
    if different < 2:
        raise CoreInferError(f"{len(vectors)} documents, {different} of them different: give at least two to group")
    check_groups_asked(k, different, "different documents")
    points = vectors.astype(np.float64)
    if k is not None:
        return _renumbered(vectors, _kmeans(points, k, seed)[0], ())
    numbers = progress(range(1, min(MOST_GROUPS, different) + 1), desc="k-means", unit="number of groups", leave=True)
    tried = [_kmeans(points, groups, seed) for groups in numbers]
    within = [distance for _, distance in tried]
    return _renumbered(vectors, tried[elbow(within)][0], tuple(within))


def elbow(within: Sequence[float]) -> int:
    """The index of the point farthest below the chord of a falling curve; the first where there is none below."""
    curve = np.asarray(within, np.float64)
    if len(curve) < 3 or curve[0] <= curve[-1]:
        return 0
    heights = (curve - curve[-1]) / (curve[0] - curve[-1])
    chord = 1 - np.arange(len(curve)) / (len(curve) - 1)
    # Rounded, so that a straight curve has no elbow.
    return int(np.argmax(np.round(chord - heights, 9)))


def _kmeans(points: np.ndarray, k: int, seed: int) -> tuple[np.ndarray, float]:
    """Assigned groups int [n] of `points` float64 [n, F], and the within-cluster sum of squares."""
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    # One thread: several add up in any order, and a tie could fall differently in a second run.
    with threadpool_limits(limits=1):
        fitted = KMeans(k, n_init=STARTS, random_state=seed, algorithm="lloyd").fit(points)
    assigned = np.asarray(fitted.labels_)
    grouped = [points[assigned == c] for c in np.unique(assigned)]
    return assigned, float(sum(np.square(group - group.mean(axis=0)).sum() for group in grouped))


def _renumbered(vectors: np.ndarray, assigned: np.ndarray, within: tuple[float, ...]) -> Grouping:
    """Groups numbered by size, the largest first, ties by their first text."""
    found, first, counts = np.unique(assigned, return_index=True, return_counts=True)
    order = np.lexsort((first, -counts))
    numbers = np.empty(int(found.max()) + 1, np.int64)
    numbers[found[order]] = np.arange(len(found))
    return _grouping(vectors, numbers[assigned], tuple(f"group {c}" for c in range(len(found))), within)


def _grouping(vectors: np.ndarray, assigned: np.ndarray, names: tuple[str, ...], within: tuple[float, ...]) -> Grouping:
    centroids = np.stack([vectors[assigned == c].mean(axis=0, dtype=np.float64) for c in range(len(names))])
    return Grouping(assigned.astype(np.int32), centroids.astype(np.float32), names, within)
