"""The weights of a model: frozen pytrees, one type for every family, every leaf's shape stated.

Axis letters: `V` vocabulary, `E` embedding width (D except for OPT-350m), `D` hidden size, `F` MLP neurons,
`K` kept (core) neurons, `N` query heads, `G` key/value heads, `H` head size, `L` layers, `P` positions, `B` batch rows,
`T` query positions, `S` cache positions, `C` groups of texts.
"""

from collections.abc import Callable
from dataclasses import replace
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from coreinfer_jax.errors import CoreInferError
from coreinfer_jax.model.config import PRIOR_RULE, CoreConfig, ModelConfig


@struct.dataclass
class Linear:
    """y = weight x + bias, the weight stored [out, in], so that a row belongs to one output."""

    weight: Array
    bias: Array | None = None


@struct.dataclass
class Norm:
    """LayerNorm (with bias) or RMSNorm (without): scale [D], bias [D]."""

    scale: Array
    bias: Array | None = None


@struct.dataclass
class Attention:
    """Projections: query [N H, D], key [G H, D], value [G H, D], out [D, N H]."""

    query: Linear
    key: Linear
    value: Linear
    out: Linear


@struct.dataclass
class Mlp:
    """Projections: gate [F, D] (LLaMA only), up [F, D], down [D, F].

    Narrowed to core neurons the F axis is K. With one core set per row the arrays gain a leading B:
    gate and up [B, K, D] (biases [B, K]), down [B, D, K]. Its bias stays [D]; with offsets of core neurons it is
    float32, and [B, D] where rows have sets of their own.
    """

    gate: Linear | None
    up: Linear
    down: Linear

    @property
    def width(self) -> int:
        """Neurons held per core set: F, or K once narrowed."""
        return int(self.up.weight.shape[-2])


@struct.dataclass
class Layer:
    """One transformer block; where its norms act depends on `ModelConfig.norm_first`."""

    attention_norm: Norm
    attention: Attention
    mlp_norm: Norm
    mlp: Mlp


@struct.dataclass
class Calibration:
    """What texts said of a model's neurons, from `calibrate`; it lies beside the weights and is loaded with them.

    Attributes:
        prior: per layer, sums over the texts by `PRIOR_RULE`, float32 [] and [F].
        gains: float32 [L, PARTS], what each further part of a layer's neurons is worth (evaluation/sensitivity.py);
            None where that is not known.
        core: how to generate where the caller names nothing; None with all neurons.
    """

    prior: tuple[dict[str, Array], ...]
    gains: np.ndarray | None
    core: CoreConfig | None = struct.field(pytree_node=False)

    @property
    def by_rule(self) -> list[dict[str, dict[str, Array]]]:
        """The prior as evaluations take one: per layer and rule."""
        return [{PRIOR_RULE: layer} for layer in self.prior]


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
        calibration: what is known of its neurons, or None. It is no weight: no pass reads it, no count of bytes or
            parameters includes it.
    """

    token_embedding: Array
    position_embedding: Array | None
    project_in: Linear | None
    layers: tuple[Layer, ...]
    final_norm: Norm | None
    project_out: Linear | None
    unembedding: Array | None
    config: ModelConfig = struct.field(pytree_node=False)
    calibration: Calibration | None = None

    @property
    def weights(self) -> "Params":
        """The weights alone: what passes take, so that a calibration compiles nothing anew."""
        return replace(self, calibration=None)


def build_params(config: ModelConfig, leaf: Callable[[tuple[int, ...]], Array]) -> Params:
    """A `Params` of `config`'s structure whose every leaf is `leaf(shape)`: the one statement of all shapes."""
    c = config
    N_H, G_H = c.num_heads * c.head_size, c.num_kv_heads * c.head_size

    def linear(size_out: int, size_in: int, bias: bool) -> Linear:
        return Linear(weight=leaf((size_out, size_in)), bias=leaf((size_out,)) if bias else None)

    def norm() -> Norm:
        scale = leaf((c.hidden_size,))
        return Norm(scale=scale, bias=leaf((c.hidden_size,)) if c.family == "opt" else None)

    def layer() -> Layer:
        return Layer(
            attention_norm=norm(),
            attention=Attention(
                query=linear(N_H, c.hidden_size, c.attention_bias),
                key=linear(G_H, c.hidden_size, c.attention_bias),
                value=linear(G_H, c.hidden_size, c.attention_bias),
                out=linear(c.hidden_size, N_H, c.attention_bias),
            ),
            mlp_norm=norm(),
            mlp=Mlp(
                gate=linear(c.mlp_size, c.hidden_size, c.mlp_bias) if c.family == "llama" else None,
                up=linear(c.mlp_size, c.hidden_size, c.mlp_bias),
                down=linear(c.hidden_size, c.mlp_size, c.mlp_bias),
            ),
        )

    projected = c.embed_size != c.hidden_size
    return Params(
        token_embedding=leaf((c.vocab_size, c.embed_size)),
        position_embedding=leaf((c.max_positions + 2, c.hidden_size)) if c.rope is None else None,
        project_in=linear(c.hidden_size, c.embed_size, False) if projected else None,
        layers=tuple(layer() for _ in range(c.num_layers)),
        final_norm=norm() if c.final_norm else None,
        project_out=linear(c.embed_size, c.hidden_size, False) if projected else None,
        unembedding=None if c.tied else leaf((c.vocab_size, c.embed_size)),
        config=config,
    )


def abstract_params(config: ModelConfig, dtype: jnp.dtype) -> Params:
    """Shapes and dtypes without data, for checking checkpoints and counting bytes."""
    # build_params is typed for arrays; shape structs stand in for them wherever only shapes are read.
    return build_params(config, lambda shape: jax.ShapeDtypeStruct(shape, dtype))  # type: ignore[arg-type, return-value]


def random_params(config: ModelConfig, key: Array, dtype: jnp.dtype, scale: float = 0.02) -> Params:
    """Normal weights of standard deviation `scale`, norm scales around 1; for tests and benchmarks.

    Args:
        config: the model.
        key: a `jax.random.key`.
        dtype: of every leaf.
        scale: standard deviation.
    """
    shapes = abstract_params(config, dtype)
    paths = dict(named_leaves(shapes))
    keys = dict(zip(paths, jax.random.split(key, len(paths)), strict=True))

    def draw(name: str) -> Array:
        noise = jax.random.normal(keys[name], paths[name].shape, dtype) * jnp.asarray(scale, dtype)
        return noise + jnp.ones((), dtype) if name.endswith("norm.scale") else noise

    return with_leaves(shapes, draw)


def check_params(params: object) -> None:
    """Refuse what is no `Params`, such as the pair that `load` returns."""
    if not isinstance(params, Params):
        raise CoreInferError(f"params: {type(params).__name__}; give Params, the first of what load returns")


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
