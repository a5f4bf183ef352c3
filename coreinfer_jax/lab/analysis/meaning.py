"""Whether texts of one topic (paper, Fig. 4, 9), or of like meaning (Table 1), have like core neurons."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from coreinfer_jax.checks import check_finite
from coreinfer_jax.errors import CoreInferError, shown
from coreinfer_jax.lab.analysis.inputs import LEAST_PAIRS, Inputs, Pairs
from coreinfer_jax.lab.analysis.observe import core_masks
from coreinfer_jax.lab.clustering.build import TOKENS_PER_DOCUMENT
from coreinfer_jax.lab.clustering.counting import plan_batches
from coreinfer_jax.lab.reading import read_whole
from coreinfer_jax.model import MlpPass
from coreinfer_jax.model.weights import Layer, Params
from coreinfer_jax.progress import progress
from coreinfer_jax.sparsity.votes import Voting, all_finite, count_votes, kept_neurons, make_voting
from coreinfer_jax.text.documents import Documents

NEIGHBOURS = 5
MOST_LABELS = 20
SHUFFLES = 8

# Layers shown as maps, spread over the depth.
PANELS = 4


def topics(inputs: Inputs) -> dict[str, Any]:
    """How well texts' core neurons tell their labels, layer by layer.

    Measured on binary core-neuron vectors [n, F] with Euclidean distances: the silhouette of the labels (1 for tight
    and separate) and, to compare with, of the same labels shuffled; and how often the most frequent label among a
    text's 5 nearest other texts is its own (leave one out; ties to the label that sorts first). `projection` is the
    first two principal components.
    """
    assert inputs.topics is not None, "the part is left out without topics"
    numbers = topic_texts(inputs.topics, inputs.texts, inputs.seed)
    labels = np.array([_labels(inputs.topics)[number] for number in numbers])
    names, counts = np.unique(labels, return_counts=True)
    rows = _encoded(inputs, [inputs.topics.texts[number] for number in numbers], "tokenising topics")
    packed = core_vectors(inputs, rows, "topics")
    F, L = inputs.config.mlp_size, inputs.config.num_layers
    measured = [_topics_of_layer(of_layer(packed, l, F).astype(float), labels, inputs.seed) for l in range(L)]
    panels = np.unique(np.linspace(0, L - 1, min(L, PANELS)).round().astype(int)).tolist()
    return {
        **inputs.facts(),
        "texts": len(rows),
        "texts_per_label": dict(zip(names.tolist(), counts.tolist(), strict=True)),
        "most_tokens": TOKENS_PER_DOCUMENT,
        "neighbours": NEIGHBOURS,
        "chance": counts.max() / counts.sum(),
        "silhouette": [silhouette for silhouette, _, _ in measured],
        "shuffled_silhouette": [shuffled for _, shuffled, _ in measured],
        "accuracy": [accuracy for _, _, accuracy in measured],
        "labels": labels.tolist(),
        "projection": {str(l): _projection(of_layer(packed, l, F).astype(float)) for l in panels},
    }


def topic_texts(documents: Documents, per_label: int, seed: int) -> list[int]:
    """Numbers of up to `per_label` documents of every label, drawn by `seed`.

    Raises:
        CoreInferError: fewer than two labels, or more than a map can tell apart, a label with a single document, too
            few for 5 neighbours.
    """
    labels = np.array(_labels(documents))
    order = np.random.default_rng(seed).permutation(len(labels))
    names, counts = np.unique(labels, return_counts=True)
    if len(names) < 2:
        raise CoreInferError(f"{documents.name}: all labels are {str(names[0])!r}; give texts of at least two topics")
    if len(names) > MOST_LABELS:
        raise CoreInferError(
            f"{documents.name}: {len(names)} different labels, such as {shown(str(names[0]))}; name a column with at "
            f"most {MOST_LABELS} topics"
        )
    if counts.min() < 2:
        raise CoreInferError(
            f"{documents.name}: 1 document with label {str(names[counts.argmin()])!r}; give two or none"
        )
    drawn = np.minimum(counts, per_label).sum()
    if drawn <= NEIGHBOURS:
        raise CoreInferError(
            f"{documents.name}: {drawn} documents with at most texts={per_label} per label; {NEIGHBOURS} neighbours "
            "need more: raise it, or give more documents"
        )
    return [int(number) for name in names for number in order[labels[order] == name][:per_label]]


def _labels(documents: Documents) -> tuple[str, ...]:
    if documents.labels is None:
        raise CoreInferError(f"{documents.name}: no labels; name their column")
    return documents.labels


def _topics_of_layer(vectors: np.ndarray, labels: np.ndarray, seed: int) -> tuple[float, float, float]:
    """Silhouette, the mean one of shuffled labels, and accuracy of the nearest neighbours: vectors float64 [n, F]."""
    from sklearn.metrics import silhouette_score
    from sklearn.neighbors import NearestNeighbors

    # Asked for no points of its own, scikit-learn leaves each text out of its own neighbours.
    near = NearestNeighbors(n_neighbors=NEIGHBOURS, algorithm="brute").fit(vectors).kneighbors(return_distance=False)
    names = np.unique(labels)
    voices = (labels[near][:, :, None] == names[None, None, :]).sum(axis=1)
    accuracy = float((names[voices.argmax(axis=1)] == labels).mean())
    if not np.ptp(vectors, axis=0).any():
        return 0.0, 0.0, accuracy
    rng = np.random.default_rng(seed)
    shuffled = [silhouette_score(vectors, rng.permutation(labels)) for _ in range(SHUFFLES)]
    return float(silhouette_score(vectors, labels)), float(np.mean(shuffled)), accuracy


def _projection(vectors: np.ndarray) -> np.ndarray:
    """The first two principal components of vectors float64 [n, F]: [n, 2]; 0 where all vectors are the same."""
    from sklearn.decomposition import PCA

    if not np.ptp(vectors, axis=0).any():
        return np.zeros((len(vectors), 2))
    return PCA(n_components=2, svd_solver="full").fit_transform(vectors)


def pairs(inputs: Inputs) -> dict[str, Any]:
    """Spearman correlation of the core neurons that two sentences share with how alike people found them.

    `all` takes the mean overlap over layers. `same_tokens` is the correlation of something that needs no model: the
    tokens both sentences have, as a share of those that either has. None stands for overlaps that are all the same.
    """
    files = {}
    for own in inputs.pairs:
        sentences = sorted({*own.first, *own.second})
        rows = _encoded(inputs, sentences, f"tokenising {own.name}")
        vectors = core_vectors(inputs, rows, own.name)
        files[own.name] = _correlations(own, sentences, rows, vectors, inputs.config.mlp_size)
    return {**inputs.facts(), "most_tokens": TOKENS_PER_DOCUMENT, "files": files}


def _correlations(
    own: Pairs, sentences: Sequence[str], rows: Sequence[Sequence[int]], vectors: np.ndarray, mlp_size: int
) -> dict[str, Any]:
    numbers = {sentence: i for i, sentence in enumerate(sentences)}
    first = np.array([numbers[sentence] for sentence in own.first])
    second = np.array([numbers[sentence] for sentence in own.second])
    layers = [_shared(of_layer(vectors, l, mlp_size), first, second) for l in range(vectors.shape[1])]
    tokens = [frozenset(row) for row in rows]
    same = np.array(
        [len(tokens[a] & tokens[b]) / len(tokens[a] | tokens[b]) for a, b in zip(first, second, strict=True)]
    )
    return {
        "pairs": len(own.scores),
        "layers": [spearman(layer, own.scores) for layer in layers],
        "all": spearman(np.sum(layers, axis=0), own.scores),
        "same_tokens": spearman(same, own.scores),
    }


def _shared(vectors: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """How many of the core neurons in `vectors` bool [n, F] texts `first` and `second` [P] have in common: int [P].

    Numbers, of which every text has K: means of shares would round equal ones differently and so lose ties.
    """
    return np.array([(vectors[a] & vectors[b]).sum() for a, b in zip(first, second, strict=True)])


def spearman(values: Sequence[float] | np.ndarray, scores: Sequence[float]) -> float | None:
    """Spearman's rank correlation, ties given their mean rank; None where either side is constant."""
    from scipy.stats import spearmanr

    if len(scores) < LEAST_PAIRS or np.ptp(values) == 0 or np.ptp(scores) == 0:
        return None
    return float(spearmanr(values, scores).statistic)


