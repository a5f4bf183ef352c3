"""Narrowing MLPs that stay on the host: core neurons are gathered there, and only what the device lacks is moved."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from coreinfer_jax.errors import CoreInferError, shown
from coreinfer_jax.model.host import fetch, mlp_bytes, on_hand, one_ahead, put
from coreinfer_jax.model.weights import Linear, Mlp, Params
from coreinfer_jax.sparsity.calibration import explained_by
from coreinfer_jax.sparsity.narrow import Indices, Linears, Offsets, completed, multiple_of, padded_width

# New rows of a layer come in so many steps of its K: each number of them compiles a small program once.
STEPS = 16


@dataclass(frozen=True)
class DeviceRows:
    """What an earlier call left on the device of a model's MLPs. The call that goes on from it uses it up.

    Attributes:
        mlps: by the layers' numbers.
        kept: ascending int32 [K], which neurons these have; None for all. Sets per row are not used again.
        model: the first layer's up projection of the model that they are of, on the host; None where there are none.
    """

    mlps: Mapping[int, Mlp] = field(default_factory=dict)
    kept: Mapping[int, np.ndarray | None] = field(default_factory=dict)
    model: Any = None

    @property
    def whole(self) -> dict[int, Mlp]:
        """The MLPs with all neurons."""
        return {l: mlp for l, mlp in self.mlps.items() if self.kept[l] is None}

    @property
    def nbytes(self) -> int:
        """Bytes of all."""
        return sum(map(mlp_bytes, self.mlps.values()))

    @property
    def is_alive(self) -> bool:
        """Whether no call has used them up."""
        return not any(leaf.is_deleted() for leaf in jax.tree.leaves(list(self.mlps.values())))

    def check_alive(self) -> None:
        """Refuse what another call has used up."""
        if not self.is_alive:
            raise CoreInferError("device_rows: another call has gone on from them; give the latest, or None")

    def release(self, *layers: int) -> None:
        """Give back the memory of the MLPs of some layers."""
        for l in layers:
            if l in self.mlps:
                # What linear neurons read with is the calibration's.
                for leaf in jax.tree.leaves(replace(self.mlps[l], linear=None)):
                    leaf.delete()


NOTHING = DeviceRows()


def check_rows(rows: object, params: Params) -> None:
    """Refuse what are no rows on the device, or not those of this model, or what another call has used up."""
    if not isinstance(rows, DeviceRows):
        raise CoreInferError(f"device_rows={shown(rows)}: give the device_rows of an earlier Generation, or None")
    if rows.mlps and rows.model is not params.layers[0].mlp.up.weight:
        raise CoreInferError("device_rows: are of another model; give those of this one, or None")
    rows.check_alive()


def rows_of(params: Params, weights: Params, indices: Indices) -> DeviceRows:
    """What `weights`, `params` narrowed to `indices`, hold."""
    kept = {l: None if own is None else np.asarray(own) for l, own in enumerate(indices)}
    reused = {l: own for l, own in kept.items() if own is None or own.ndim == 1}
    return DeviceRows({l: weights.layers[l].mlp for l in reused}, reused, params.layers[0].mlp.up.weight)


def narrow_from_host(
    params: Params, indices: Indices, offsets: Offsets, linear: Linears, earlier: DeviceRows = NOTHING
) -> Params:
    """`narrow.narrow` of parameters whose MLPs are on the host; layers that stay dense are moved whole.

    Args:
        params: dense weights, their MLPs on the host.
        indices: per layer, kept neurons, [K] or [B, K], or None.
        offsets: per layer, what is added to the output, or None.
        linear: per layer, whether linear neurons stand beside them.
        earlier: what is on the device already; used up.
    """
    known, multiple = explained_by(params), multiple_of(params)
    wanted = [None if own is None else np.asarray(own) for own in indices]
    moves = [_move_of(l, own, earlier) for l, own in enumerate(wanted)]
    gathered = one_ahead(partial(_gathered, params), list(enumerate(moves)))
    layers = []
    for l, (layer, move, rows) in enumerate(zip(params.layers, moves, gathered, strict=True)):
        mlp = put(rows)
        if move.fresh is not None:
            kept = mlp if move.places is None else _renewed(earlier.mlps[l], mlp, move.places)
            fit = known.fits[l] if known is not None and linear[l] else None
            own, width = indices[l], padded_width(move.width, params.config.mlp_size, multiple)
            assert own is not None, "something is kept of it"
            mlp = completed(kept, own, offsets[l], fit, width, multiple)  # not compiled: a jit copies what it passes on
        jax.block_until_ready(mlp)  # so that no more than one layer's rows are there twice
        layers.append(replace(layer, mlp=mlp))
        if move.mlp is None:
            earlier.release(l)
    return replace(params.weights, layers=tuple(layers))


def moved_bytes(params: Params, indices: Indices, earlier: DeviceRows = NOTHING) -> int:
    """Bytes that `narrow_from_host` moves to the device; outputs' biases count by the share of neurons."""
    total = 0
    for l, (layer, own) in enumerate(zip(params.layers, indices, strict=True)):
        move, whole = _move_of(l, None if own is None else np.asarray(own), earlier), mlp_bytes(layer.mlp)
        if move.fresh is not None:
            total += whole * int(move.fresh.size) // params.config.mlp_size
        elif move.mlp is None:
            total += whole
    return total


