"""The weights of a model: frozen pytrees, one type for every family, every leaf's shape stated.

Axis letters: `V` vocabulary, `E` embedding width (D except for OPT-350m), `D` hidden size, `F` MLP neurons,
`K` kept (core) neurons, `N` query heads, `G` key/value heads, `H` head size, `L` layers, `P` positions, `B` batch rows,
`T` query positions, `S` cache positions, `C` groups of texts.
"""

from collections.abc import Callable
from dataclasses import replace
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array, lax
from jax.sharding import Mesh

from coreinfer_jax.errors import CoreInferError
from coreinfer_jax.model.backends import products
from coreinfer_jax.model.config import ModelConfig
from coreinfer_jax.model.shards import WHOLE, along, shards_here, shards_of, specs, total


@struct.dataclass
class Linear:
    """y = weight x + bias. How a weight is stored is known here, and to what reads and writes checkpoints.

    Attributes:
        weight: [out, in], so that a row belongs to one output; or [B, out, in], a matrix for every row of a batch.
        bias: [out], or [B, out]; None for none. With the offsets of core neurons it is float32.
    """

    weight: Array
    bias: Array | None = None

    @property
    def size_in(self) -> int:
        """Inputs of a matrix."""
        return int(self.weight.shape[-1])

    @property
    def size_out(self) -> int:
        """Outputs of a matrix."""
        return int(self.weight.shape[-2])

    @property
    def rows(self) -> int | None:
        """B where every row of a batch has a matrix of its own, else None."""
        return int(self.weight.shape[0]) if self.weight.ndim == 3 else None

    @property
    def matrix_bytes(self) -> int:
        """Bytes of the weight without the bias, also of shapes without data."""
        return leaf_bytes(self.weight)

    def __call__(self, x: Array) -> Array:
        """x [B, T, in] to [B, T, out] in x's dtype; products are accumulated in float32 whatever the dtype."""
        return each(x, self)[0]

    def over_inputs(self, x: Array) -> Array:
        """As a call, where devices hold parts of the inputs, x [B, T, in / n], and of the weight: all get the sum."""
        (product,) = products(x, (self.weight,))
        return self.biased(total(product)).astype(x.dtype)

    def by_outputs(self) -> "Linear":
        """The specs of outputs that are spread over devices."""
        bias = None if self.bias is None else along(-1, self.bias.ndim)
        return Linear(weight=along(-2, self.weight.ndim), bias=bias)

    def by_inputs(self) -> "Linear":
        """The specs of inputs that are spread over devices, which all hold the bias."""
        return Linear(weight=along(-1, self.weight.ndim), bias=None if self.bias is None else WHOLE)

    def biased(self, y: Array) -> Array:
        """y [B, T, out] with the bias added, in y's dtype."""
        if self.bias is None:
            return y
        bias = self.bias[None, None, :] if self.bias.ndim == 1 else self.bias[:, None, :]
        return y + bias.astype(y.dtype)

    def take_outputs(self, indices: Array) -> "Linear":
        """The outputs `indices` [K] alone, or with [B, K] those of each row of a batch, its own."""
        bias = None if self.bias is None else _take(self.bias, indices, axis=0)
        return Linear(weight=_take(self.weight, indices, axis=0), bias=bias)

    def take_inputs(self, indices: Array) -> "Linear":
        """The inputs `indices` [K] alone, or with [B, K] those of each row of a batch; the bias as it is."""
        return Linear(weight=_take(self.weight, indices, axis=1), bias=self.bias)

    def padded_outputs(self, size: int) -> "Linear":
        """With further outputs, all zero, up to `size`."""
        bias = None if self.bias is None else _padded(self.bias, size, axis=-1)
        return Linear(weight=_padded(self.weight, size, axis=-2), bias=bias)

    def padded_inputs(self, size: int) -> "Linear":
        """With further inputs up to `size`, which change no output."""
        return replace(self, weight=_padded(self.weight, size, axis=-1))

    def joined_inputs(self, further: Array) -> "Linear":
        """With further inputs behind its own, whose weights are `further` [out, n], or [B, out, n]."""
        return replace(self, weight=jnp.concatenate([self.weight, further.astype(self.weight.dtype)], axis=-1))

    def shifted(self, offset: Array | None) -> "Linear":
        """With `offset` added to the outputs: float32 [out], or [B, out] with one for each row; None adds nothing."""
        if offset is None:
            return self
        if self.bias is None:
            return replace(self, bias=offset)
        wide = self.bias.astype(offset.dtype)
        return replace(self, bias=offset + (wide if offset.ndim == 1 else wide[None, :]))

    def input_norms(self) -> Array:
        """The norm of what one unit of each input adds to the output: float32 [in]."""
        return jnp.sqrt(jnp.sum(jnp.square(self.weight.astype(jnp.float32)), axis=0))

    def mixed(self, x: Array) -> Array:
        """The product alone, without the bias, in float32 throughout: x float32 [R, in] to float32 [R, out]."""
        return lax.dot_general(x, self.weight.astype(jnp.float32), (((1,), (1,)), ((), ())))


