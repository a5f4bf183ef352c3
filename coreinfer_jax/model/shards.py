"""A model over the devices of a mesh: which part of each array a device holds, and what devices tell each other.

Tensor parallelism as in Megatron-LM (arXiv 1909.08053): attention heads and MLP neurons are spread over the devices,
so that a layer's sums over heads and over neurons are the two that need all of them. Programs are `jax.shard_map`s: a
device runs the code of a single one on its own parts, and these sums are written where they stand.
"""

from collections.abc import Callable
from functools import partial, wraps
from math import prod
from typing import Any, ParamSpec, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from coreinfer_jax.checks import check_whole
from coreinfer_jax.errors import CoreInferError, shown

# The axis of a mesh that heads, neurons and the vocabulary are spread over.
AXIS = "tensor"
# `Any`, as in a `Spread`'s specs it stands for arrays.
WHOLE: Any = PartitionSpec()


def make_mesh(tensor: int) -> Mesh:
    """A mesh of so many devices for `load(mesh=)`: those of this process, or of all after `jax.distributed.initialize`.

    Args:
        tensor: devices to spread heads and neurons over.

    Raises:
        CoreInferError: fewer devices are there.
    """
    check_whole("tensor", tensor, 1)
    there = jax.devices()
    if tensor > len(there):
        raise CoreInferError(f"tensor={tensor}: of {there[0].platform} devices there are {len(there)}; ask for no more")
    without = {device.process_index for device in there} - {device.process_index for device in there[:tensor]}
    if without:
        raise CoreInferError(
            f"tensor={tensor}: {len(without)} of {jax.process_count()} processes would have no device in it; "
            f"there are {len(there)} devices: ask for more of them, or start fewer processes"
        )
    return jax.make_mesh((tensor,), (AXIS,), axis_types=(AxisType.Auto,), devices=there[:tensor])


def check_mesh(mesh: object) -> None:
    """Refuse what is no mesh, or has other axes than the one that models are spread over."""
    if not isinstance(mesh, Mesh):
        raise CoreInferError(f"mesh={shown(mesh)}: give what make_mesh returns")
    if mesh.axis_names != (AXIS,):
        raise CoreInferError(f"mesh: has axes {', '.join(map(str, mesh.axis_names))}; give one axis, {AXIS!r}")


def shards_of(mesh: Mesh | None) -> int:
    """How many devices heads and neurons are spread over; 1 without a mesh."""
    return 1 if mesh is None else int(mesh.shape[AXIS])


@runtime_checkable
class Spread(Protocol):
    """What knows how its arrays are spread."""

    def specs(self) -> Any:
        """The same with a `PartitionSpec` in the place of every array."""


def specs(tree: Any) -> Any:
    """`tree` with a `PartitionSpec` in the place of every array: whole on every device, unless it is of a `Spread`."""
    return jax.tree.map(
        lambda part: part.specs() if isinstance(part, Spread) else WHOLE,
        tree,
        is_leaf=lambda part: isinstance(part, Spread),
    )


def along(axis: int, ndim: int) -> Any:
    """The spec of an array of `ndim` axes, spread along one of them."""
    axes: list[str | None] = [None] * ndim
    axes[axis] = AXIS
    return PartitionSpec(*axes)


Made = TypeVar("Made")
Given = ParamSpec("Given")


def over_shards(
    function: Callable[..., Made], mesh: Mesh | None, results: Any, arguments: Any = None
) -> Callable[..., Made]:
    """`function` on each device's own parts of its arguments; itself without a mesh.

    Within it the functions below tell what other devices hold.

    Args:
        function: of arrays.
        mesh: the devices.
        results: specs of what it returns.
        arguments: specs of what it takes; None for what `specs` says of them.
    """
    if mesh is None:
        return function

    def run(*given: Any) -> Made:
        # What devices hold alike is not proven by types: checks of these know no loop that ends by data.
        parts = tuple(map(specs, given)) if arguments is None else arguments
        spread = jax.shard_map(function, mesh=mesh, in_specs=parts, out_specs=results, check_vma=False)
        made: Made = spread(*given)
        return made

    return run


def on_shards(results: Callable[..., Any]) -> Callable[[Callable[Given, Made]], Callable[Given, Made]]:
    """Make a function of `params` and further arrays run on each device's own parts of them, as `over_shards` does.

    Args:
        results: specs of what it returns, from its arrays. What is given by name is no array.
    """

    def decorate(function: Callable[Given, Made]) -> Callable[Given, Made]:
        @wraps(function)
        def run(*arrays: Given.args, **static: Given.kwargs) -> Made:
            params: Any = arrays[0]
            return over_shards(partial(function, **static), params.mesh, results(*arrays))(*arrays)

        return run

    return decorate


def place(tree: Any, mesh: Mesh) -> Any:
    """`tree` with every array where `specs` says."""
    return jax.tree.map(lambda array, spec: jax.device_put(array, NamedSharding(mesh, spec)), tree, specs(tree))


def constrained(tree: Any, mesh: Mesh | None) -> Any:
    """Within a program, `tree` with every array laid out as `specs` says; itself without a mesh."""
    if mesh is None:
        return tree
    return jax.tree.map(
        lambda array, spec: lax.with_sharding_constraint(array, NamedSharding(mesh, spec)), tree, specs(tree)
    )


def shards_here() -> int:
    """Within a program, how many devices hold parts of what it reads; 1 where it is not spread."""
    mesh = jax.sharding.get_abstract_mesh()
    return int(mesh.shape[AXIS]) if AXIS in mesh.manual_axes else 1


def shard_here() -> Array | int:
    """The number of this device among those, int32 []."""
    return lax.axis_index(AXIS) if shards_here() > 1 else 0


def total(part: Array) -> Array:
    """The sum over all devices of what each has."""
    return lax.psum(part, AXIS) if shards_here() > 1 else part


def joined(part: Array) -> Array:
    """All devices' parts one behind the other, along the last axis."""
    return lax.all_gather(part, AXIS, axis=part.ndim - 1, tiled=True) if shards_here() > 1 else part


def own_total(whole: Array) -> Array:
    """This device's part, along the last axis, of the sum over all devices of what each has."""
    if shards_here() == 1:
        return whole
    return lax.psum_scatter(whole, AXIS, scatter_dimension=whole.ndim - 1, tiled=True)


def own_part(whole: Array, axis: int) -> Array:
    """This device's part of what all have, along `axis`."""
    size = whole.shape[axis] // shards_here()
    return whole if shards_here() == 1 else lax.dynamic_slice_in_dim(whole, shard_here() * size, size, axis)


def bytes_here(shape: tuple[int, ...], spec: PartitionSpec, itemsize: int, mesh: Mesh) -> int:
    """Bytes of an array that one device holds."""
    return prod(NamedSharding(mesh, spec).shard_shape(shape)) * itemsize


def bytes_in_a_memory(size: int, mesh: Mesh | None) -> int:
    """Of arrays of `size` bytes in all, those in one memory, in equal shares: what devices hold alike is little."""
    return size * devices_sharing(mesh) // shards_of(mesh)


def devices_sharing(mesh: Mesh | None) -> int:
    """How many of the mesh's devices share a memory: on a CPU all that are this process's; others have their own."""
    if mesh is None:
        return 1
    local = mesh.local_devices
    return len(local) if local[0].platform == "cpu" else 1


def agreed(measured: Array, mesh: Mesh | None) -> Array:
    """What the first process has measured, in all processes of the mesh: they are to decide alike."""
    if mesh is None or not mesh.is_multi_process:
        return measured
    return jnp.asarray(multihost_utils.broadcast_one_to_all(measured))
