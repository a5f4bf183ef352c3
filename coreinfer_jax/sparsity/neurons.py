"""`CoreNeurons`: which MLP neurons of every layer are kept; immutable and hashable."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike

from coreinfer_jax.errors import CoreInferError, shown
from coreinfer_jax.model.config import ModelConfig


@dataclass(frozen=True, eq=False)
class CoreNeurons:
    """The core neurons of a prompt, layer by layer.

    Equality and hash rest on a digest that is computed once, when first asked for, so an instance can be a static
    argument (`jax.jit(forward, static_argnames="core")`) without hashing hundreds of thousands of indices on every
    call.

    Attributes:
        layers: per layer either None (the layer stays dense) or a read-only ascending int32 array: [K] for one set
            that serves every row, or [B, K] with one set per row of a batch.
        offsets: per layer either None or a read-only float32 array, [D], or [B, D] where rows have sets of their own:
            what is added to the MLP's output for the neurons that are not kept.
        linear: per layer, whether the linear neurons of the model's calibration stand for them as well. In place of one
            value per layer, True means all layers that are not dense, and False none.

    Raises:
        CoreInferError: indices that are negative, not ascending (so also repeated), empty, or not integers; rows
            that differ in number between layers; offsets of other layers or rows, or that are no finite numbers.
    """

    layers: tuple[np.ndarray | None, ...]
    offsets: tuple[np.ndarray | None, ...] = field(repr=False)
    linear: tuple[bool, ...]

    def __init__(
        self,
        layers: Iterable[ArrayLike | None],
        offsets: Sequence[ArrayLike | None] | None = None,
        linear: bool | Sequence[bool] = False,
    ) -> None:
        if not isinstance(layers, Iterable):
            raise CoreInferError(f"core neurons: {shown(layers)}; give one array of indices, or None, per layer")
        checked = tuple(None if indices is None else _checked(l, indices) for l, indices in enumerate(layers))
        if len({indices.shape[0] for indices in checked if indices is not None and indices.ndim == 2}) > 1:
            raise CoreInferError(
                "core neurons: layers hold sets for different numbers of rows; give every layer B rows"
            )
        added = _checked_offsets(checked, offsets)
        object.__setattr__(self, "layers", checked)
        object.__setattr__(self, "offsets", added)
        object.__setattr__(self, "linear", _checked_flags(checked, linear))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the layers and the offsets, and of where linear neurons stand beside them."""
        return _digest((*self.layers, *self.offsets, np.array(self.linear)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CoreNeurons) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    @property
    def rows(self) -> int | None:
        """B when rows have sets of their own, None when one set serves them all."""
        return next(
            (int(indices.shape[0]) for indices in self.layers if indices is not None and indices.ndim == 2), None
        )

    def row(self, b: int) -> "CoreNeurons":
        """The core neurons of batch row `b`, as one shared set."""
        layers, offsets = (
            [array[b] if array is not None and array.ndim == 2 else array for array in arrays]
            for arrays in (self.layers, self.offsets)
        )
        return CoreNeurons(layers, offsets, self.linear)

    def kept(self, mlp_size: int) -> tuple[int, ...]:
        """Neurons kept per layer, `mlp_size` (F) where a layer stays dense."""
        return tuple(mlp_size if indices is None else int(indices.shape[-1]) for indices in self.layers)

    def replaced_by(self, other: "CoreNeurons") -> float:
        """The share of these neurons that `other`, as many of each layer, does not have: a mean over layers and rows.

        0 where no layer is narrowed.
        """
        both = zip(self.layers, other.layers, strict=True)
        pairs = [(own, new) for own, new in both if own is not None and new is not None]
        return float(np.mean([_missing(own, new) for own, new in pairs])) if pairs else 0.0

    def check(self, config: ModelConfig) -> None:
        """Refuse a model these core neurons do not belong to."""
        if len(self.layers) != config.num_layers:
            raise CoreInferError(f"core neurons for {len(self.layers)} layers, but the model has {config.num_layers}")
        for l, indices in enumerate(self.layers):
            if indices is not None and indices.max() >= config.mlp_size:
                raise CoreInferError(
                    f"core neurons of layer {l} reach index {indices.max()}, but the MLP has {config.mlp_size} neurons"
                )
        for l, offset in enumerate(self.offsets):
            if offset is not None and offset.shape[-1] != config.hidden_size:
                raise CoreInferError(
                    f"offset of layer {l} has size {offset.shape[-1]}, the model's hidden size is {config.hidden_size}"
                )

    def check_rows(self, rows: int) -> None:
        """Refuse a batch of another number of rows than these core neurons have sets for."""
        if self.rows not in (None, rows):
            raise CoreInferError(f"core neurons for {self.rows} rows, but tokens have {rows}; give one set, or {rows}")


def _missing(indices: np.ndarray, others: np.ndarray) -> float:
    """The share of indices [K] or [B, K] that are not among `others`, row by row."""
    rows = zip(np.atleast_2d(indices), np.atleast_2d(others), strict=True)
    return float(np.mean([~np.isin(own, new, assume_unique=True) for own, new in rows]))


def _checked(layer: int, indices: ArrayLike) -> np.ndarray:
    try:
        given = np.asarray(indices)
    except ValueError as error:  # NumPy's word for ragged rows
        raise CoreInferError(f"core neurons of layer {layer}: give every row the same number of indices") from error
    if given.ndim not in (1, 2) or given.size == 0 or not np.issubdtype(given.dtype, np.integer):
        raise CoreInferError(
            f"core neurons of layer {layer}: shape {given.shape}, {given.dtype}; give integers [K] or [B, K], K >= 1"
        )
    if (given[..., 1:] <= given[..., :-1]).any() or given[..., 0].min() < 0:
        raise CoreInferError(f"core neurons of layer {layer}: give indices >= 0, ascending, each once")
    if given[..., -1].max() > np.iinfo(np.int32).max:
        raise CoreInferError(f"core neurons of layer {layer} reach index {given.max()}, beyond any MLP")
    owned = given.astype(np.int32)
    owned.setflags(write=False)
    return owned


def _checked_offsets(
    layers: tuple[np.ndarray | None, ...], offsets: Sequence[ArrayLike | None] | None
) -> tuple[np.ndarray | None, ...]:
    """`offsets` as float32 arrays, None for each layer where there are none."""
    if offsets is None:
        return (None,) * len(layers)
    if isinstance(offsets, str) or not isinstance(offsets, Sequence):
        raise CoreInferError(f"offsets={shown(offsets)}: give one array, or None, per layer")
    if len(offsets) != len(layers):
        raise CoreInferError(f"offsets for {len(offsets)} layers, core neurons for {len(layers)}; give one per layer")
    return tuple(
        None if offset is None else _checked_offset(l, indices, offset)
        for l, (indices, offset) in enumerate(zip(layers, offsets, strict=True))
    )


def _checked_offset(layer: int, indices: np.ndarray | None, given: ArrayLike) -> np.ndarray:
    try:
        offset = np.array(given, np.float32)
    except (TypeError, ValueError) as error:
        raise CoreInferError(f"offset of layer {layer}: {shown(given)}; give numbers") from error
    if indices is None or offset.shape[:-1] != indices.shape[:-1]:
        rows = "none, the layer is dense" if indices is None else f"an array of shape {(*indices.shape[:-1], 'D')}"
        raise CoreInferError(f"offset of layer {layer}: shape {offset.shape}; give {rows}")
    if not np.isfinite(offset).all():
        raise CoreInferError(f"offset of layer {layer} holds NaN or infinity")
    offset.setflags(write=False)
    return offset


def _checked_flags(layers: tuple[np.ndarray | None, ...], linear: bool | Sequence[bool]) -> tuple[bool, ...]:
    """`linear` as one value per layer."""
    if isinstance(linear, bool):
        return tuple(linear and indices is not None for indices in layers)
    if not isinstance(linear, tuple | list) or not all(isinstance(flag, bool) for flag in linear):
        raise CoreInferError(f"linear={shown(linear)}: give True or False, for all layers or for each")
    if len(linear) != len(layers) or any(
        flag and indices is None for flag, indices in zip(linear, layers, strict=False)
    ):
        raise CoreInferError(f"linear={shown(linear)}: give one value per layer, False for dense ones")
    return tuple(linear)


def _digest(arrays: Sequence[np.ndarray | None]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(b"none;" if array is None else f"{array.dtype} {array.shape};".encode() + array.tobytes())
    return digest.hexdigest()
