"""What a model family is: all that the package knows of it, stated in one file of `coreinfer_jax.model.families`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jax import Array

from coreinfer_jax.model.config import ModelConfig
from coreinfer_jax.model.config_fields import ConfigFields, Fields
from coreinfer_jax.model.weights import Layer, Params

Embed = Callable[[Params, Array, Array], tuple[Array, Any]]
Past = tuple[Array, Array]
BlockEdit = Callable[[Array, Array], Array]
Block = Callable[[Array, Layer, Past, Array, Any, BlockEdit, ModelConfig], tuple[Array, Past, Array]]


@dataclass(frozen=True)
class GgufNames:
    """How GGUF files, the format of llama.cpp, spell a family.

    Attributes:
        architecture: `general.architecture`, which also begins the keys of its metadata.
        fields: field of config.json -> the key, without the architecture, that holds it.
        tensors: our name of each weight -> its name there, as in `Family.tensors`.
        by_pairs: our names of projections whose outputs stand, in each head, rotated pair by rotated pair: (0, H/2),
            (1, H/2 + 1) and so on; the query's have N heads, others G.
    """

    architecture: str
    fields: Mapping[str, str]
    tensors: Mapping[str, str]
    by_pairs: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Family:
    """A model family.

    Attributes:
        name: `model_type` in config.json, and `ModelConfig.family`.
        architectures: transformers' names of its causal language models; the first is written.
        fields: what its config.json may hold.
        read_config: `ModelConfig` of the checked fields of a config.json, those that are null left out.
        write_config: the fields that `read_config` reads, besides those that every family has.
        tensors: our name of each weight -> that in checkpoints, `{l}` standing for the layer's number, theirs without
            the leading `model.` that some checkpoints have and others lack. A model of the family has no weights but
            these; which of them one has is decided by its config. No tensor changes shape: both sides store weights
            [out, in].
        ignored_tensors: regular expressions for stored tensors that hold nothing the model computes with.
        gguf: how GGUF files spell it; None where they are not read.
        position_offset: rows of the position table, where there is one, before that of position 0.
        embed: (params, tokens [B, T], positions [B, T]) to x [B, T, D] and a context that every layer is told.
        block: one layer: (x [B, T, D], its weights, its cached keys and values [B, G, S, H], positions [B, T], the
            context, an edit, the config) to the new x, the extended keys and values, and the MLP activations [B, T, F].
            The down projection reads what the edit makes of the activations and of what the activation function gave.
        finish: (params, x [B, T, D]) to what the output projection reads, [B, T, E].
    """

    name: str
    architectures: tuple[str, ...]
    fields: ConfigFields
    read_config: Callable[[Fields], ModelConfig]
    write_config: Callable[[ModelConfig], dict[str, Any]]
    tensors: Mapping[str, str]
    embed: Embed
    block: Block
    finish: Callable[[Params, Array], Array]
    ignored_tensors: tuple[str, ...] = ()
    position_offset: int = 0
    gguf: GgufNames | None = None
