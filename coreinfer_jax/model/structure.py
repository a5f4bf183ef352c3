"""The structure of a model's weights: which there are, and their shapes."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from coreinfer_jax.model.config import ModelConfig
from coreinfer_jax.model.families import family_of
from coreinfer_jax.model.weights import Attention, Layer, Linear, Mlp, Norm, Params


def build_params(config: ModelConfig, leaf: Callable[[tuple[int, ...]], Array]) -> Params:
    """A `Params` of `config`'s structure whose every leaf is `leaf(shape)`: the one statement of all shapes.

    There are no weights but those in the family's table of tensors; the config says which of them there are.
    """
    c, family = config, family_of(config)
    N_H, G_H = c.num_heads * c.head_size, c.num_kv_heads * c.head_size

    def linear(name: str, size_out: int, size_in: int, bias: bool = False) -> Linear:
        has_bias = bias and f"{name}.bias" in family.tensors
        return Linear(weight=leaf((size_out, size_in)), bias=leaf((size_out,)) if has_bias else None)

    def norm(name: str) -> Norm:
        has_bias = f"{name}.bias" in family.tensors
        return Norm(scale=leaf((c.hidden_size,)), bias=leaf((c.hidden_size,)) if has_bias else None)

    def optional_norm(name: str, size: int) -> Norm | None:
        return Norm(scale=leaf((size,))) if f"{name}.scale" in family.tensors else None

    def layer() -> Layer:
        attention, mlp = "layers.{l}.attention", "layers.{l}.mlp"
        has_gate = f"{mlp}.gate.weight" in family.tensors
        return Layer(
            attention_norm=norm(f"{attention}_norm"),
            attention=Attention(
                query=linear(f"{attention}.query", N_H, c.hidden_size, c.attention_bias),
                key=linear(f"{attention}.key", G_H, c.hidden_size, c.attention_bias),
                value=linear(f"{attention}.value", G_H, c.hidden_size, c.attention_bias),
                out=linear(f"{attention}.out", c.hidden_size, N_H, c.attention_bias),
                query_norm=optional_norm(f"{attention}.query_norm", c.head_size),
                key_norm=optional_norm(f"{attention}.key_norm", c.head_size),
            ),
            mlp_norm=norm(f"{mlp}_norm"),
            mlp=Mlp(
                gate=linear(f"{mlp}.gate", c.mlp_size, c.hidden_size, c.mlp_bias) if has_gate else None,
                up=linear(f"{mlp}.up", c.mlp_size, c.hidden_size, c.mlp_bias),
                down=linear(f"{mlp}.down", c.hidden_size, c.mlp_size, c.mlp_bias),
            ),
            attention_out_norm=optional_norm(f"{attention}_out_norm", c.hidden_size),
            mlp_out_norm=optional_norm(f"{mlp}_out_norm", c.hidden_size),
        )

    projected = c.embed_size != c.hidden_size
    has_positions = "position_embedding" in family.tensors
    return Params(
        token_embedding=leaf((c.vocab_size, c.embed_size)),
        position_embedding=leaf((c.max_positions + family.position_offset, c.hidden_size)) if has_positions else None,
        project_in=linear("project_in", c.hidden_size, c.embed_size) if projected else None,
        layers=tuple(layer() for _ in range(c.num_layers)),
        final_norm=norm("final_norm") if c.final_norm else None,
        project_out=linear("project_out", c.embed_size, c.hidden_size) if projected else None,
        unembedding=None if c.tied else leaf((c.vocab_size, c.embed_size)),
        config=config,
    )


def abstract_params(config: ModelConfig, dtype: jnp.dtype) -> Params:
    """Shapes and dtypes without data, for checking checkpoints and counting bytes."""
    # build_params is typed for arrays; shape structs stand in for them wherever only shapes are read.
    return build_params(config, lambda shape: jax.ShapeDtypeStruct(shape, dtype))  # type: ignore[arg-type, return-value]
