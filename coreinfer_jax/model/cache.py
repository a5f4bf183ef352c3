"""The KV cache: past keys and values, slot s of a row holding position s of that row."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array
from jax.sharding import Mesh

from coreinfer_jax.model.config import ModelConfig
from coreinfer_jax.model.shards import along, constrained

MIN_BUCKET = 64


@struct.dataclass
class KVCache:
    """Keys and values of the tokens seen so far.

    Rows of a batch are stored from slot 0 whatever their lengths, so a query at position p may attend to slots
    0 .. p and needs no other mask; what padding wrote beyond a row's length is overwritten before it can be seen.
    Layers that see only a window keep all slots too, so that a slot is a position in every layer.

    Attributes:
        keys: L arrays [B, G, S, H], in the model's dtype.
        values: the same.
    """

    keys: tuple[Array, ...]
    values: tuple[Array, ...]

    def specs(self) -> "KVCache":
        """Heads are spread over devices."""
        by_heads: KVCache = jax.tree.map(lambda array: along(1, array.ndim), self)
        return by_heads

    @property
    def capacity(self) -> int:
        """S, the positions a row can hold."""
        return int(self.keys[0].shape[2])


@partial(jax.jit, static_argnames=("config", "rows", "capacity", "dtype", "mesh"))
def init_cache(config: ModelConfig, rows: int, capacity: int, dtype: jnp.dtype, mesh: Mesh | None = None) -> KVCache:
    """An empty cache for `rows` (B) rows of `capacity` (S) positions, on the devices of a mesh where there is one."""
    shape = (rows, config.num_kv_heads, capacity, config.head_size)

    def empty() -> tuple[Array, ...]:
        return tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers))

    made: KVCache = constrained(KVCache(keys=empty(), values=empty()), mesh)
    return made


def cache_bytes(config: ModelConfig, rows: int, capacity: int, dtype: jnp.dtype) -> int:
    """Bytes of `init_cache`."""
    return 2 * config.num_layers * rows * config.num_kv_heads * capacity * config.head_size * dtype.itemsize


def with_capacity(cache: KVCache, capacity: int) -> KVCache:
    """`cache` with room for at least `capacity` positions per row; one with less room is used up.

    Its arrays are given back one by one, so that no more than one of them is there beside its successors.
    """
    if cache.capacity >= capacity:
        return cache

    def successor(array: Array) -> Array:
        grown = jax.block_until_ready(_grown(array, capacity))
        array.delete()
        return grown

    made: KVCache = jax.tree.map(successor, cache)
    return made


@partial(jax.jit, static_argnames="capacity")
def _grown(array: Array, capacity: int) -> Array:
    return jnp.pad(array, ((0, 0), (0, 0), (0, capacity - array.shape[2]), (0, 0)))


def bucket(length: int, least: int = MIN_BUCKET) -> int:
    """The next power of two, at least `least`: programs are compiled per bucket and not per length."""
    return max(least, 1 << (length - 1).bit_length())
