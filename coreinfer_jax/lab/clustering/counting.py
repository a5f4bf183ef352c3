"""The votes of every document of a corpus, counted in batches and kept on disk, so that counting can be resumed."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from safetensors import SafetensorError
from safetensors.numpy import save_file

from coreinfer_jax.checks import check_finite
from coreinfer_jax.errors import CoreInferError, shown_name
from coreinfer_jax.files import new_file, read_back
from coreinfer_jax.io.held import load_arrays
from coreinfer_jax.lab.reading import read_whole
from coreinfer_jax.model import MlpPass
from coreinfer_jax.model.cache import bucket
from coreinfer_jax.model.weights import Layer, Params
from coreinfer_jax.progress import progress
from coreinfer_jax.sparsity.choice import counted_tokens
from coreinfer_jax.sparsity.groups import TextVectors
from coreinfer_jax.sparsity.votes import Tally, Voting, all_finite, count_votes, kept_neurons, most_voted

# A batch's activations [B, T, F] of one layer are the largest array of a pass.
BATCH_TOKENS = 2048

# Votes are stored as uint16.
MOST_TOKENS = 65535


@dataclass(frozen=True)
class Batch:
    """Documents that are read together.

    Attributes:
        numbers: which documents of the corpus.
        tokens: int32 [B, T], padded to a bucket, and to B rows with empty ones.
        lengths: int32 [B], 0 of rows that are none.
    """

    numbers: tuple[int, ...]
    tokens: np.ndarray
    lengths: np.ndarray


@dataclass(frozen=True)
class CountedBatch:
    """What a batch voted; one row per document.

    Attributes:
        numbers: which documents of the corpus, int64 [B].
        votes: uint16 [B, L, F].
        voters: tokens that voted, int64 [B].
        vectors: binary core-neuron vectors of the deciding layer, bool [B, F].
    """

    numbers: np.ndarray
    votes: np.ndarray
    voters: np.ndarray
    vectors: np.ndarray


def plan_batches(rows: Sequence[Sequence[int]]) -> list[Batch]:
    """Documents of token ids, put together by length; a function of its argument only, so that work can be resumed."""
    by_bucket: dict[int, list[int]] = {}
    for number, row in enumerate(rows):
        by_bucket.setdefault(bucket(len(row)), []).append(number)
    batches = []
    for size, numbers in sorted(by_bucket.items()):
        together = max(1, BATCH_TOKENS // size)
        for first in range(0, len(numbers), together):
            chosen = numbers[first : first + together]
            batches.append(_batch(tuple(chosen), [rows[number] for number in chosen], (together, size)))
    return batches


def _batch(numbers: tuple[int, ...], rows: Sequence[Sequence[int]], shape: tuple[int, int]) -> Batch:
    tokens, lengths = np.zeros(shape, np.int32), np.zeros(shape[0], np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], lengths[i] = row, len(row)
    return Batch(numbers, tokens, lengths)


def rows_digest(rows: Sequence[Sequence[int]]) -> str:
    """SHA-256 of the token ids that are read, document by document."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(np.array([len(row), *row], np.int64).tobytes())
    return digest.hexdigest()


def count_corpus(
    directory: Path, params: Params, batches: Sequence[Batch], vectors: TextVectors, layer: int
) -> Iterator[CountedBatch]:
    """The votes of all batches, in order; those that lie in `directory` already are read, the others counted and kept.

    Args:
        directory: where batches are kept, one file each.
        params: dense weights.
        batches: from `plan_batches`.
        vectors: how tokens vote, and the share of neurons in a document's vector.
        layer: whose vectors are kept.

    Raises:
        CoreInferError: activations that are NaN or infinite, a kept file that is damaged.
    """
    for i, batch in enumerate(progress(batches, desc="counting votes", unit="batch", leave=True)):
        path = directory / f"votes-{i:06d}.safetensors"
        if not path.exists():
            counted = _count(params, batch, vectors, layer)
            with new_file(path) as partial_file:
                save_file(counted, partial_file)
                with read_back(path):
                    read_counted(partial_file, batch, params.config.mlp_size)
        yield read_counted(path, batch, params.config.mlp_size)


def read_counted(path: Path, batch: Batch, mlp_size: int) -> CountedBatch:
    """A batch's votes as they were kept.

    Raises:
        CoreInferError: a file that is damaged or of another batch.
    """
    try:
        _, kept = load_arrays(path)
        counted = CountedBatch(
            numbers=kept["numbers"],
            votes=kept["votes"],
            voters=kept["voters"],
            vectors=np.unpackbits(kept["vectors"], axis=1, count=mlp_size).astype(bool),
        )
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        reason = shown_name(str(error))
        raise CoreInferError(f"{path}: cannot be read ({reason}); remove it to count its documents again") from error
    if counted.numbers.tolist() != list(batch.numbers):
        raise CoreInferError(f"{path}: holds other documents; remove {path.parent} to start over")
    return counted


def _count(params: Params, batch: Batch, vectors: TextVectors, layer: int) -> dict[str, np.ndarray]:
    config, real = params.config, len(batch.numbers)
    F, kept = config.mlp_size, kept_neurons(vectors.beta, config.mlp_size)
    counted = np.zeros(batch.tokens.shape, bool)
    counted[:real] = counted_tokens(batch.tokens[:real], batch.lengths[:real], 0, config, count_bos=vectors.count_bos)
    votes, chosen, finite = _read(params, batch.tokens, vectors.votes.voting(counted, F), kept=kept, layer=layer)
    check_finite(finite, "activations")
    binary = np.zeros((real, F), bool)
    np.put_along_axis(binary, np.asarray(chosen)[:real], True, axis=1)
    return {
        "numbers": np.array(batch.numbers, np.int64),
        "votes": np.asarray(votes)[:real].astype(np.uint16),
        "voters": counted[:real].sum(axis=1).astype(np.int64),
        "vectors": np.packbits(binary, axis=1),
    }


@partial(jax.jit, static_argnames=("kept", "layer"))
def _read(params: Params, tokens: Array, voting: Voting, *, kept: int, layer: int) -> tuple[Array, Array, Array]:
    """Votes int32 [B, L, F], the core neurons [B, K] of one layer, and whether all activations were finite."""

    def observe(l: int, layer: Layer, seen: MlpPass) -> tuple[Tally, Array]:
        return count_votes(seen.activations, voting), all_finite(seen.activations, voting)

    _, _, votes, finite = read_whole(params, tokens, observe)
    return jnp.stack([own.counts for own in votes], axis=1), most_voted(votes[layer], kept), finite
