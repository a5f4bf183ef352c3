"""Primitives that model families share. Axis letters are listed in `coreinfer_jax.model.weights`."""

from functools import reduce

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from coreinfer_jax.model.cache import write
from coreinfer_jax.model.config import ModelConfig, Rope
from coreinfer_jax.model.weights import Attention, Linear, Mlp, Norm


def linear(x: Array, layer: Linear) -> Array:
    """x [B, T, in] through weight [out, in], or [B, out, in] (one matrix per row): [B, T, out] in x's dtype.

    Products are accumulated in float32 whatever the dtype.
    """
    y = _matmul_per_row(x, layer.weight) if layer.weight.ndim == 3 else matmul(x, layer.weight)
    return _add_bias(y, layer.bias).astype(x.dtype)


def matmul(x: Array, weight: Array) -> Array:
    """x [B, T, in] times weight [out, in]: float32 [B, T, out]."""
    if not _is_narrow_row(x):
        return _contract_last(x, weight)
    return lax.platform_dependent(x, weight, cpu=_fused_row, default=_contract_last)


def _matmul_per_row(x: Array, weight: Array) -> Array:
    """x [B, T, in], each row times its own of weight [B, out, in]: float32 [B, T, out]."""

    def one(row: Array, own: Array) -> Array:
        if not _is_narrow_row(row[None]):
            return _contract_last(row[None], own)[0]
        return lax.platform_dependent(row[None], own, cpu=_doubled_row, default=_contract_last)[0]

    return jax.vmap(one)(x, weight)


def _is_narrow_row(x: Array) -> bool:
    """Whether x [B, T, in] is one row of 16 bits."""
    # XLA's CPU code makes a float32 copy of the whole weight for such a product, in every step.
    return x.dtype.itemsize == 2 and x.shape[0] * x.shape[1] == 1


def _contract_last(x: Array, weight: Array) -> Array:
    # With float32 weights this form runs at the memory's speed on CPUs; x times the transpose is several times slower
    # at some sizes and inside larger programs.
    last = x.ndim - 1
    return lax.dot_general(x, weight, (((last,), (1,)), ((), ())), preferred_element_type=jnp.float32)


# Longer rows, 16 KiB as float32, are not fused with what they are multiplied by.
_FUSED_INPUTS = 4095


def _fused_row(x: Array, weight: Array) -> Array:
    # Times the transpose, the conversion of the weight becomes part of the product, which then runs at the memory's
    # speed; unless an addition is fused with it first, which the barrier prevents. Wide weights take several products.
    # Parts are cut from what is converted: cut before, they would be rounded to 16 bits again, weight by weight.
    row = lax.optimization_barrier(x.astype(jnp.float32))[0, 0]
    converted = weight.astype(jnp.float32)
    size = x.shape[2]
    width = -(-size // -(-size // _FUSED_INPUTS))
    starts = range(0, size, width)
    parts = [jnp.dot(row[i : i + width], converted[:, i : i + width].T)[None, None] for i in starts]
    return reduce(jnp.add, map(lax.optimization_barrier, parts))


def _doubled_row(x: Array, weight: Array) -> Array:
    # For two rows the weight is read as it is, at half the memory's speed or more.
    return _contract_last(jnp.concatenate([x, x], axis=1), weight)[:, :1]


def _add_bias(y: Array, bias: Array | None) -> Array:
    """y [B, T, out] plus bias [out], or [B, out] where every row has its own."""
    if bias is None:
        return y
    per_row = bias[:, None, :] if bias.ndim == 2 else bias[None, None, :]
    return y + per_row.astype(y.dtype)


def layer_norm(x: Array, norm: Norm, eps: float) -> Array:
    """LayerNorm over the last axis of x [B, T, D], computed in float32."""
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(axis=-1, keepdims=True)
    normed = centred * lax.rsqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + eps)
    scaled = normed * norm.scale.astype(jnp.float32)[None, None, :]
    return _add_bias(scaled, norm.bias).astype(x.dtype)


def rms_norm(x: Array, norm: Norm, eps: float) -> Array:
    """RMSNorm over the last axis of x [B, T, D]: normalised in float32, scaled in x's dtype as LLaMA does."""
    wide = x.astype(jnp.float32)
    normed = wide * lax.rsqrt(jnp.square(wide).mean(axis=-1, keepdims=True) + eps)
    return normed.astype(x.dtype) * norm.scale[None, None, :]