def _encoded(inputs: Inputs, texts: Sequence[str], name: str) -> list[list[int]]:
    """The first tokens of every text, never none."""
    size = min(TOKENS_PER_DOCUMENT, inputs.config.max_positions)
    rows = [inputs.tokenizer.encode(text)[:size] for text in progress(texts, desc=name, unit="text", leave=True)]
    empty = next((text for text, row in zip(texts, rows, strict=True) if not row), None)
    if empty is not None:
        raise CoreInferError(f"text {empty[:40]!r} has no tokens; remove it")
    return rows


def core_vectors(inputs: Inputs, rows: Sequence[Sequence[int]], name: str) -> np.ndarray:
    """Binary core-neuron vectors of texts of any length, eight neurons to a byte: uint8 [n, L, ceil(F / 8)]."""
    F = inputs.config.mlp_size
    found = np.zeros((len(rows), inputs.config.num_layers, -(-F // 8)), np.uint8)
    order = np.argsort([len(row) for row in rows], kind="stable")
    for batch in progress(plan_batches([rows[i] for i in order]), desc=name, unit="batch", leave=True):
        tokens = batch.tokens[:, : _width(int(batch.lengths.max()))]
        counted = np.arange(tokens.shape[1])[None, :] < batch.lengths[:, None]
        voting = make_voting(counted, F, inputs.alpha, "per_token")
        chosen, finite = _chosen(inputs.params, jnp.asarray(tokens), voting, kept=kept_neurons(inputs.beta, F))
        check_finite(finite, "activations")
        found[order[list(batch.numbers)]] = np.packbits(np.asarray(chosen)[: len(batch.numbers)], axis=-1)
    return found


def _width(longest: int) -> int:
    """Powers of two from 16: judged sentences are far shorter than the shortest bucket of prompts."""
    return max(16, 1 << (longest - 1).bit_length())


@partial(jax.jit, static_argnames="kept")
def _chosen(params: Params, tokens: Array, voting: Voting, *, kept: int) -> tuple[Array, Array]:
    """Binary core-neuron vectors bool [B, L, F], and whether all activations were finite."""

    def observe(l: int, layer: Layer, seen: MlpPass) -> tuple[Array, Array]:
        return core_masks(count_votes(seen.activations, voting), kept), all_finite(seen.activations, voting)

    _, _, chosen, finite = read_whole(params, tokens, observe)
    return jnp.stack(chosen, axis=1), finite


def of_layer(packed: np.ndarray, layer: int, mlp_size: int) -> np.ndarray:
    """Vectors bool [n, F] of one layer of what `core_vectors` returns."""
    return np.unpackbits(packed[:, layer], axis=-1, count=mlp_size).astype(bool)
