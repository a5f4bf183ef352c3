"""How many neurons each layer keeps: a keep ratio shared out over the layers, the same total for all ways.

Layers differ from each other more than rules do: where one layer's neurons are missed most, a few more of them are
worth many of another's. (Non-uniform sparsity by measured error: TEAL, arXiv 2408.14690.)
"""

import numpy as np

from coreinfer_jax.model.config import CoreConfig, ModelConfig
from coreinfer_jax.sparsity.votes import kept_neurons

# In how many equal parts a layer's neurons are handed out.
PARTS = 64
# Without a calibration: the share of what beta leaves out that the first layer keeps all the same.
FIRST_KEEPS = 0.6


def allocate(core: CoreConfig, config: ModelConfig, gains: np.ndarray | None) -> tuple[int, ...]:
    """Neurons kept in each layer, F in those that are not narrowed.

    Args:
        core: keep ratio, layers and allocation.
        config: the model.
        gains: [L, PARTS], what each further part of a layer's neurons is worth, never rising along a layer; None where
            nothing is known.

    Raises:
        CoreInferError: layers that select none.
    """
    L, F = config.num_layers, config.mlp_size
    narrowed, kept = core.narrowed_layers(L), kept_neurons(core.beta, F)
    shares = np.full(len(narrowed), kept)
    if core.allocation == "sensitivity" and gains is not None:
        shares = _by_gain(np.asarray(gains)[list(narrowed)], kept, F)
    elif core.allocation == "sensitivity" and narrowed[0] == 0:
        shares = _first_most(len(narrowed), core.beta, kept, F)
    by_layer = dict(zip(narrowed, shares.tolist(), strict=True))
    return tuple(by_layer.get(l, F) for l in range(L))


def _by_gain(gains: np.ndarray, kept: int, F: int) -> np.ndarray:
    """The most valuable parts of all `gains` [n, PARTS], at least one of each layer, together no more than n `kept`."""
    n = len(gains)
    parts = n * kept * PARTS // F
    if parts < n or F < PARTS:  # not a part, or not a neuron, for each
        return np.full(n, kept)
    # Parts of one layer come in order, as their gains never rise and ties go to the earlier.
    best = np.argsort(-gains[:, 1:], axis=None, kind="stable")[: parts - n]
    own = 1 + np.bincount(best // (PARTS - 1), minlength=n)
    return own * F // PARTS


def _first_most(n: int, beta: float, kept: int, F: int) -> np.ndarray:
    """More for the first layer, which reads the embedding and is missed most, the rest for all others alike.

    It gets no more than two thirds of all, so that models of few layers keep some of each.
    """
    if n == 1:
        return np.array([kept])
    first = max(kept, min(kept_neurons(beta + FIRST_KEEPS * (1 - beta), F), 2 * n * kept // 3))
    first = min(first, n * kept - (n - 1))  # one for each of the others
    return np.array([first, *[(n * kept - first) // (n - 1)] * (n - 1)])
