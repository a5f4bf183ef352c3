"""Loading a model over the devices of a mesh: a process reads the parts that its own devices hold."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding

from coreinfer_jax.device import check_memory
from coreinfer_jax.io.mapping import host_array, read_as
from coreinfer_jax.io.tensors import StoredTensor
from coreinfer_jax.model.config import ModelConfig
from coreinfer_jax.model.host import HostArray
from coreinfer_jax.model.shards import bytes_here, devices_sharing
from coreinfer_jax.model.spread import repeated, spread_config
from coreinfer_jax.model.structure import abstract_params
from coreinfer_jax.model.weights import Params, named_leaves, with_leaves
from coreinfer_jax.progress import progress


def load_spread(
    tensors: Mapping[str, StoredTensor], config: ModelConfig, dtype: np.dtype, mesh: Mesh, where: str
) -> Params:
    """The weights of `config` as `spread` would place them, without a calibration.

    Where all devices are this process's, a tensor is read once, whole; else only the rows of those that are. Of what is
    spread along its last axis all is read, for each of these devices, and its own columns are kept.

    Raises:
        CoreInferError: as `load` and `spread`.
    """
    spread = spread_config(config, mesh)
    shapes = replace(abstract_params(spread, jnp.dtype(dtype)), mesh=mesh)
    specs: list[tuple[str, Any]] = named_leaves(shapes.specs())
    placed = {name: NamedSharding(mesh, spec) for name, spec in specs}
    sizes = {name: leaf.shape for name, leaf in named_leaves(shapes)}
    here = sum(bytes_here(sizes[name], own.spec, dtype.itemsize, mesh) for name, own in placed.items())
    check_memory(here * devices_sharing(mesh), f"{where}, as {dtype}", "take more devices, or a 16-bit dtype")
    heads, times = config.num_kv_heads, spread.num_kv_heads // config.num_kv_heads

    def leaf(name: str) -> Array:
        tensor, sharding = tensors[name], placed[name]
        copies = times if ".attention.key." in name or ".attention.value." in name else 1
        if sharding.is_fully_addressable:
            array = read_as(tensor, name, dtype, where)
            return jax.device_put(array if copies == 1 else repeated(array, heads, copies), sharding)
        part = part_of(host_array(tensor, dtype), heads, copies)
        return jax.make_array_from_callback(sizes[name], sharding, part)

    arrays = {name: leaf(name) for name in progress(list(sizes), desc="loading", unit="tensor")}
    return with_leaves(shapes, arrays.__getitem__)


def part_of(array: HostArray, heads: int, copies: int) -> Callable[[Any], np.ndarray]:
    """What reads the part of a tensor that an index of rows and columns names, for one device.

    Args:
        array: the tensor as it is stored.
        heads: whose rows it has.
        copies: how many devices hold each; the index is of the tensor with every head so many times.
    """

    def read(index: tuple[slice, ...]) -> np.ndarray:
        rows, columns = index[0], index[-1]
        if array.ndim > 1 and columns.start is not None:
            return array.take(np.arange(columns.start, columns.stop), axis=-1)
        begin, end, _ = rows.indices(array.shape[0] * copies)
        if copies > 1:  # one head on each device
            size = array.shape[0] // heads
            begin = begin // size // copies * size
            end = begin + size
        return array.read()[begin:end] if array.read_rows is None else array.read_rows(begin, end)

    return read
