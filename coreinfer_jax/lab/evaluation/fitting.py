"""Linear neurons of a model, from texts: how each layer's activations follow its MLP's input.

The fit is weighted least squares with a ridge. Each token weighs as the rule `Contribution` has it, so that a few
tokens with huge activations do not own it. Its directions are those of a reduced-rank regression: of all maps of rank r
from the input to what the neurons outside of a core set write, those nearest to the full regression's, over the core
sets of several texts.
"""

from functools import partial
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array, lax

from coreinfer_jax.checks import check_finite
from coreinfer_jax.errors import CoreInferError
from coreinfer_jax.lab.evaluation.measure import by_width
from coreinfer_jax.lab.evaluation.passes import read_corpus
from coreinfer_jax.lab.reading import read_whole
from coreinfer_jax.model import MlpPass
from coreinfer_jax.model.config import ModelConfig
from coreinfer_jax.model.weights import Layer, Params
from coreinfer_jax.progress import progress
from coreinfer_jax.sparsity.calibration import Explained
from coreinfer_jax.sparsity.linear import LinearFit
from coreinfer_jax.sparsity.rules import Contribution, Moments, Sums, with_prior
from coreinfer_jax.sparsity.votes import kept_neurons
from coreinfer_jax.text.corpus import Beginnings

Matrix: TypeAlias = np.ndarray

# On SmolLM2-135M 128 directions, one for every twelfth neuron, lost least at equal bytes; beyond half of the input's
# width a full matrix would be smaller.
NEURONS_PER_DIRECTION, MOST_DIRECTIONS, DIRECTIONS_AT_ONCE = 12, 256, 64
# Of the inputs' mean variance.
RIDGE = 0.01
# Tokens to learn from for each input of an MLP. With 3 a fit may foretell nothing of tokens that it has not seen.
LEAST_TOKENS = 8
# The core sets whose rest the directions are for: of so many texts, at this keep ratio.
SETS, KEEP = 16, 0.3
# Of products of inputs and activations, held at a time.
MOST_BYTES = 1 << 31


@struct.dataclass
class Products:
    """Weighted sums over tokens of one layer.

    Attributes:
        weight: of the weights, [].
        inputs: of x, [D].
        activations: of a, [F].
        squares: of x x^T, [D, D].
        mixed: of x a^T, [D, F].
    """

    weight: Array
    inputs: Array
    activations: Array
    squares: Array
    mixed: Array


