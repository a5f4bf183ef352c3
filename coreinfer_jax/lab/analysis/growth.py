"""How steady core neurons are while a text grows: by its extensions (paper, Fig. 3a, b) and to its end (Fig. 3c)."""

from typing import Any

import numpy as np

from coreinfer_jax.lab.analysis.inputs import Inputs
from coreinfer_jax.lab.analysis.observe import overlaps, spread, text_batches, votes_at
from coreinfer_jax.lab.clustering.grouping import deciding_layer
from coreinfer_jax.model.config import ModelConfig
from coreinfer_jax.sparsity.votes import kept_neurons

ORIGINALS = (16, 32, 64, 128, 256)
EXTENSIONS = (8, 16, 32, 64, 128, 256)
LENGTHS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 320, 384, 448, 512)

# Neurons of the heat map, evenly spaced by rank: more could not be told apart.
MOST_RANKS = 192


def extension_pairs(config: ModelConfig) -> list[tuple[int, int]]:
    """Original and extended lengths that fit the model's positions."""
    return [(n, n + more) for n in ORIGINALS for more in EXTENSIONS if n + more <= config.max_positions]


def extension_tokens(config: ModelConfig) -> int | None:
    """The longest extended text; None where none fits."""
    return max((longer for _, longer in extension_pairs(config)), default=None)


def extension(inputs: Inputs) -> dict[str, Any]:
    """What the core neurons of texts share with those of the same texts some tokens longer, mean over layers."""
    pairs, size = extension_pairs(inputs.config), extension_tokens(inputs.config)
    assert size is not None, "the part is left out where it does not fit"
    selection = inputs.corpus.select(size, inputs.texts)
    shared = overlaps(inputs.params, selection.rows, pairs, inputs.alpha, inputs.beta, "extension")
    return {
        **inputs.facts(),
        "texts": len(selection.rows),
        "too_short": selection.too_short,
        "chance": _chance(inputs),
        "original_tokens": [n for n, _ in pairs],
        "added_tokens": [longer - n for n, longer in pairs],
        "overlap": spread(shared),
    }


def growth_lengths(config: ModelConfig) -> list[int]:
    """Lengths of a growing text, the last one the longest that the model's positions allow."""
    return [length for length in LENGTHS if length <= config.max_positions]


def growth_tokens(config: ModelConfig) -> int | None:
    """The final length; None where there is nothing to grow from."""
    lengths = growth_lengths(config)
    return lengths[-1] if len(lengths) > 1 else None


def growth(inputs: Inputs) -> dict[str, Any]:
    """What the core neurons of a text's first tokens share with its final ones, and how votes settle in one text."""
    lengths, size = growth_lengths(inputs.config), growth_tokens(inputs.config)
    assert size is not None, "the part is left out where it does not fit"
    selection = inputs.corpus.select(size, inputs.texts)
    pairs = [(length, size) for length in lengths]
    shared = overlaps(inputs.params, selection.rows, pairs, inputs.alpha, inputs.beta, "growth")
    return {
        **inputs.facts(),
        "texts": len(selection.rows),
        "too_short": selection.too_short,
        "chance": _chance(inputs),
        "tokens": lengths,
        "overlap": spread(shared),
        "one_text": _one_text(inputs, selection.rows, lengths),
    }


def _one_text(inputs: Inputs, rows: np.ndarray, lengths: list[int]) -> dict[str, Any]:
    """Vote frequencies in the deciding layer of the first of `rows` [n, T], neurons in the order of the final ones."""
    layer = deciding_layer(inputs.config.num_layers)
    batch, _ = next(text_batches(rows, "one text"))  # of the shape that is compiled already
    counts = np.asarray(votes_at(inputs.params, batch, lengths, inputs.alpha)[layer].counts[0])
    frequencies = counts / np.asarray(lengths)[:, None]
    order = np.argsort(-frequencies[-1], kind="stable")
    F = len(order)
    ranks = np.unique(np.linspace(0, F - 1, min(F, MOST_RANKS)).astype(int))
    return {"layer": layer, "neurons": F, "ranks": ranks, "frequencies": frequencies[:, order[ranks]]}


def _chance(inputs: Inputs) -> float:
    """What sets of K of F neurons drawn at random share, on average."""
    F = inputs.config.mlp_size
    return kept_neurons(inputs.beta, F) / F
