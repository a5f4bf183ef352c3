"""Perplexity with fewer neurons: against alpha, token by token, and against beta, text by text (paper, Fig. 2)."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from coreinfer_jax.checks import check_finite
from coreinfer_jax.errors import CoreInferError
from coreinfer_jax.lab.analysis.inputs import Inputs
from coreinfer_jax.lab.analysis.observe import core_masks, everyone, observe_votes, text_batches, within
from coreinfer_jax.lab.reading import read_whole
from coreinfer_jax.model import MlpPass, extend, observe_nothing, unembed
from coreinfer_jax.model.cache import KVCache, init_cache
from coreinfer_jax.model.config import ModelConfig
from coreinfer_jax.model.weights import Layer, Params
from coreinfer_jax.sparsity.votes import Tally, Voting, kept_neurons, token_core_neurons

SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
MOST_PROMPT, CONTINUATION = 256, 128


def tokens_needed(config: ModelConfig) -> int | None:
    """Prompt, continuation, and the token that the last one foretells; None where the model has too few positions."""
    prompt = min(MOST_PROMPT, config.max_positions - CONTINUATION)
    return prompt + CONTINUATION + 1 if prompt >= 2 else None


def measure(inputs: Inputs) -> dict[str, Any]:
    """Perplexities of the same texts, dense and at every alpha and beta.

    `token`: each token's MLP outputs come from its own token-wise core neurons. `text`: from the sentence-wise core
    neurons of the whole text, chosen by a dense pass. `decoding`: the last 128 tokens, read over the dense prompt's
    cache on the core neurons of the prompt alone, which is what decoding meets.
    """
    size = tokens_needed(inputs.config)
    assert size is not None, "the part is left out where it does not fit"
    selection = inputs.corpus.select(size, inputs.texts)
    rows = [_batch(inputs, tokens, real) for tokens, real in text_batches(selection.rows, "perplexity")]
    losses = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
    found = {name: np.exp(values.mean(axis=0)).tolist() for name, values in losses.items()}
    if not np.isfinite([value for values in losses.values() for value in values.reshape(-1)]).all():
        raise CoreInferError("perplexity: a loss is not finite; check the checkpoint, or use --dtype float32")
    return {
        **inputs.facts(),
        "texts": len(selection.rows),
        "too_short": selection.too_short,
        "prompt_tokens": size - CONTINUATION - 1,
        "continuation_tokens": CONTINUATION,
        "shares": SHARES,
        "perplexity": found,
    }


def _batch(inputs: Inputs, tokens: np.ndarray, real: int) -> dict[str, np.ndarray]:
    """Mean losses per text [real] or [real, shares], in nats per token, of texts [B, T + 1]."""
    params, F = inputs.params, inputs.config.mlp_size
    read, following = jnp.asarray(tokens[:, :-1]), jnp.asarray(tokens[:, 1:])
    B, T = read.shape
    prompt = T - CONTINUATION
    voting = everyone(tokens[:, :-1], F, inputs.alpha)
    dense, cache, votes, finite = _dense(params, read, following, voting, within((prompt, T), T))
    check_finite(finite, "activations")
    empty = init_cache(params.config, B, T, params.dtype)
    begin, middle = jnp.zeros(B, jnp.int32), jnp.full(B, prompt, jnp.int32)

    def narrowed(beta: float) -> tuple[Array, Array]:
        masks = [core_masks(layer, kept_neurons(beta, F)) for layer in votes]
        whole = _narrowed(params, read, following, empty, begin, [mask[:, 1] for mask in masks])
        # What the dense pass cached beyond the prompt is overwritten before it can be seen.
        rest = read[:, prompt:], following[:, prompt:]
        return whole, _narrowed(params, *rest, cache, middle, [mask[:, 0] for mask in masks])

    by_token = [_by_token(params, read, following, everyone(tokens[:, :-1], F, alpha)) for alpha in SHARES]
    by_text, decoding = zip(*map(narrowed, SHARES), strict=True)

    def stacked(losses: Iterable[Array]) -> np.ndarray:
        return np.stack([np.asarray(loss, np.float64)[:real] for loss in losses], axis=1)

    per_token = np.asarray(dense, np.float64)[:real]
    return {
        "dense": per_token.mean(axis=1),
        "dense_continuation": per_token[:, prompt:].mean(axis=1),
        "token": stacked(by_token),
        "text": stacked(by_text),
        "decoding": stacked(decoding),
    }


@jax.jit
def _dense(
    params: Params, read: Array, following: Array, voting: Voting, lengths: Array
) -> tuple[Array, KVCache, list[Tally], Array]:
    """Losses [B, T] of the full model, its cache, votes [B, M, F] per layer, whether all activations were finite."""
    hidden, cache, votes, finite = read_whole(params, read, observe_votes(voting, lengths))
    return _losses(params, hidden, following), cache, votes, finite


@jax.jit
def _by_token(params: Params, read: Array, following: Array, voting: Voting) -> Array:
    """Mean losses [B] where every MLP output comes from the token's own token-wise core neurons."""
    B, T = read.shape
    cache = init_cache(params.config, B, T, params.dtype)

    def edit(l: int, layer: Layer, seen: MlpPass) -> Array:
        return jnp.where(token_core_neurons(seen.activations, voting), seen.activations, 0)

    hidden, _, _ = extend(params, read, cache, jnp.zeros(B, jnp.int32), observe_nothing, edit)
    return _losses(params, hidden, following).mean(axis=1)


@jax.jit
def _narrowed(params: Params, read: Array, following: Array, cache: KVCache, start: Array, masks: list[Array]) -> Array:
    """Mean losses [B] where only the neurons of each layer's mask, bool [B, F], reach the down projection.

    The same numbers as with narrowed weights, in shapes that do not depend on the keep ratio.
    """

    def edit(l: int, layer: Layer, seen: MlpPass) -> Array:
        return jnp.where(masks[l][:, None, :], seen.activations, 0)

    hidden, _, _ = extend(params, read, cache, start, observe_nothing, edit)
    return _losses(params, hidden, following).mean(axis=1)


def _losses(params: Params, hidden: Array, following: Array) -> Array:
    return optax.softmax_cross_entropy_with_integer_labels(unembed(params, hidden), following)
