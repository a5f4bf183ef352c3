"""What a conversion table says."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """How a family's checkpoints name their tensors. No tensor changes shape: both sides store weights [out, in].

    Attributes:
        tensors: our name -> theirs, `{l}` standing for the layer number. Names are written without the leading
            `model.`, which some checkpoints have and others lack.
        embedding: their token embedding.
        head: their output projection; where it is tied it may be absent, an alias, or a copy of the embedding.
        ignored: regular expressions for tensors that hold nothing the model computes with.
    """

    tensors: Mapping[str, str]
    embedding: str
    head: str = "lm_head.weight"
    ignored: tuple[str, ...] = ()