def each(x: Array, *linears: Linear) -> tuple[Array, ...]:
    """What each of `linears` makes of the same x [B, T, in]: [B, T, out] in x's dtype, accumulated in float32."""
    multiplied = products(x, tuple(linear.weight for linear in linears))
    return tuple(linear.biased(y).astype(x.dtype) for linear, y in zip(linears, multiplied, strict=True))


def _take(array: Array, indices: Array, axis: int) -> Array:
    """Entries of `array` along `axis`, for indices [K]; with indices [B, K] a leading B."""
    if indices.ndim == 2:
        return jax.vmap(lambda row: _take(array, row, axis))(indices)
    # Where devices keep different numbers of a given set's neurons, indices beyond the last one make up for it.
    return jnp.take(array, indices, axis=axis, mode="clip" if shards_here() == 1 else "fill", fill_value=0)


def _padded(array: Array, size: int, axis: int) -> Array:
    """`array` with zeros behind it along `axis`, `size` entries in all; itself where it has as many."""
    if array.shape[axis] == size:
        return array
    after = [(0, 0)] * array.ndim
    after[axis] = (0, size - array.shape[axis])
    return jnp.pad(array, after)


@struct.dataclass
class Norm:
    """LayerNorm (with bias) or RMSNorm (without): scale [D], bias [D]."""

    scale: Array
    bias: Array | None = None


@struct.dataclass
class Attention:
    """Projections: query [N H, D], key [G H, D], value [G H, D], out [D, N H]; norms of heads' queries and keys [H]."""

    query: Linear
    key: Linear
    value: Linear
    out: Linear
    query_norm: Norm | None = None
    key_norm: Norm | None = None

    def specs(self) -> "Attention":
        """Heads are spread over devices."""
        return replace(
            jax.tree.map(lambda _: WHOLE, self),
            query=self.query.by_outputs(),
            key=self.key.by_outputs(),
            value=self.value.by_outputs(),
            out=self.out.by_inputs(),
        )


@struct.dataclass
class Mlp:
    """Projections: gate [F, D] (gated MLPs only), up [F, D], down [D, F], and linear [r, D] where there is one.

    Linear neurons are r further ones. Their activations are what `linear` makes of the input, and their columns of down
    follow those of all others: down [D, F + r].

    Narrowed to core neurons the F axis is K; on accelerators zeros pad it to a multiple (sparsity/narrow.py). With one
    core set per row the arrays gain a leading B: gate and up [B, K, D] (biases [B, K]), down [B, D, K]. Its bias stays
    [D]; with offsets of core neurons it is float32, and [B, D] where rows have sets of their own. All rows share
    `linear`.
    """

    gate: Linear | None
    up: Linear
    down: Linear
    linear: Linear | None = None

    @property
    def width(self) -> int:
        """Neurons held per core set, without linear ones: F, or K once narrowed, with what pads them."""
        return self.up.size_out

    def specs(self) -> "Mlp":
        """Neurons are spread over devices, linear ones too: each holds its own of both side by side."""
        return Mlp(
            gate=None if self.gate is None else self.gate.by_outputs(),
            up=self.up.by_outputs(),
            down=self.down.by_inputs(),
            linear=None if self.linear is None else self.linear.by_outputs(),
        )


@struct.dataclass
class Layer:
    """One transformer block; where its norms act depends on `ModelConfig.norm_first`.

    Some families also normalise what the attention and the MLP add to the residual stream.
    """

    attention_norm: Norm
    attention: Attention
    mlp_norm: Norm
    mlp: Mlp
    attention_out_norm: Norm | None = None
    mlp_out_norm: Norm | None = None


