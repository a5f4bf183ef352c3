"""Primitives that model families share. Axis letters are listed in `coreinfer_jax.model.weights`."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import gcd

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array, lax

from coreinfer_jax.model.backends import one_pass, write, write_run
from coreinfer_jax.model.config import ModelConfig, Rope
from coreinfer_jax.model.shards import shard_here, total
from coreinfer_jax.model.weights import Attention, Mlp, Norm, Params, each


@dataclass(frozen=True)
class LayerContext:
    """What one layer is told of the tokens that it reads, beside their hidden states.

    Attributes:
        rotation: cosines and sines of their positions, as `rotation` gives them; None where nothing is rotated.
        window: how many tokens a query sees, itself among them; None for all before it.
        filled: slots of the cache, from the first on, that hold all there is to see; None for all of them.
        in_blocks: whether the cache is read block by block, as `attend_in_blocks` does.
    """

    rotation: tuple[Array, Array] | None = None
    window: int | None = None
    filled: int | None = None
    in_blocks: bool = False


# The norms are compiled apart, so that layers of the same shapes share one trace.
@partial(jax.jit, static_argnames="eps")
def layer_norm(x: Array, norm: Norm, eps: float) -> Array:
    """LayerNorm over the last axis of x [B, T, D], computed in float32."""
    return one_pass(partial(_layer_normed, norm=norm, eps=eps), x)


def _layer_normed(x: Array, norm: Norm, eps: float) -> Array:
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(axis=-1, keepdims=True)
    normed = centred * lax.rsqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + eps)
    scaled = normed * norm.scale.astype(jnp.float32)[None, None, :]
    shifted = scaled if norm.bias is None else scaled + norm.bias.astype(jnp.float32)[None, None, :]
    return shifted.astype(x.dtype)


@partial(jax.jit, static_argnames="eps")
def rms_norm(x: Array, norm: Norm, eps: float) -> Array:
    """RMSNorm over the last axis of x [B, T, ..., D]: normalised in float32, scaled in x's dtype as LLaMA does."""
    return one_pass(partial(_rms_normed, norm=norm, eps=eps), x)


def _rms_normed(x: Array, norm: Norm, eps: float) -> Array:
    wide = x.astype(jnp.float32)
    normed = wide * lax.rsqrt(jnp.square(wide).mean(axis=-1, keepdims=True) + eps)
    return normed.astype(x.dtype) * norm.scale[(None,) * (x.ndim - 1)]


def rms_normed(x: Array, norm: Norm | None, config: ModelConfig) -> Array:
    """RMSNorm over the last axis of x [B, T, ..., D] as the model's family does; x itself without a norm."""
    if norm is None:
        return x
    if not config.norm_plus_one:
        return rms_norm(x, norm, config.norm_eps)
    # Scaled before it is rounded, unlike LLaMA's.
    one = Norm(scale=norm.scale.astype(jnp.float32) + 1.0)
    return rms_norm(x.astype(jnp.float32), one, config.norm_eps).astype(x.dtype)


