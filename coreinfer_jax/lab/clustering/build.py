"""`build_clusters`: from a corpus to a directory of clusters."""

import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from coreinfer_jax.errors import CoreInferError, shown
from coreinfer_jax.files import begun, is_directory, new_directory, refuse_existing, to_path
from coreinfer_jax.lab.clustering.counting import (
    MOST_TOKENS,
    Batch,
    CountedBatch,
    count_corpus,
    plan_batches,
    read_counted,
    rows_digest,
)
from coreinfer_jax.lab.clustering.grouping import (
    DEPTH,
    Grouping,
    check_groups_asked,
    check_seed,
    deciding_layer,
    group_by_kmeans,
    group_by_labels,
    require_sklearn,
)
from coreinfer_jax.lab.clustering.storage import voting_settings, write_clusters
from coreinfer_jax.model.fingerprint import fingerprint
from coreinfer_jax.model.host import check_on_device
from coreinfer_jax.model.weights import Params, check_dense
from coreinfer_jax.progress import progress
from coreinfer_jax.sparsity.groups import Clusters, TextVectors
from coreinfer_jax.text import Tokenizer
from coreinfer_jax.text.documents import Documents

# The paper's alpha, and its beta for the neurons that say what a text is about.
VECTORS = TextVectors()
TOKENS_PER_DOCUMENT = 256

# Documents nearest to a group's centroid that are kept for people to look at, and how much of each.
NEAREST, EXCERPT = 5, 160


def build_clusters(
    directory: str | os.PathLike[str],
    params: Params,
    tokenizer: Tokenizer,
    documents: Documents,
    vectors: TextVectors = VECTORS,
    *,
    k: int | None = None,
    depth: float = DEPTH,
    seed: int = 0,
    max_tokens: int = TOKENS_PER_DOCUMENT,
) -> Clusters:
    """Group documents by what they activate, and write down every group's frequencies.

    Documents are grouped by their labels where they have any, otherwise by k-means over their binary core-neuron
    vectors in one layer. A group's frequency of a neuron is the share of the group's tokens of which it is a
    token-wise core neuron; no other group enters it. The same arguments give identical files. An interrupted build
    is continued by the same call: what it has counted lies in `DIRECTORY.votes` until the end, 2 L F bytes for each
    document.

    Args:
        directory: to write; must not exist.
        params: dense weights.
        tokenizer: of the model.
        documents: from `read_documents`.
        vectors: how tokens vote, and the share of neurons in a document's vector.
        k: number of groups; None takes the labels, or finds it by the elbow (`group_by_kmeans`).
        depth: of the layer whose vectors decide, as a fraction.
        seed: of k-means.
        max_tokens: read of each document, at most; the rest is left out.

    Raises:
        CoreInferError: the directory exists, fewer than two documents, one without a token, more groups than
            documents, both labels and `k`, activations that are NaN, a setting outside its range.
    """
    target = to_path(directory)
    refuse_existing(target)
    check_dense(params)
    check_on_device(params, "build_clusters")
    _check_arguments(tokenizer, documents, vectors)
    layer = deciding_layer(params.config.num_layers, depth)
    _check_settings(documents, k, seed, max_tokens)
    rows = _tokenised(documents, tokenizer, min(max_tokens, params.config.max_positions))
    batches = plan_batches([row for row, _ in rows])
    model, dtype = fingerprint(params), params.dtype.name
    counting = {
        "model": model,
        "dtype": dtype,
        "tokens": rows_digest([row for row, _ in rows]),
        "max_tokens": max_tokens,
        "voting": voting_settings(vectors),
        "layer": layer,
    }
    with _kept_votes(target, counting) as votes:
        of_documents = _vectors(count_corpus(votes, params, batches, vectors, layer))
        grouping = _group(of_documents, documents, k, seed)
        frequencies, tokens = _frequencies(votes, batches, grouping, params)
        clusters = Clusters(
            frequencies=frequencies,
            centroids=grouping.centroids,
            names=grouping.names,
            sizes=grouping.sizes,
            layer=layer,
            vectors=vectors,
            origin="k-means" if documents.labels is None else "topics",
            fingerprint=model,
        )
        facts = {
            "data": {"name": documents.name, "sha256": documents.digest, "documents": len(rows)},
            "documents_cut_short": sum(cut for _, cut in rows),
            "max_tokens": max_tokens,
            "dtype": dtype,
            "k": k,
            "seed": seed,
            "tokens": tokens,
            "within": grouping.within,
            "nearest": [_nearest(c, grouping, of_documents, documents.texts) for c in range(len(grouping.names))],
        }
        with new_directory(target) as partial:
            write_clusters(partial, clusters, facts, grouping.assigned)
        shutil.rmtree(votes, ignore_errors=True)
    return clusters


