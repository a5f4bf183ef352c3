"""Narrowed weights: the MLPs of a model cut down to core neurons, by one gather per prompt."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from coreinfer_jax.errors import CoreInferError, shown
from coreinfer_jax.model.backends import width_multiple
from coreinfer_jax.model.host import check_on_device, shapes_on_host
from coreinfer_jax.model.shards import along, over_shards, own_part, shard_here, shards_here, specs
from coreinfer_jax.model.weights import Linear, Mlp, Params, check_dense
from coreinfer_jax.sparsity.calibration import explained_by
from coreinfer_jax.sparsity.linear import LinearFit, neurons_worth
from coreinfer_jax.sparsity.neurons import CoreNeurons

# Per layer of a model: kept neurons, [K] or [B, K], and what is added to the output for all others, [D] or [B, D].
Indices = tuple[Array | None, ...]
Offsets = tuple[Array | None, ...]
# Whether linear neurons stand for these as well; None for nowhere.
Linears = tuple[bool, ...]


def compact(params: Params, core: CoreNeurons) -> Params:
    """`params` with every MLP narrowed to its core neurons; all other weights are shared, not copied.

    The result computes what the full model computes with all other neurons' activations set to zero, plus the offsets
    that `core` holds, and what linear neurons write for them where it has these. On accelerators, which are slow at
    other widths, neurons of zeros pad K to a multiple of 128.

    Args:
        params: dense weights.
        core: K indices per layer, or [B, K] with one set per row of the batches the result is meant for; layers
            given as None stay dense.

    Returns:
        `Params` whose narrowed MLPs have gate and up [K, D] and down [D, K], or the same with a leading B. Those with
        r linear neurons also have linear [r, D], and down [D, K + r].

    Raises:
        CoreInferError: `core` does not fit the model, or asks for linear neurons that its calibration does not have, or
            `params` are narrowed already.
    """
    check_core(core)
    check_dense(params)
    check_on_device(params, "compact")
    core.check(params.config)
    check_linear(params, core.linear)
    return narrow(params, *on_device(params, core), core.linear)


def check_linear(params: Params, linear: Linears) -> None:
    """Refuse parameters without the linear neurons that are asked for, layer by layer."""
    if any(linear) and explained_by(params) is None:
        raise CoreInferError(
            "core neurons stand beside linear ones of a calibration, and params have none: load them with it, or give "
            "core neurons with linear=False"
        )


def check_core(core: object) -> None:
    """Refuse what is no `CoreNeurons`, such as the `CoreConfig` to choose them with."""
    if not isinstance(core, CoreNeurons):
        raise CoreInferError(f"core={shown(core)}: give CoreNeurons, for instance those of a Generation")


def on_device(params: Params, core: CoreNeurons) -> tuple[Indices, Offsets]:
    """The arrays of core neurons, as `narrow` takes them."""
    sets = tuple(
        None if indices is None else _by_shards(indices, params.config.mlp_size, params.shards)
        for indices in core.layers
    )
    return _arrays(sets), _arrays(core.offsets)


def _by_shards(indices: np.ndarray, mlp_size: int, shards: int) -> np.ndarray:
    """Index sets [K] or [B, K] as [n k] or [B, n k]: each device's own behind each other, made up to the same number.

    What makes it up is `mlp_size` (F), which is no neuron.
    """
    if shards == 1:
        return indices
    rows, shard = np.atleast_2d(indices), np.atleast_2d(indices) // (mlp_size // shards)
    each = [[row[own == s] for s in range(shards)] for row, own in zip(rows, shard, strict=True)]
    most = max(len(part) for row in each for part in row)
    padded = [[np.pad(part, (0, most - len(part)), constant_values=mlp_size) for part in row] for row in each]
    return np.array(padded, np.int32).reshape(*indices.shape[:-1], shards * most)


def _arrays(layers: tuple[np.ndarray | None, ...]) -> tuple[Array | None, ...]:
    return tuple(None if layer is None else jnp.asarray(layer) for layer in layers)


def narrow(params: Params, indices: Indices, offsets: Offsets, linear: Linears | None = None) -> Params:
    """`compact` with one index array per layer on the device, [K] or [B, K], or None for a dense layer.

    Where neurons are spread over devices, as many of each array's indices belong to each of them, in order.
    """
    gather = partial(gather_core, multiple=multiple_of(params), mesh=params.mesh)
    return _with_mlps(params, indices, offsets, linear, gather)


def narrowed_shapes(params: Params, indices: Indices, offsets: Offsets, linear: Linears | None = None) -> Params:
    """The shapes and types of what `narrow` returns, in place of its narrowed arrays."""
    gather = partial(gather_core.eval_shape, multiple=multiple_of(params), mesh=params.mesh)
    return _with_mlps(shapes_on_host(params), indices, offsets, linear, gather)


def multiple_of(params: Params) -> int:
    """What the widths of `params`' narrowed MLPs are padded to a multiple of, where they lie."""
    return width_multiple(params.layers[0].mlp.up.weight)


def linear_worth(params: Params) -> int:
    """How many of a layer's neurons cost the bytes of its linear ones, as they are padded; 0 where there are none."""
    known = explained_by(params)
    if known is None:
        return 0
    multiple = multiple_of(params)
    size = padded_linear(known.size, multiple * params.shards)
    return neurons_worth(size, gated=params.layers[0].mlp.gate is not None)


