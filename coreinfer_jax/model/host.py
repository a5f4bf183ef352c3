"""Weights that stay on the host: leaves of `Params` that are read, whole or in part, when a program needs them."""

from collections.abc import Callable, Generator, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from math import prod
from typing import Any, TypeVar

import jax
import numpy as np
from jax import Array
from jax.sharding import SingleDeviceSharding

from coreinfer_jax.errors import CoreInferError
from coreinfer_jax.model.weights import Layer, Mlp, Params, leaf_bytes

# Bytes that are read at a time where only some columns are wanted.
BLOCK_BYTES = 1 << 24
# Rows are read together with up to so many unwanted ones between them: one read more takes longer than these.
ROWS_BETWEEN = 4


@dataclass(frozen=True, eq=False)
class HostArray:
    """An array that is not on the device. It has the shape and the type of one, so that bytes are counted alike.

    Attributes:
        shape: of its values.
        dtype: of its values.
        read: reads all values, into memory of their own.
        read_rows: the same of its first axis from one number to before another; None where these cannot be read alone.
        pinned: the same values in host memory from which the device copies by itself, where they are kept there.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]
    read_rows: Callable[[int, int], np.ndarray] | None = None
    pinned: Array | None = None

    @property
    def ndim(self) -> int:
        """How many axes it has."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """How many values it has."""
        return prod(self.shape)

    def take(self, indices: np.ndarray, axis: int) -> np.ndarray:
        """Entries `indices`, ascending [K], along the first or the last axis, in memory of their own."""
        if self.read_rows is None:
            return np.take(self.read(), indices, axis=axis)
        return _rows(self, self.read_rows, indices) if axis == 0 else _columns(self, self.read_rows, indices)


def _rows(array: HostArray, read_rows: Callable[[int, int], np.ndarray], indices: np.ndarray) -> np.ndarray:
    """The rows `indices` [K], those that lie near each other read together."""
    taken = np.empty((len(indices), *array.shape[1:]), array.dtype)
    cuts = (np.flatnonzero(np.diff(indices) > ROWS_BETWEEN) + 1).tolist()
    for begin, end in zip([0, *cuts], [*cuts, len(indices)], strict=True):
        first = int(indices[begin])
        taken[begin:end] = read_rows(first, int(indices[end - 1]) + 1)[indices[begin:end] - first]
    return taken


def _columns(array: HostArray, read_rows: Callable[[int, int], np.ndarray], indices: np.ndarray) -> np.ndarray:
    """The columns `indices` [K]; all rows are read for them, some at a time."""
    taken = np.empty((array.shape[0], len(indices)), array.dtype)
    step = max(1, BLOCK_BYTES // (array.shape[1] * array.dtype.itemsize))
    for begin in range(0, array.shape[0], step):
        end = min(begin + step, array.shape[0])
        np.take(read_rows(begin, end), indices, axis=-1, out=taken[begin:end])
    return taken


def is_on_host(params: Params) -> bool:
    """Whether the MLPs of `params` stay on the host."""
    return isinstance(params.layers[0].mlp.up.weight, HostArray)


def check_on_device(params: Params, what: str) -> None:
    """Refuse parameters whose MLPs stay on the host, for `what` needs all weights on the device."""
    if is_on_host(params):
        raise CoreInferError(f"{what} needs all weights on the device: load without mlps_on_host=True")


def shapes_on_host(params: Params) -> Params:
    """`params` with shapes and types in place of what stays on the host."""

    def shape(leaf: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if isinstance(leaf, HostArray) else leaf

    shapes: Params = jax.tree.map(shape, params.weights)
    return replace(shapes, calibration=params.calibration)


def without_layers(params: Params) -> Params:
    """The weights besides those of layers."""
    return replace(params.weights, layers=())


def mlp_bytes(mlp: Mlp) -> int:
    """Bytes of all leaves of an MLP, wherever they are."""
    return sum(leaf_bytes(leaf) for leaf in jax.tree.leaves(mlp))


def on_hand(leaf: Any) -> Any:
    """A leaf as an array of NumPy or JAX: read where it stays on the host."""
    return leaf.read() if isinstance(leaf, HostArray) else leaf


def layers_on_device(params: Params, there: Mapping[int, Mlp]) -> Generator[Layer, None, None]:
    """The layers of `params` in turn, their MLPs moved to the device.

    The next MLP is read while the device works on the last. Whoever goes through them awaits the work on each before it
    asks for the one after the next: no more than two are on the device then.

    Args:
        params: with MLPs on the host.
        there: MLPs that are on the device already, by the layers' numbers.
    """
    wanted = [there.get(l, layer.mlp) for l, layer in enumerate(params.layers)]
    with closing(one_ahead(fetch, wanted)) as fetched:
        for layer, mlp in zip(params.layers, fetched, strict=True):
            yield replace(layer, mlp=put(mlp))


def fetch(mlp: Mlp) -> Mlp:
    """An MLP with every leaf as what `put` is given: read, pinned, or where it is."""

    def own(leaf: Any) -> Any:
        if not isinstance(leaf, HostArray):
            return leaf
        return leaf.read() if leaf.pinned is None else leaf.pinned

    fetched: Mlp = jax.tree.map(own, mlp)
    return fetched


def put(mlp: Mlp) -> Mlp:
    """An MLP that was fetched on the device; copies are started, not awaited. No NumPy array is to be written again."""
    moved: Mlp = jax.tree.map(_put, mlp)
    return moved


def _put(array: Any) -> Array:
    if not isinstance(array, Array):
        return jax.device_put(array)
    device: Any = next(iter(array.sharding.device_set))
    # Without the kind of memory named, what is pinned would stay where it is.
    return jax.device_put(array, SingleDeviceSharding(device, memory_kind=device.default_memory().kind))


Item = TypeVar("Item")
Made = TypeVar("Made")


def one_ahead(make: Callable[[Item], Made], items: Iterable[Item]) -> Generator[Made, None, None]:
    """`make` of each of `items`, in order; the next is made by another thread while the last is in use."""
    with ThreadPoolExecutor(max_workers=1) as worker:
        made = None
        for item in items:
            coming = worker.submit(make, item)
            if made is not None:
                yield made.result()
            made = coming
        if made is not None:
            yield made.result()
