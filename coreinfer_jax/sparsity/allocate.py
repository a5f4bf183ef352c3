"""How many neurons each layer keeps: a keep ratio shared out over the layers, the same total for all ways.

Layers differ from each other more than rules do: where one layer's neurons are missed most, a few more of them are
worth many of another's. (Non-uniform sparsity by measured error: TEAL, arXiv 2408.14690.)
"""

from dataclasses import dataclass
from numbers import Real
from typing import Literal, Protocol, get_args

import numpy as np

from coreinfer_jax.errors import CoreInferError, shown
from coreinfer_jax.model.config import ModelConfig
from coreinfer_jax.sparsity.votes import kept_neurons

Allocation = Literal["sensitivity", "equal"]
ALLOCATIONS: tuple[Allocation, ...] = get_args(Allocation)

# In how many equal parts a layer's neurons are handed out.
PARTS = 64
# What each layer gets at least of the mean, whatever its gains, where it has linear neurons: below what these cost it
# would have none. On SmolLM2-135M 0.5 was worse below a keep ratio of 0.6, and 0.85 above it.
LEAST_BESIDE_LINEAR = 0.7
# Without a calibration: the share of what beta leaves out that the first layer keeps all the same.
FIRST_KEEPS = 0.6


@dataclass(frozen=True, kw_only=True)
class Narrowing:
    """Which layers are cut down to core neurons.

    Attributes:
        layers: fractions of depth: layer l of L is narrowed when layers[0] <= l / L < layers[1].

    Raises:
        CoreInferError: no such fractions.
    """

    layers: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        fractions = self.layers if isinstance(self.layers, tuple) and len(self.layers) == 2 else (None, None)
        numbers = all(isinstance(value, Real) for value in fractions)
        if not numbers or not 0 <= self.layers[0] < self.layers[1] <= 1:
            raise CoreInferError(
                f"layers={shown(self.layers)}: give a tuple of fractions of depth, 0 <= start < stop <= 1"
            )

    def narrowed_layers(self, num_layers: int) -> tuple[int, ...]:
        """Those of `num_layers` (L) layers that are cut down to core neurons, ascending.

        Raises:
            CoreInferError: there are none.
        """
        start, stop = self.layers
        narrowed = tuple(l for l in range(num_layers) if start <= l / num_layers < stop)
        if not narrowed:
            raise CoreInferError(f"layers={self.layers} selects none of the model's {num_layers} layers; widen it")
        return narrowed


class Shares(Protocol):
    """A keep ratio over some layers, and how they share it."""

    @property
    def beta(self) -> float:
        """Mean share of F kept in the narrowed layers."""

    @property
    def allocation(self) -> Allocation:
        """How the layers share it."""

    def narrowed_layers(self, num_layers: int) -> tuple[int, ...]:
        """Those of `num_layers` layers that are narrowed."""


def allocate(core: Shares, config: ModelConfig, gains: np.ndarray | None, least: float = 0.0) -> tuple[int, ...]:
    """Neurons kept in each layer, F in those that are not narrowed.

    Args:
        core: keep ratio, layers and allocation.
        config: the model.
        gains: [L, PARTS], what each further part of a layer's neurons is worth, never rising along a layer; None where
            nothing is known.
        least: share of the mean that each layer gets, whatever its gains.

    Raises:
        CoreInferError: layers that select none.
    """
    L, F = config.num_layers, config.mlp_size
    narrowed, kept = core.narrowed_layers(L), kept_neurons(core.beta, F)
    shares = np.full(len(narrowed), kept)
    if core.allocation == "sensitivity" and gains is not None:
        shares = _by_gain(np.asarray(gains)[list(narrowed)], kept, F, least)
    elif core.allocation == "sensitivity" and narrowed[0] == 0:
        shares = _first_most(len(narrowed), core.beta, kept, F)
    by_layer = dict(zip(narrowed, shares.tolist(), strict=True))
    return tuple(by_layer.get(l, F) for l in range(L))


def _by_gain(gains: np.ndarray, kept: int, F: int, least: float) -> np.ndarray:
    """The most valuable parts of all `gains` [n, PARTS], `least` of `kept` of each, together no more than n `kept`."""
    n = len(gains)
    parts = n * kept * PARTS // F
    if parts < n or F < PARTS:  # not a part, or not a neuron, for each
        return np.full(n, kept)
    first = max(1, int(least * kept * PARTS / F))
    # Parts of one layer come in order, as their gains never rise and ties go to the earlier.
    best = np.argsort(-gains[:, first:], axis=None, kind="stable")[: parts - n * first]
    own = first + np.bincount(best // (PARTS - first), minlength=n)
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
