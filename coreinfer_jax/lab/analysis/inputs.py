"""What an analysis is made from: texts of equal length, labelled texts, and pairs that people have judged."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from coreinfer_jax.errors import CoreInferError, shown
from coreinfer_jax.model.config import ModelConfig
from coreinfer_jax.model.weights import Params
from coreinfer_jax.text import Tokenizer
from coreinfer_jax.text.corpus import Corpus
from coreinfer_jax.text.documents import Column, Documents, read_table

# A correlation needs more than two pairs.
LEAST_PAIRS = 3


@dataclass(frozen=True)
class Pairs:
    """Pairs of sentences and how alike people found them.

    Attributes:
        name: the file's name, without its folder.
        first: a sentence of each pair.
        second: the other.
        scores: the higher the more alike.
    """

    name: str
    first: tuple[str, ...]
    second: tuple[str, ...]
    scores: tuple[float, ...]


def read_pairs(path: Path, columns: Sequence[Column]) -> Pairs:
    """The pairs in a table.

    Args:
        path: a `.csv`, or any other file whose values are separated by tabs.
        columns: of the first sentence, the second and the score: names in the first row, or numbers from 0.

    Raises:
        CoreInferError: as `read_table`; an empty sentence, a score that is no number, fewer than 3 pairs, scores that
            are all the same.
    """
    rows = read_table(path, columns)
    # Rows are counted as `read_table` counts them, a first row of names included.
    first = 2 if any(isinstance(column, str) for column in columns) else 1
    for i, row in enumerate(rows, start=first):
        if not row[0].strip() or not row[1].strip():
            raise CoreInferError(f"{path}: row {i} has an empty sentence; remove it")
    scores = tuple(_score(path, i, row[2]) for i, row in enumerate(rows, start=first))
    if len(rows) < LEAST_PAIRS or len(set(scores)) < 2:
        raise CoreInferError(
            f"{path}: {len(rows)} pairs with {len(set(scores))} different scores; a correlation needs at least "
            f"{LEAST_PAIRS} pairs and 2 scores"
        )
    return Pairs(path.name, tuple(row[0] for row in rows), tuple(row[1] for row in rows), scores)


def _score(path: Path, row: int, value: str) -> float:
    try:
        score = float(value)
    except ValueError as error:
        raise CoreInferError(
            f"{path}: row {row}: score {shown(value)} is no number; name another column, or all by name if row 1 does"
        ) from error
    if not isfinite(score):
        raise CoreInferError(f"{path}: row {row}: score {value} is not finite; remove it")
    return score


@dataclass(frozen=True)
class Inputs:
    """What the parts of an analysis are given.

    Attributes:
        params: the model, dense.
        tokenizer: of the model.
        corpus: the texts.
        topics: labelled texts, or None.
        pairs: judged pairs, one entry per file.
        texts: documents per part, and per label of `topics`, at most.
        alpha: share of a token's positive neurons that are its token-wise core neurons.
        beta: keep ratio.
        seed: of the order of the documents, and of k-means.
    """

    params: Params
    tokenizer: Tokenizer
    corpus: Corpus
    topics: Documents | None
    pairs: tuple[Pairs, ...]
    texts: int
    alpha: float
    beta: float
    seed: int

    @property
    def config(self) -> ModelConfig:
        """Of the model."""
        return self.params.config

    def facts(self) -> dict[str, Any]:
        """The settings that every part's numbers depend on."""
        return {"alpha": self.alpha, "beta": self.beta, "seed": self.seed}


def content_digest(*parts: Sequence[object] | None) -> str:
    """SHA-256 of texts, and of labels or scores beside them."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