@struct.dataclass
class Params:
    """A whole model. The config rides in the tree as static data, so functions of `params` need no second argument.

    Attributes:
        token_embedding: [V, E].
        position_embedding: [P + 2, D], learned positions (OPT), else None.
        project_in: [D, E], from embedding to hidden width (OPT-350m), else None.
        layers: L blocks; a tuple and not a stacked array, because narrowed and dense layers differ in shape.
        final_norm: last norm, or None.
        project_out: [E, D] (OPT-350m), else None.
        unembedding: [V, E]; None when tied to the token embedding.
        config: the model's static facts.
        calibration: what is known of its neurons (a `sparsity.calibration.Calibration`), or None. It is no weight: no
            pass reads it, no count of bytes or parameters includes it.
        mesh: the devices that the weights are spread over; None for a single one.
    """

    token_embedding: Array
    position_embedding: Array | None
    project_in: Linear | None
    layers: tuple[Layer, ...]
    final_norm: Norm | None
    project_out: Linear | None
    unembedding: Array | None
    config: ModelConfig = struct.field(pytree_node=False)
    calibration: Any = None
    mesh: Mesh | None = struct.field(pytree_node=False, default=None)

    @property
    def shards(self) -> int:
        """How many devices heads and neurons are spread over."""
        return shards_of(self.mesh)

    def specs(self) -> "Params":
        """Heads, neurons and, where it divides, the vocabulary are spread over devices; all hold the rest."""
        return replace(
            jax.tree.map(lambda _: WHOLE, replace(self, layers=(), calibration=None)),
            token_embedding=self._by_vocabulary(),
            unembedding=None if self.unembedding is None else self._by_vocabulary(),
            layers=specs(self.layers),
            calibration=specs(self.calibration),
        )

    def _by_vocabulary(self) -> Any:
        return along(0, 2) if self.config.vocab_size % self.shards == 0 else WHOLE

    @property
    def dtype(self) -> jnp.dtype:
        """What the token embedding is stored in, and so what caches hold."""
        return jnp.dtype(self.token_embedding.dtype)

    @property
    def weights(self) -> "Params":
        """The weights alone: what passes take, so that a calibration compiles nothing anew."""
        return replace(self, calibration=None)


def check_params(params: object) -> None:
    """Refuse what is no `Params`, such as the pair that `load` returns."""
    if not isinstance(params, Params):
        raise CoreInferError(f"params: {type(params).__name__}; give Params, the first of what load returns")


def check_dense(params: Params) -> None:
    """Refuse parameters that have been narrowed: their neurons are numbered differently."""
    check_params(params)
    F = params.config.mlp_size
    if any(layer.mlp.up.rows or layer.mlp.width != F or layer.mlp.linear for layer in params.layers):
        raise CoreInferError("params are narrowed to core neurons already: give the dense params of the model")


def named_leaves(params: Params) -> list[tuple[str, Array]]:
    """(name, leaf) pairs of the weights, such as ("layers.0.mlp.up.weight", ...), in a fixed order."""
    leaves, _ = jax.tree.flatten_with_path(params.weights)
    return [(jax.tree_util.keystr(path, simple=True, separator="."), leaf) for path, leaf in leaves]


def with_leaves(params: Params, leaf: Callable[[str], Array]) -> Params:
    """The weights of `params`, every leaf replaced by `leaf(name)`, called in the order of `named_leaves`."""
    names = [name for name, _ in named_leaves(params)]
    filled: Params = jax.tree.unflatten(jax.tree.structure(params.weights), [leaf(name) for name in names])
    return filled


def leaf_bytes(leaf: Array) -> int:
    """Bytes of one array, also of a shape without data."""
    return prod(leaf.shape) * leaf.dtype.itemsize


def params_bytes(params: Params) -> int:
    """Bytes of all weights, also of shapes without data."""
    return sum(leaf_bytes(leaf) for _, leaf in named_leaves(params))


def weight_bytes_per_step(params: Params, rows: int) -> int:
    """Weight bytes one decode step reads for a batch of `rows` rows.

    Every matrix is read once per step (an MLP narrowed per row holds `rows` matrices); of the embedding tables only
    the looked-up rows are, unless the token embedding also serves as the output projection.
    """
    tables = [params.position_embedding] + ([] if params.unembedding is None else [params.token_embedding])
    looked_up = [table for table in tables if table is not None]
    return params_bytes(params) + sum(
        rows * leaf_bytes(table) // table.shape[0] - leaf_bytes(table) for table in looked_up
    )