@dataclass(frozen=True)
class _Move:
    """What a layer's MLP is made of.

    Attributes:
        mlp: the whole one, where it is on the device and stays; else None.
        fresh: neurons to be moved, [n] or [B, n]; None for the whole MLP.
        width: K, how many are kept.
        places: int32 [K], where each kept neuron stands among those on the device followed by the fresh ones; None
            where the fresh ones are all.
    """

    mlp: Mlp | None = None
    fresh: np.ndarray | None = None
    width: int = 0
    places: np.ndarray | None = None


def _move_of(l: int, wanted: np.ndarray | None, earlier: DeviceRows) -> _Move:
    if wanted is None:
        return _Move(mlp=earlier.whole.get(l))
    there = earlier.kept.get(l)
    if there is None or wanted.ndim == 2:
        return _Move(fresh=wanted, width=wanted.shape[-1])
    found = np.minimum(np.searchsorted(there, wanted), len(there) - 1)
    is_there = there[found] == wanted
    missing = wanted[~is_there]
    step = max(1, len(wanted) // STEPS)
    size = max(1, -(-len(missing) // step)) * step
    # What fills the last step is moved and not used.
    fresh = np.pad(missing, (0, size - len(missing)), mode="edge") if len(missing) else np.full(size, wanted[0])
    behind = earlier.mlps[l].width + np.cumsum(~is_there) - 1
    return _Move(fresh=fresh, width=len(wanted), places=np.where(is_there, found, behind).astype(np.int32))


def _gathered(params: Params, numbered: tuple[int, _Move]) -> Mlp:
    """What is moved of layer l, in memory of the host, or its MLP where that is on the device."""
    l, move = numbered
    mlp = params.layers[l].mlp
    if move.fresh is None:
        return fetch(mlp if move.mlp is None else move.mlp)
    rows, columns = (partial(_taken, indices=move.fresh, axis=axis) for axis in (0, -1))
    bias = None if mlp.down.bias is None else on_hand(mlp.down.bias)
    return Mlp(
        gate=None if mlp.gate is None else jax.tree.map(rows, mlp.gate),
        up=jax.tree.map(rows, mlp.up),
        down=Linear(columns(mlp.down.weight), bias),
    )


def _taken(leaf: Any, indices: np.ndarray, axis: int) -> Any:
    """Entries `indices`, [K] or [B, K], of an array on the host along an axis: a NumPy array."""
    if indices.ndim == 2:
        return np.stack([leaf.take(row, axis) for row in indices])
    return leaf.take(indices, axis)


@jax.jit
def _renewed(old: Mlp, fresh: Mlp, places: Array) -> Mlp:
    """The neurons at `places` [K] of those of `old`, without linear ones, followed by `fresh` ones."""

    def outputs(own: Linear, new: Linear) -> Linear:
        joined: Linear = jax.tree.map(lambda *parts: jnp.concatenate(parts), own, new)
        return joined.take_outputs(places)

    down = Linear(old.down.weight[:, : old.width], fresh.down.bias).joined_inputs(fresh.down.weight)
    return Mlp(
        gate=None if old.gate is None or fresh.gate is None else outputs(old.gate, fresh.gate),
        up=outputs(old.up, fresh.up),
        down=down.take_inputs(places),
    )
