"""How much of what a continuation needs each way of predicting finds, by length of the prompt (paper, section 3.3)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from coreinfer_jax.lab.analysis.inputs import Inputs
from coreinfer_jax.lab.analysis.observe import core_masks, spread, text_batches, votes_at
from coreinfer_jax.lab.clustering.build import VECTORS
from coreinfer_jax.lab.clustering.grouping import deciding_layer, group_by_kmeans
from coreinfer_jax.model.config import ModelConfig
from coreinfer_jax.sparsity.measures import fused, nearest_group, stability_figure
from coreinfer_jax.sparsity.similarity import Auto, Fused
from coreinfer_jax.sparsity.votes import Tally, kept_neurons, most_voted

LENGTHS = (4, 6, 8, 12, 16, 24, 32, 64, 128, 256)
CONTINUATION = 128
METHODS = ("stability", "similarity", "fused")

# What is to be found: the core neurons of prompt and continuation together, or those of the continuation alone.
TRUTHS = ("with_prompt", "continuation")


@dataclass(frozen=True)
class _Groups:
    """Groups of texts none of which is tested: centroids float32 [C, F], frequencies float32 [C, F] per layer."""

    centroids: Array
    frequencies: list[Array]
    layer: int


def prompt_lengths(config: ModelConfig) -> list[int]:
    """Lengths that leave room for the continuation."""
    return [n for n in LENGTHS if n + CONTINUATION <= config.max_positions]


def tokens_needed(config: ModelConfig) -> int | None:
    """The longest prompt and its continuation; None where none fits."""
    lengths = prompt_lengths(config)
    return lengths[-1] + CONTINUATION if lengths else None


def measure(inputs: Inputs) -> dict[str, Any]:
    """Recall of true core neurons by each method, and the stability figure that is to choose between them.

    Groups are made by k-means from one half of the documents, the other half is tested. Recalls and figures are means
    over layers. `voted` is the share of a prompt's own set that any of its tokens voted for.
    """
    lengths, size = prompt_lengths(inputs.config), tokens_needed(inputs.config)
    assert size is not None, "the part is left out where it does not fit"
    grouped, tested = (inputs.corpus.select(size, inputs.texts, half) for half in (0, 1))
    groups, sizes = _groups(inputs, grouped.rows)
    parts = [_batch(inputs, groups, tokens, real, lengths) for tokens, real in text_batches(tested.rows, "recall")]
    recalls, figures, voted = (np.concatenate(part) for part in zip(*parts, strict=True))
    found = {
        truth: {method: spread(recalls[:, :, m, t]) for m, method in enumerate(METHODS)}
        for t, truth in enumerate(TRUTHS)
    }
    F = inputs.config.mlp_size
    auto = Auto()
    return {
        **inputs.facts(),
        "texts": len(tested.rows),
        "too_short": tested.too_short,
        "grouped_texts": len(grouped.rows),
        "group_sizes": sizes,
        "deciding_layer": groups.layer,
        "vector_beta": VECTORS.beta,
        "group_tokens": Fused().group_tokens,
        "thresholds": {"least_stability": auto.least_stability, "least_tokens": auto.least_tokens},
        "continuation_tokens": CONTINUATION,
        "prompt_tokens": lengths,
        "chance": kept_neurons(inputs.beta, F) / F,
        "recall": found,
        "stability_figure": spread(figures),
        "voted": voted.mean(axis=0),
        "crossover": {truth: crossover(lengths, found[truth], np.median(figures, axis=0)) for truth in TRUTHS},
    }


def crossover(
    lengths: Sequence[int], recalls: Mapping[str, Mapping[str, np.ndarray]], figures: np.ndarray
) -> dict[str, float] | None:
    """From which length on a prompt's own core neurons find as much as its group's, and the median figure there.

    Args:
        lengths: of prompts, ascending.
        recalls: per method, with its `mean` [lengths].
        figures: median stability figure per length.

    Returns:
        None where they never do at the longest prompts.
    """
    behind = np.flatnonzero(recalls["stability"]["mean"] < recalls["similarity"]["mean"])
    first = int(behind[-1]) + 1 if len(behind) else 0
    return None if first == len(lengths) else {"tokens": lengths[first], "stability_figure": float(figures[first])}


def _groups(inputs: Inputs, rows: np.ndarray) -> tuple[_Groups, list[int]]:
    """Groups of texts `rows` int32 [n, T], and how many texts each has."""
    F, size = inputs.config.mlp_size, rows.shape[1]
    layer = deciding_layer(inputs.config.num_layers)
    counts, vectors = [], []
    for tokens, real in text_batches(rows, "groups"):
        votes = votes_at(inputs.params, tokens, (size,), inputs.alpha)
        counts.append(np.stack([np.asarray(own.counts[:real, 0]).astype(np.uint16) for own in votes], axis=1))
        vectors.append(np.asarray(core_masks(votes[layer], kept_neurons(VECTORS.beta, F)))[:real, 0])
    grouping = group_by_kmeans(np.concatenate(vectors), None, inputs.seed)
    own = np.concatenate(counts)
    frequencies = np.stack([own[grouping.assigned == c].mean(axis=0) / size for c in range(len(grouping.sizes))])
    by_layer = [jnp.asarray(frequencies[:, l].astype(np.float32)) for l in range(inputs.config.num_layers)]
    return _Groups(jnp.asarray(grouping.centroids), by_layer, layer), list(grouping.sizes)


def _batch(
    inputs: Inputs, groups: _Groups, tokens: np.ndarray, real: int, lengths: Sequence[int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Recalls [real, lengths, methods, truths], stability figures and shares with votes [real, lengths] of [B, T]."""
    F = inputs.config.mlp_size
    marks = sorted({mark for n in lengths for mark in (n // 2, n, n + CONTINUATION)})
    votes = votes_at(inputs.params, tokens, marks, inputs.alpha)
    halves, wholes, ends = _places(marks, lengths)
    assigned = _assigned(votes[groups.layer], wholes, groups.centroids, kept=kept_neurons(VECTORS.beta, F))
    prior, kept = np.float32(Fused().group_tokens), kept_neurons(inputs.beta, F)
    layers = [
        _layer(own, (halves, wholes, ends), frequencies, assigned, prior, kept=kept)
        for own, frequencies in zip(votes, groups.frequencies, strict=True)
    ]
    recalls, figures, voted = (
        np.mean([np.asarray(x, np.float64) for x in part], axis=0)[:real] for part in zip(*layers, strict=True)
    )
    return recalls, figures, voted


def _places(marks: Sequence[int], lengths: Sequence[int]) -> tuple[Array, Array, Array]:
    """Where the half, the whole and the continued prompt of each length are among the marks: int32 [N], each."""
    wanted = ([n // 2 for n in lengths], lengths, [n + CONTINUATION for n in lengths])
    halves, wholes, ends = (jnp.asarray([marks.index(mark) for mark in own], jnp.int32) for own in wanted)
    return halves, wholes, ends


def _at(votes: Tally, places: Array) -> Tally:
    """Votes [B N, F] at N of the M marks of `votes` [B, M, F]."""
    F = votes.counts.shape[-1]
    return jax.tree.map(lambda array: array[:, places].reshape(-1, F), votes)


@partial(jax.jit, static_argnames="kept")
def _assigned(votes: Tally, places: Array, centroids: Array, *, kept: int) -> Array:
    """The group of every prompt: int32 [B N]."""
    return nearest_group(_at(votes, places), kept, centroids)


@partial(jax.jit, static_argnames="kept")
def _layer(
    votes: Tally, places: tuple[Array, Array, Array], frequencies: Array, assigned: Array, prior: Array, *, kept: int
) -> tuple[Array, Array, Array]:
    """One layer's recalls [B, N, methods, truths], stability figures [B, N] and shares that have votes [B, N]."""
    B, N = votes.counts.shape[0], len(places[0])
    early, own, end = (_at(votes, place) for place in places)
    following = jax.tree.map(jnp.subtract, end, own)
    group = Tally(counts=frequencies[assigned], sums=jnp.zeros_like(own.sums))
    predicted = [core_masks(each, kept) for each in (own, group, fused(own, frequencies[assigned], prior))]
    true = [core_masks(each, kept) for each in (end, following)]
    recalls = jnp.stack([jnp.stack([jnp.sum(p & t, axis=-1) for t in true], axis=-1) for p in predicted], axis=-2)
    figure = stability_figure([early], [most_voted(own, kept)])
    voted = jnp.minimum(jnp.sum(own.counts > 0, axis=-1), kept).astype(jnp.float32) / kept
    shape = (B, N, len(METHODS), len(TRUTHS))
    return (recalls.astype(jnp.float32) / kept).reshape(shape), figure.reshape(B, N), voted.reshape(B, N)
