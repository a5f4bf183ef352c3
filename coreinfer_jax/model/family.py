"""What a model family is: all that the package knows of it, stated in one file of `coreinfer_jax.model.families`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jax import Array

from coreinfer_jax.model.config import ModelConfig
from coreinfer_jax.model.config_fields import ConfigFields, Fields
from coreinfer_jax.model.layers import LayerContext, MlpPass
from coreinfer_jax.model.weights import Layer, Params

Embed = Callable[[Params, Array, Array, int], tuple[Array, tuple[LayerContext, ...]]]
Past = tuple[Array, Array]
BlockEdit = Callable[[MlpPass], Array]
Block = Callable[[Array, Layer, Past, Array, LayerContext, BlockEdit, ModelConfig], tuple[Array, Past, MlpPass]]


@dataclass(frozen=True)
class GgufFacts:
    """What a family reads of a GGUF file beside the fields that `GgufNames` maps.

    Attributes:
        metadata: its keys without the architecture.
        fields: the fields of config.json that they state directly.
        tensor: reads a tensor by its name; None where there is none.
    """

    metadata: Mapping[str, Any]
    fields: Mapping[str, Any]
    tensor: Callable[[str], np.ndarray | None]


@dataclass(frozen=True)
class GgufNames:
    """How GGUF files, the format of llama.cpp, spell a family.

    Attributes:
        architecture: `general.architecture`, which also begins the keys of its metadata.
        fields: field of config.json -> the key, without the architecture, that holds it.
        tensors: our name of each weight -> its name there, as in `Family.tensors`.
        further_keys: keys, without the architecture, that `further_fields` reads.
        further_tensors: tensors that it reads, which are no weights.
        further_fields: the fields of config.json that follow from these.
        others: words in `general.name` of models whose files name this architecture but which compute something else.
        as_checkpoints: of weights that checkpoints hold otherwise: our name -> (what is stored, the config) to those.

    A file's key or tensor that none of these names is refused.
    """

    architecture: str
    fields: Mapping[str, str]
    tensors: Mapping[str, str]
    others: tuple[str, ...] = ()
    further_keys: tuple[str, ...] = ()
    further_tensors: tuple[str, ...] = ()
    further_fields: Callable[[GgufFacts], dict[str, Any]] = lambda facts: {}
    as_checkpoints: Mapping[str, Callable[[np.ndarray, ModelConfig], np.ndarray]] = field(default_factory=dict)


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
            the leading `model.` that some checkpoints have and others lack. Weights with one name there are its rows,
            in the order of `Params`. A model of the family has no weights but
            these; which of them one has is decided by its config. No tensor changes shape: both sides store weights
            [out, in].
        ignored_tensors: regular expressions for stored tensors that hold nothing the model computes with.
        gguf: how GGUF files spell it; None where they are not read.
        position_offset: rows of the position table, where there is one, before that of position 0.
        embed: (params, tokens [B, T], positions [B, T], the positions S that there is room for) to x [B, T, D] and what
            each of the L layers is told of the tokens: their rotation there, and how far it sees.
        block: one layer: (x [B, T, D], its weights, its cached keys and values [B, G, S, H], positions [B, T], its
            context, an edit, the config) to the new x, the extended keys and values, and what the MLP read and made.
            The down projection reads what the edit makes of that.
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
