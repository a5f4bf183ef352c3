"""The families of which small models can be trained, and what training has to know of each."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from coreinfer_jax.lab.training.vocabulary import (
    LLAMA_SPECIALS,
    OPT_SPECIALS,
    train_byte_level_bpe,
    train_sentencepiece,
)
from coreinfer_jax.model.config import Rope


@dataclass(frozen=True)
class Trainable:
    """How a small model of a family is made. Special tokens have the ids that published models give them.

    Attributes:
        bos_id: before every document.
        eos_id: after it.
        pad_id: padding, None where there is none.
        smallest_vocabulary: entries for every byte and the special tokens.
        train_vocabulary: (texts, entries, directory) writes a tokenizer of the family's kind.
        activation: of the MLP.
        biases: whether projections have them.
        rope: rotary positions, None for learned ones.
    """

    bos_id: int
    eos_id: int
    pad_id: int | None
    smallest_vocabulary: int
    train_vocabulary: Callable[[Iterable[str], int, Path], None]
    activation: Literal["relu", "silu"]
    biases: bool
    rope: Rope | None


TRAINABLE = {
    "opt": Trainable(
        bos_id=OPT_SPECIALS.index("</s>"),
        eos_id=OPT_SPECIALS.index("</s>"),
        pad_id=OPT_SPECIALS.index("<pad>"),
        smallest_vocabulary=256 + len(OPT_SPECIALS),
        train_vocabulary=train_byte_level_bpe,
        activation="relu",
        biases=True,
        rope=None,
    ),
    "llama": Trainable(
        bos_id=LLAMA_SPECIALS.index("<s>"),
        eos_id=LLAMA_SPECIALS.index("</s>"),
        pad_id=None,
        smallest_vocabulary=256 + len(LLAMA_SPECIALS),
        train_vocabulary=train_sentencepiece,
        activation="silu",
        biases=False,
        rope=Rope(),
    ),
}