def soft_capped(x: Array, cap: float | None) -> Array:
    """x pressed between -cap and cap, whatever its shape."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def rope_frequencies(head_size: int, rope: Rope, is_long: bool = False) -> np.ndarray:
    """Angle per position of each of the rotated pairs, H/2 where the whole head rotates: float32 [H/2]."""
    size = int(head_size * rope.part)
    frequencies = 1.0 / rope.theta ** (np.arange(0, size, 2, dtype=np.float64) / size)
    if rope.scaling == "longrope":
        frequencies = frequencies / np.asarray(rope.long_factors if is_long else rope.short_factors)
    if rope.scaling == "linear":
        frequencies = frequencies / rope.factor
    if rope.scaling == "llama3":
        frequencies = _llama3_frequencies(frequencies, rope)
    return frequencies.astype(np.float32)


def _llama3_frequencies(frequencies: np.ndarray, rope: Rope) -> np.ndarray:
    """Llama 3.1: short wavelengths stay, long ones are stretched by `factor`, those between are interpolated."""
    turns = rope.original_max_positions * frequencies / (2 * np.pi)  # rotations within the trained context
    kept = np.clip((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0.0, 1.0)
    return kept * frequencies + (1 - kept) * frequencies / rope.factor


def rotation(positions: Array, head_size: int, rope: Rope, capacity: int) -> tuple[Array, Array]:
    """Cosines and sines for positions [B, T]: two float32 arrays [B, T, 1, H/2], broadcastable over heads.

    Where a part of each head rotates, they are as many as there are rotated pairs. `capacity` (S) is what the run has
    room for.
    """
    frequencies = jnp.asarray(rope_frequencies(head_size, rope, rope.is_long(capacity)))
    angles = positions.astype(jnp.float32)[:, :, None, None] * frequencies[None, None, None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return (cos, sin) if rope.attention_factor == 1.0 else (cos * rope.attention_factor, sin * rope.attention_factor)


def rotate(x: Array, cos_sin: tuple[Array, Array]) -> Array:
    """Apply RoPE to x [B, T, heads, H]; pair i is (x[i], x[i + H/2]), the layout of Hugging Face checkpoints.

    With fewer pairs than H/2 only the first entries rotate.
    """
    cos, sin = cos_sin
    size = 2 * cos.shape[-1]
    if size < x.shape[-1]:
        return jnp.concatenate([rotate(x[..., :size], cos_sin), x[..., size:]], axis=-1)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def attention(
    x: Array,
    layer: Attention,
    past: tuple[Array, Array],
    positions: Array,
    context: LayerContext,
    config: ModelConfig,
) -> tuple[Array, tuple[Array, Array]]:
    """Self-attention of x [B, T, D] at `positions` [B, T], written into and read from the cache.

    Args:
        x: normalised input.
        layer: the projections.
        past: one layer's cached keys and values, each [B, G, S, H].
        positions: position of every token.
        context: the rotation of queries and keys, and how far the layer sees.
        config: head counts, and how scores are scaled.

    Returns:
        The block's output [B, T, D] and the cache with the new keys and values.
    """
    B, T, _ = x.shape
    query, key, value = (y.reshape(B, T, -1, config.head_size) for y in each(x, layer.query, layer.key, layer.value))
    query, key = rms_normed(query, layer.query_norm, config), rms_normed(key, layer.key_norm, config)
    if context.rotation is not None:
        query, key = rotate(query, context.rotation), rotate(key, context.rotation)
    put, mix = (write_run, attend_in_blocks) if context.in_blocks else (write, attend)
    keys, values = put(past[0], key, positions), put(past[1], value, positions)
    seen_keys, seen_values = keys[:, :, : context.filled], values[:, :, : context.filled]
    mixed = mix(query, seen_keys, seen_values, positions, context.window, config)
    return layer.out.over_inputs(mixed), (keys, values)


def attend(
    query: Array, keys: Array, values: Array, positions: Array, window: int | None, config: ModelConfig
) -> Array:
    """Causal attention of query [B, T, N, H] at `positions` [B, T] over keys and values [B, G, S, H]: [B, T, N H].

    Query head n reads key/value head n // (N / G). Scores and softmax are float32. Slot s is visible to a query at
    position p when p - window < s <= p, so at least one slot always is and no row of the softmax is empty.
    """
    weights = jax.nn.softmax(_scores(query, keys, jnp.arange(keys.shape[2]), positions, window, config), axis=-1)
    return _by_token(_batched(weights.astype(values.dtype), _heads(values), contract=(2, 1)), query)


# Slots whose scores, float32 [B, N, T, 512], are alive at a time. On two cores 256 are as fast, all at once slower.
KEYS_PER_BLOCK = 512


def attend_in_blocks(
    query: Array, keys: Array, values: Array, positions: Array, window: int | None, config: ModelConfig
) -> Array:
    """`attend`, whose scores are made block by block of the slots that any query sees, with a running softmax.

    Its memory does not grow with the cache, nor its time with slots that are not filled. How many blocks there are is
    data, so that it has no derivative in reverse.
    """
    B, T, N, H = query.shape
    G, S = keys.shape[1], keys.shape[2]
    size = gcd(S, KEYS_PER_BLOCK)

    def add(i: Array, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        peak, total, mixed = sums
        own_keys, own_values = (lax.dynamic_slice_in_dim(past, i * size, size, axis=2) for past in (keys, values))
        scores = _scores(query, own_keys, i * size + jnp.arange(size), positions, window, config)
        higher = jnp.maximum(peak, scores.max(axis=-1, keepdims=True))
        weights, shrunk = jnp.exp(scores - higher), jnp.exp(peak - higher)
        own = _batched(weights.astype(values.dtype), _heads(own_values), contract=(2, 1))
        return higher, shrunk * total + weights.sum(axis=-1, keepdims=True), shrunk * mixed + own

    # The lowest number and not -inf: a block of which a query sees nothing then counts nothing.
    rows = (B * G, T * (N // G))
    peak = jnp.full((*rows, 1), jnp.finfo(jnp.float32).min)
    nothing = peak, jnp.zeros((*rows, 1)), jnp.zeros((*rows, H))
    first = 0 if window is None else jnp.maximum(positions.min() - window + 1, 0) // size
    end = jnp.minimum(positions.max() // size + 1, S // size)
    _, total, mixed = lax.fori_loop(first, end, add, nothing)
    return _by_token(mixed / total, query)


def _scores(
    query: Array, keys: Array, slots: Array, positions: Array, window: int | None, config: ModelConfig
) -> Array:
    """Scores of query [B, T, N, H] and keys [B, G, S, H] at `slots` [S]: float32 [B G, T N/G, S], -inf if not seen."""
    B, T, N, H = query.shape
    G, S = keys.shape[1], keys.shape[2]
    # One batch axis B G and rows T N/G: XLA's CPU code has no bfloat16 product with two batch axes.
    grouped = query.reshape(B, T, G, N // G, H).swapaxes(1, 2).reshape(B * G, T * (N // G), H)
    scores = _batched(grouped, _heads(keys), contract=(2, 2)) * ((config.query_scalar or H) ** -0.5)
    scores = soft_capped(scores, config.score_cap)
    visible = slots[None, None, :] <= positions[:, :, None]
    if window is not None:
        visible &= slots[None, None, :] > positions[:, :, None] - window
    masked = jnp.where(visible[:, None, :, None, :], scores.reshape(B, G, T, N // G, S), -jnp.inf)
    return masked.reshape(B * G, T * (N // G), S)


def _heads(past: Array) -> Array:
    """Keys or values [B, G, S, H] with one axis of heads, [B G, S, H]."""
    return past.reshape(-1, *past.shape[2:])


def _by_token(mixed: Array, query: Array) -> Array:
    """What heads read, [B G, T N/G, H], in the order and type of query [B, T, N, H]: [B, T, N H]."""
    B, T, N, H = query.shape
    per_head = mixed.reshape(B, -1, T, N * B // mixed.shape[0], H)
    return per_head.swapaxes(1, 2).reshape(B, T, N * H).astype(query.dtype)


def _batched(x: Array, y: Array, contract: tuple[int, int]) -> Array:
    """Products of x and y, both with a leading batch axis, over the axes `contract`, accumulated in float32."""
    axes = (((contract[0],), (contract[1],)), ((0,), (0,)))
    return lax.dot_general(x, y, axes, preferred_element_type=jnp.float32)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
}


@struct.dataclass
class MlpPass:
    """What an MLP read, and what came of it.

    Attributes:
        inputs: x [B, T, D].
        activations: [B, T, F], what the down projection reads of all neurons but linear ones.
        gated: [B, T, F], what the activation function gave.
    """

    inputs: Array
    activations: Array
    gated: Array


def mlp_pass(x: Array, mlp: Mlp, config: ModelConfig) -> MlpPass:
    """The neurons of an MLP that reads x [B, T, D].

    Both `activations` and `gated` are act(up x) without a gate; with one they are act(gate x) * up x and act(gate x),
    or with `activates_up` act(gate x) * act(up x) and act(gate x).
    """
    act = ACTIVATIONS[config.activation]
    if mlp.gate is None:
        activations = act(mlp.up(x))
        return MlpPass(x, activations, activations)
    gate, up = each(x, mlp.gate, mlp.up)
    gated = act(gate)
    return MlpPass(x, gated * (act(up) if config.activates_up else up), gated)


def mlp_output(seen: MlpPass, activations: Array, mlp: Mlp) -> Array:
    """What an MLP adds, [B, T, D], with `activations` [B, T, F] in place of those that were `seen`."""
    if mlp.linear is None:
        return mlp.down.over_inputs(activations)
    return mlp.down.over_inputs(jnp.concatenate([activations, mlp.linear(seen.inputs)], axis=-1))


def lookup(table: Array, ids: Array) -> Array:
    """Rows `ids` [B, T] of `table` [V, D]: [B, T, D]. Ids are checked where they enter the library."""
    return table.at[ids].get(mode="clip")


def embeddings(params: Params, tokens: Array) -> Array:
    """The embeddings [B, T, E] of tokens [B, T], wherever the vocabulary's rows are."""
    table = params.token_embedding
    if len(table) == params.config.vocab_size:
        return lookup(table, tokens)
    ids = tokens - shard_here() * jnp.int32(len(table))
    is_here = (ids >= 0) & (ids < len(table))
    return total(jnp.where(is_here[:, :, None], lookup(table, jnp.maximum(ids, 0)), 0))