def _check_arguments(tokenizer: object, documents: object, vectors: object) -> None:
    if not isinstance(documents, Documents):
        raise CoreInferError(f"documents={shown(documents)}: give Documents, for instance from read_documents")
    if documents.labels is not None and len(documents.labels) != len(documents.texts):
        raise CoreInferError(f"{len(documents.labels)} labels for {len(documents.texts)} texts: give one for each")
    if not isinstance(vectors, TextVectors):
        raise CoreInferError(f"vectors={shown(vectors)}: give TextVectors, which say how tokens vote")
    if tokenizer is None:
        raise CoreInferError("tokenizer=None: give the model's tokenizer, the second thing that load returns")


def _check_settings(documents: Documents, k: int | None, seed: int, max_tokens: int) -> None:
    if len(documents.texts) < 2:
        raise CoreInferError(f"{documents.name}: {len(documents.texts)} document(s); give at least two to group")
    if documents.labels is not None and k is not None:
        raise CoreInferError(f"k={shown(k)}: the labels say which groups there are; leave out one of the two")
    if documents.labels is None:
        require_sklearn()
    check_groups_asked(k, len(documents.texts), "documents")
    check_seed(seed)
    if type(max_tokens) is not int or not 1 <= max_tokens <= MOST_TOKENS:
        raise CoreInferError(f"max_tokens={shown(max_tokens)}: give a whole number from 1 to {MOST_TOKENS}")


def _tokenised(documents: Documents, tokenizer: Tokenizer, size: int) -> list[tuple[list[int], bool]]:
    """The first `size` tokens of every document, and whether there were more."""
    encoded = [tokenizer.encode(text) for text in progress(documents.texts, desc="tokenising", unit="text", leave=True)]
    empty = next((i for i, row in enumerate(encoded) if not row), None)
    if empty is not None:
        raise CoreInferError(f"{documents.name}: document {empty} has no tokens; remove it")
    return [(row[:size], len(row) > size) for row in encoded]


@contextmanager
def _kept_votes(target: Path, counting: dict[str, Any]) -> Iterator[Path]:
    """The locked directory of votes that are counted already, beside `target`."""
    directory = target.with_name(f"{target.name}.votes")
    new = not is_directory(directory)
    with begun(directory, counting, "build"):
        try:
            yield directory
        except CoreInferError:
            if new:  # what cannot be built leaves nothing behind that would be in the way of another try
                shutil.rmtree(directory, ignore_errors=True)
            raise


def _vectors(counted: Iterable[CountedBatch]) -> np.ndarray:
    """Every document's vector, bool [n, F], in the order of the corpus; the votes of one batch at a time in memory."""
    parts = [(batch.numbers, batch.vectors) for batch in counted]
    numbers, vectors = (np.concatenate(part) for part in zip(*parts, strict=True))
    return vectors[np.argsort(numbers)]


def _group(vectors: np.ndarray, documents: Documents, k: int | None, seed: int) -> Grouping:
    if documents.labels is not None:
        return group_by_labels(vectors, documents.labels)
    return group_by_kmeans(vectors, k, seed)


def _frequencies(
    votes: Path, batches: Sequence[Batch], grouping: Grouping, params: Params
) -> tuple[np.ndarray, list[int]]:
    """Frequencies float32 [C, L, F], and the voting tokens of every group."""
    config = params.config
    counts = np.zeros((len(grouping.names), config.num_layers, config.mlp_size), np.int64)
    tokens = np.zeros(len(grouping.names), np.int64)
    for path, batch in zip(sorted(votes.glob("votes-*.safetensors")), batches, strict=True):
        counted = read_counted(path, batch, config.mlp_size)
        for number, own, voters in zip(counted.numbers, counted.votes, counted.voters, strict=True):
            group = grouping.assigned[number]
            counts[group] += own
            tokens[group] += voters
    return (counts / tokens[:, None, None]).astype(np.float32), tokens.tolist()


def _nearest(c: int, grouping: Grouping, vectors: np.ndarray, texts: Sequence[str]) -> list[dict[str, Any]]:
    """The documents nearest to the centroid of group `c`, among its own."""
    own = np.flatnonzero(grouping.assigned == c)
    distances = np.sqrt(np.square(vectors[own] - grouping.centroids[c].astype(np.float64)).sum(axis=1))
    order = np.argsort(distances, kind="stable")[:NEAREST]
    return [
        {
            "document": int(own[i]),
            "distance": float(np.round(distances[i], 6)),
            "text": " ".join(texts[own[i]].split())[:EXCERPT],
        }
        for i in order
    ]