def directions_of(config: ModelConfig) -> int:
    """How many linear neurons (r) each layer of a model has."""
    most = min(config.mlp_size // NEURONS_PER_DIRECTION, config.hidden_size // 2, MOST_DIRECTIONS)
    return max(1, most if most < DIRECTIONS_AT_ONCE else most // DIRECTIONS_AT_ONCE * DIRECTIONS_AT_ONCE)


def learn(params: Params, texts: Beginnings) -> tuple[tuple[Sums, ...], Explained | None]:
    """The sums of `Contribution` over texts, of every layer, and linear neurons fitted to the same tokens.

    Args:
        params: dense weights.
        texts: to learn from. They are read once for as many layers as `MOST_BYTES` has room for.

    Returns:
        The sums, and no linear neurons where the texts have fewer than `LEAST_TOKENS` tokens for each input of an MLP.

    Raises:
        CoreInferError: activations that are NaN or infinite, or too large for a fit of 16 bits.
    """
    config, params = params.config, params.weights
    D, F, L = config.hidden_size, config.mlp_size, config.num_layers
    at_once = max(1, MOST_BYTES // (4 * D * (D + F)))
    enough = texts.lengths.sum() >= LEAST_TOKENS * D
    prior: list[Sums] = []
    fits: list[LinearFit] = []
    left: list[Sums] = []
    for first in range(0, L, at_once):
        layers = tuple(range(first, min(first + at_once, L)))
        read = _sums_over(params, texts, layers)
        for l, (products, sums, of_texts) in progress(
            list(zip(layers, read, strict=True)), desc="fitting linear neurons", unit="layer"
        ):
            prior.append(sums)
            if not enough:
                continue
            down = params.layers[l].mlp.down
            dropped = _dropped(of_texts, sums, down.input_norms(), kept_neurons(KEEP, F))
            fits.append(fit(products, np.asarray(down.weight, np.float32), dropped, directions_of(config)))
            left.append(unexplained(products, sums, fits[-1]))
    return tuple(prior), Explained(tuple(fits), tuple(left)) if enough else None


def fit(products: Products, down: Matrix, dropped: Matrix, size: int, ridge: float = RIDGE) -> LinearFit:
    """The fit of one layer.

    Args:
        products: over many more tokens than there are inputs.
        down: the down projection W, [D, F].
        dropped: bool [n, F], the neurons outside of each of n core sets.
        size: directions (r).
        ridge: of the regression, as a share of the inputs' mean variance.

    Raises:
        CoreInferError: activations too large for 16 bits.
    """
    weight, x, a, xx, xa = _wide(products)
    whole = weight if weight > 0 else np.float64(1)
    x, a = x / whole, a / whole
    covariance, mixed = xx / whole - np.outer(x, x), xa / whole - np.outer(x, a)
    added = max(ridge * np.trace(covariance) / len(x), np.finfo(np.float32).tiny)
    values, vectors = np.linalg.eigh(covariance + added * np.eye(len(x)))
    # Inputs times this are uncorrelated, and have a variance of 1.
    whitening = (vectors / np.sqrt(np.maximum(values, added))) @ vectors.T
    whitened = (whitening @ mixed).astype(np.float32)
    spread = np.zeros_like(covariance, np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # looked at below
        for own in dropped:
            written = (whitened * own[None, :]) @ down.T
            spread += written @ written.T
    _check_size(a, spread)
    _, leading = np.linalg.eigh(spread)
    exact = (whitening @ leading[:, : -size - 1 : -1]).T
    directions, slopes = halved(exact, exact @ mixed)
    _check_size(a, directions, slopes)
    placed = directions.astype(np.float64) @ x
    return made(directions, slopes, a - placed @ slopes.astype(np.float64), down)


def halved(directions: Matrix, slopes: Matrix) -> tuple[Matrix, Matrix]:
    """Directions [r, D] and slopes [r, F] in 16 bits.

    Each direction is as long as its slopes are large, so that neither is beyond what 16 bits hold.
    """
    sizes = np.abs(slopes).max(axis=1) / np.abs(directions).max(axis=1)
    scales = np.sqrt(np.where(sizes > 0, sizes, 1))[:, None]
    with np.errstate(over="ignore", invalid="ignore"):  # looked at where a fit is made of them
        return (directions * scales).astype(np.float16), (slopes / scales).astype(np.float16)


def made(directions: Matrix, slopes: Matrix, constants: Matrix, down: Matrix) -> LinearFit:
    """A fit of what `halved` gives, constants [F] and the down projection [D, F].

    Raises:
        CoreInferError: activations too large for 16 bits.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # looked at below
        written = (down @ slopes.astype(np.float64).T).astype(np.float16)
    _check_size(constants, directions, slopes, written)
    return LinearFit(
        directions=jnp.asarray(directions),
        slopes=jnp.asarray(slopes),
        constants=jnp.asarray(constants, jnp.float32),
        written=jnp.asarray(written),
    )


def _check_size(a: Matrix, *made: Matrix) -> None:
    """Refuse activations `a`, on average, of which something infinite is `made`."""
    if not all(np.isfinite(array).all() for array in made):
        raise CoreInferError(f"activations of {np.abs(a).max():.2g} on average are too large for linear neurons")


def unexplained_over(params: Params, texts: Beginnings, fits: tuple[LinearFit, ...]) -> tuple[Sums, ...]:
    """Of each layer, the sums over texts of what fits leave of the activations.

    Raises:
        CoreInferError: activations that are NaN or infinite.
    """
    total: list[Sums] | None = None
    for tokens, counted in by_width(texts, params.config):
        observer = Contribution().observer(counted, params.config.mlp_size, fits)
        read, finite = read_corpus(params.weights, jnp.asarray(tokens), [observer])
        check_finite(finite, "activations")
        sums = [own for [own] in read]
        total = sums if total is None else jax.tree.map(jnp.add, total, sums)
    assert total is not None, "there are texts"
    return tuple(total)


def unexplained(products: Products, sums: Sums, own: LinearFit) -> Sums:
    """The sums of what a fit leaves of the activations, from those of the activations and from their products.

    Expanded: sum w (a - e)^2 with e = c + q . P x is sum w a^2 - 2 sum w a e + sum w e^2.
    """
    directions, slopes, constants = (
        np.asarray(array, np.float64) for array in (own.directions, own.slopes, own.constants)
    )
    weight, x, a, xx, xa = _wide(products)
    placed, of_both = directions @ x, directions @ xx @ directions.T
    expected = constants * weight + placed @ slopes
    with_activation = constants * a + (slopes * (directions @ xa)).sum(axis=0)
    squared = constants**2 * weight + 2 * constants * (placed @ slopes) + (slopes * (of_both @ slopes)).sum(axis=0)
    squares = np.asarray(sums["squares"], np.float64) - 2 * with_activation + squared
    found = {"total": a - expected, "squares": np.maximum(squares, 0)}
    return sums | {name: jnp.asarray(array, jnp.float32) for name, array in found.items()}


def _wide(products: Products) -> tuple[Matrix, ...]:
    fields = (products.weight, products.inputs, products.activations, products.squares, products.mixed)
    return tuple(np.asarray(array, np.float64) for array in fields)


def _sums_over(params: Params, texts: Beginnings, layers: tuple[int, ...]) -> list[tuple[Products, Sums, Sums]]:
    """Of each of `layers`, products and the sums of `Contribution` over all tokens, and those of each of some texts."""
    every = max(1, len(texts.rows) // SETS)  # texts come by their lengths: some of each
    total: tuple[list[Products], list[Sums]] | None = None
    rows: list[list[Sums]] = []
    seen = 0
    for tokens, counted in by_width(texts, params.config):
        observer = Contribution().observer(counted, params.config.mlp_size)
        products, sums, finite = _read(params, jnp.asarray(tokens), observer, layers=layers)
        check_finite(finite, "activations")
        of_batch = products, jax.tree.map(lambda array: array.sum(axis=0), sums)
        total = of_batch if total is None else jax.tree.map(jnp.add, total, of_batch)
        real = np.flatnonzero(counted.any(axis=1))
        some = real[(seen + np.arange(len(real))) % every == 0]
        rows.append(jax.tree.map(lambda array, some=some: array[some], sums))
        seen += len(real)
    assert total is not None, "there are texts"
    joined = [jax.tree.map(lambda *parts: jnp.concatenate(parts)[:SETS], *own) for own in zip(*rows, strict=True)]
    return list(zip(*total, joined, strict=True))


@partial(jax.jit, static_argnames="layers")
def _read(
    params: Params, tokens: Array, observer: Moments, *, layers: tuple[int, ...]
) -> tuple[list[Products], list[Sums], Array]:
    def observe(l: int, layer: Layer, seen: MlpPass) -> tuple[tuple[Products, Sums] | None, Array]:
        if l not in layers:
            return None, jnp.bool_(True)
        return (_products(observer, layer, seen), observer(l, layer, seen)), jnp.isfinite(seen.activations).all()

    _, _, found, finite = read_whole(params, tokens, observe)
    products, sums = zip(*(found[l] for l in layers), strict=True)
    return list(products), list(sums), finite


def _products(observer: Moments, layer: Layer, seen: MlpPass) -> Products:
    weights = observer.weights(layer, seen).reshape(-1, 1)
    root = jnp.sqrt(weights)
    x, a = (array.astype(jnp.float32).reshape(len(root), -1) for array in (seen.inputs, seen.activations))
    scaled = x * root

    def times(other: Array) -> Array:
        return lax.dot_general(scaled, other, (((0,), (0,)), ((), ())), precision=lax.Precision.HIGHEST)

    return Products(weights.sum(), (x * weights).sum(axis=0), (a * weights).sum(axis=0), times(scaled), times(a * root))


def _dropped(sums: Sums, prior: Sums, norms: Array, kept: int) -> Matrix:
    """Which neurons are outside of the core set of each text, bool [n, F]."""
    rule = Contribution()
    scores = np.asarray(rule.score(with_prior(sums, prior, rule.prior_tokens), norms, jnp.float32(0.5)))
    dropped = np.ones(scores.shape, bool)
    np.put_along_axis(dropped, np.argsort(-scores, axis=1, kind="stable")[:, :kept], False, axis=1)
    return dropped