def rope_frequencies(head_size: int, rope: Rope) -> np.ndarray:
    """Angle per position of each of the H/2 rotated pairs: float32 [H/2]."""
    frequencies = 1.0 / rope.theta ** (np.arange(0, head_size, 2, dtype=np.float64) / head_size)
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


def rotation(positions: Array, head_size: int, rope: Rope) -> tuple[Array, Array]:
    """Cosines and sines for positions [B, T]: two float32 arrays [B, T, 1, H/2], broadcastable over heads."""
    frequencies = jnp.asarray(rope_frequencies(head_size, rope))
    angles = positions.astype(jnp.float32)[:, :, None, None] * frequencies[None, None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Array, cos_sin: tuple[Array, Array]) -> Array:
    """Apply RoPE to x [B, T, heads, H]; pair i is (x[i], x[i + H/2]), the layout of Hugging Face checkpoints."""
    cos, sin = cos_sin
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def attention(
    x: Array,
    layer: Attention,
    past: tuple[Array, Array],
    positions: Array,
    cos_sin: tuple[Array, Array] | None,
    config: ModelConfig,
) -> tuple[Array, tuple[Array, Array]]:
    """Self-attention of x [B, T, D] at `positions` [B, T], written into and read from the cache.

    Args:
        x: normalised input.
        layer: the projections.
        past: one layer's cached keys and values, each [B, G, S, H].
        positions: position of every token.
        cos_sin: rotation of queries and keys; None for models with learned positions.
        config: head counts.

    Returns:
        The block's output [B, T, D] and the cache with the new keys and values.
    """
    B, T, _ = x.shape
    query = linear(x, layer.query).reshape(B, T, config.num_heads, config.head_size)
    key = linear(x, layer.key).reshape(B, T, config.num_kv_heads, config.head_size)
    value = linear(x, layer.value).reshape(B, T, config.num_kv_heads, config.head_size)
    if cos_sin is not None:
        query, key = rotate(query, cos_sin), rotate(key, cos_sin)
    keys, values = write(past[0], key, positions), write(past[1], value, positions)
    return linear(attend(query, keys, values, positions), layer.out), (keys, values)


def attend(query: Array, keys: Array, values: Array, positions: Array) -> Array:
    """Causal attention of query [B, T, N, H] at `positions` [B, T] over keys and values [B, G, S, H]: [B, T, N H].

    Query head n reads key/value head n // (N / G). Scores and softmax are float32. Slot s is visible to a query at
    position p when s <= p, so at least one slot always is and no row of the softmax is empty.
    """
    B, T, N, H = query.shape
    G, S = keys.shape[1], keys.shape[2]
    # One batch axis B G and rows T N/G: XLA's CPU code has no bfloat16 product with two batch axes.
    grouped = query.reshape(B, T, G, N // G, H).swapaxes(1, 2).reshape(B * G, T * (N // G), H)
    scores = _batched(grouped, keys.reshape(B * G, S, H), contract=(2, 2)) * (H**-0.5)
    visible = jnp.arange(S)[None, None, :] <= positions[:, :, None]
    masked = jnp.where(visible[:, None, :, None, :], scores.reshape(B, G, T, N // G, S), -jnp.inf)
    weights = jax.nn.softmax(masked, axis=-1).astype(values.dtype).reshape(B * G, T * (N // G), S)
    mixed = _batched(weights, values.reshape(B * G, S, H), contract=(2, 1))
    return mixed.reshape(B, G, T, N // G, H).swapaxes(1, 2).reshape(B, T, N * H).astype(query.dtype)


def _batched(x: Array, y: Array, contract: tuple[int, int]) -> Array:
    """Products of x and y, both with a leading batch axis, over the axes `contract`, accumulated in float32."""
    axes = (((contract[0],), (contract[1],)), ((0,), (0,)))
    return lax.dot_general(x, y, axes, preferred_element_type=jnp.float32)


def mlp_activations(x: Array, mlp: Mlp, config: ModelConfig) -> tuple[Array, Array]:
    """Activations a [B, T, F], the input of the down projection, and what the activation function gave.

    Both are act(up x) without a gate; with one they are act(gate x) * up x and act(gate x).
    """
    act = jax.nn.relu if config.activation == "relu" else jax.nn.silu
    up = linear(x, mlp.up)
    gated = act(up if mlp.gate is None else linear(x, mlp.gate))
    return (gated if mlp.gate is None else gated * up), gated


def lookup(table: Array, ids: Array) -> Array:
    """Rows `ids` [B, T] of `table` [V, D]: [B, T, D]. Ids are checked where they enter the library."""
    return table.at[ids].get(mode="clip")