def padded_width(kept: int, mlp_size: int, multiple: int) -> int:
    """The width of an MLP narrowed to `kept` of F neurons: the next multiple, unless that is F or more.

    So it is never wider than the dense one, and as wide only with all of its neurons: `check_dense` goes by widths.
    """
    padded = -(-kept // multiple) * multiple
    return padded if padded < mlp_size else kept


_Gather = Callable[[list[Mlp], list[Array], list[Array | None], list[LinearFit | None]], list[Mlp]]


def _with_mlps(params: Params, indices: Indices, offsets: Offsets, linear: Linears | None, gather: _Gather) -> Params:
    """`params` with the MLPs of all layers that `indices` narrow replaced by what `gather` makes of them."""
    chosen = {l: layer_indices for l, layer_indices in enumerate(indices) if layer_indices is not None}
    known = explained_by(params)
    fits = {l: known.fits[l] for l in chosen if known is not None and linear is not None and linear[l]}
    # Layers with linear neurons pass one by one: each needs a float32 copy of the down projection that it keeps, and
    # one program for all would hold those of all layers.
    passes = [[l for l in chosen if l not in fits], *([l] for l in fits)]
    narrowed: dict[int, Mlp] = {}
    for own in filter(None, passes):
        # Only the MLPs pass through the compiled gather: whatever a jit returns untouched it copies.
        mlps = [params.layers[l].mlp for l in own]
        gathered = gather(mlps, [chosen[l] for l in own], [offsets[l] for l in own], [fits.get(l) for l in own])
        narrowed |= dict(zip(own, gathered, strict=True))
    layers = tuple(replace(layer, mlp=narrowed[l]) if l in narrowed else layer for l, layer in enumerate(params.layers))
    return replace(params.weights, layers=layers)


def narrowed_bytes(params: Params, layers: tuple[int, ...], kept: int, sets: int) -> int:
    """Bytes of matrices of dense `params`' `layers` that belong to `kept` neurons, `sets` times; nothing is padded."""
    mlps = [params.layers[l].mlp for l in layers]
    weights = sum(m.matrix_bytes for mlp in mlps for m in (mlp.gate, mlp.up, mlp.down) if m is not None)
    return weights // params.config.mlp_size * kept * sets


def padded_linear(size: int, multiple: int) -> int:
    """How many linear neurons there are of `size` wanted ones."""
    return -(-size // multiple) * multiple


@partial(jax.jit, static_argnames=("multiple", "mesh"))
def gather_core(
    mlps: list[Mlp],
    indices: list[Array],
    offsets: list[Array | None],
    fits: list[LinearFit | None],
    *,
    multiple: int,
    mesh: Mesh | None = None,
) -> list[Mlp]:
    """The program that narrows `mlps`, each to its `indices`, with its offset and its linear neurons.

    Their widths, on each device of the mesh, are multiples of `multiple`. No weight leaves its device, but for what
    linear neurons write, which is a sum over neurons.
    """
    gather = partial(_gather, multiple=multiple)
    if mesh is None:
        return gather(mlps, indices, offsets, fits)
    results = specs(jax.eval_shape(gather, mlps, indices, offsets, fits))
    arguments = specs(mlps), [along(-1, own.ndim) for own in indices], specs(offsets), specs(fits)
    return over_shards(gather, mesh, results, arguments)(mlps, indices, offsets, fits)


def _gather(
    mlps: list[Mlp], indices: list[Array], offsets: list[Array | None], fits: list[LinearFit | None], *, multiple: int
) -> list[Mlp]:
    return [_gather_mlp(*layer, multiple) for layer in zip(mlps, indices, offsets, fits, strict=True)]


def _gather_mlp(mlp: Mlp, indices: Array, offset: Array | None, fit: LinearFit | None, multiple: int) -> Mlp:
    indices = indices - shard_here() * mlp.width
    kept = Mlp(
        gate=None if mlp.gate is None else mlp.gate.take_outputs(indices),
        up=mlp.up.take_outputs(indices),
        down=mlp.down.take_inputs(indices),
    )
    # On a GPU the gather and its padding are one program, which reads once and writes once.
    return completed(kept, indices, offset, fit, padded_width(indices.shape[-1], mlp.width, multiple), multiple)


def completed(kept: Mlp, indices: Array, offset: Array | None, fit: LinearFit | None, width: int, multiple: int) -> Mlp:
    """The MLP of the neurons `kept`, which are `indices`, padded to `width`, with all that stands for the others."""
    down = kept.down.padded_inputs(width)
    linear = None
    if fit is not None:
        size = padded_linear(fit.size, multiple * shards_here())
        down = down.joined_inputs(_left_to_write(fit, kept.down, indices, size))
        of_all = fit.inputs_as(kept.up.weight.dtype).padded_outputs(size)
        linear = Linear(own_part(of_all.weight, 0))
    return Mlp(
        gate=None if kept.gate is None else kept.gate.padded_outputs(width),
        up=kept.up.padded_outputs(width),
        down=down.shifted(offset),
        linear=linear,
    )


def _left_to_write(fit: LinearFit, kept: Linear, indices: Array, size: int) -> Array:
    """The linear neurons' columns of down, [D, `size`], or [B, D, `size`] where rows have sets of their own.

    Of `size` over all devices, each has its own.
    """
    left = partial(fit.left_to_write, size=size)
    return left(kept.weight, indices) if indices.ndim == 1 else jax.vmap(left)(kept.weight, indices)
