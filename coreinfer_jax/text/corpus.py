"""Tokens of documents: texts of equal length to measure on, beginnings of any length to learn from."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from coreinfer_jax.errors import CoreInferError
from coreinfer_jax.progress import progress
from coreinfer_jax.text import Tokenizer
from coreinfer_jax.text.documents import Documents

# What a median, or an interval over texts, needs at least.
LEAST_TEXTS = 2


@dataclass(frozen=True)
class Selection:
    """Texts of equal length.

    Attributes:
        rows: int32 [n, T], the first T tokens of each.
        too_short: documents that were passed over because they have fewer tokens.
    """

    rows: np.ndarray
    too_short: int


@dataclass(frozen=True)
class Beginnings:
    """Texts of any length.

    Attributes:
        rows: int32 [n, T], zeros after the end of each.
        lengths: int32 [n], tokens of each.
    """

    rows: np.ndarray
    lengths: np.ndarray

    @classmethod
    def of(cls, texts: Sequence[Sequence[int]]) -> "Beginnings":
        """These texts."""
        lengths = np.array([len(text) for text in texts], np.int32)
        rows = np.zeros((len(texts), lengths.max()), np.int32)
        rows[np.arange(rows.shape[1])[None, :] < lengths[:, None]] = np.concatenate(texts)
        return cls(rows, lengths)

    def texts(self) -> list[list[int]]:
        """The tokens of each."""
        return [row[:length].tolist() for row, length in zip(self.rows, self.lengths, strict=True)]


class Corpus:
    """Documents in an order drawn by a seed, each tokenised when it is first wanted."""

    def __init__(self, documents: Documents, tokenizer: Tokenizer, seed: int) -> None:
        self.name = documents.name
        self._texts = documents.texts
        self._tokenizer = tokenizer
        self._order = np.random.default_rng(seed).permutation(len(documents.texts)).tolist()
        self._tokens: dict[int, list[int]] = {}

    def select(self, tokens: int, count: int, half: int | None = None) -> Selection:
        """The first `tokens` (T) tokens of up to `count` documents that have as many.

        Args:
            tokens: T.
            count: documents, at most.
            half: 0 or 1: only from this half of the documents; None for all.

        Raises:
            CoreInferError: fewer than 2 documents are long enough.
        """
        order = self._half(half)
        rows: list[list[int]] = []
        looked_at = 0
        with progress([], total=count, desc="choosing texts", unit="text") as bar:
            for number in order:
                if len(rows) == count:
                    break
                looked_at += 1
                if len(row := self._encoded(number)) >= tokens:
                    rows.append(row[:tokens])
                    bar.update()
        if len(rows) < LEAST_TEXTS:
            raise CoreInferError(
                f"{self.name}: texts of {tokens} tokens are needed, at least {LEAST_TEXTS}; {len(rows)} of "
                f"{len(order)} documents{self._part(half)} are as long; give longer texts, or more"
            )
        return Selection(np.array(rows, np.int32), looked_at - len(rows))

    def beginnings(self, most: int, total: int, half: int | None = None) -> Beginnings:
        """The first tokens of documents of any length, until there are enough.

        Args:
            most: tokens of each, at most.
            total: tokens after which no further document is taken.
            half: 0 or 1: only from this half of the documents; None for all.

        Raises:
            CoreInferError: fewer than 2 documents have any tokens.
        """
        rows: list[list[int]] = []
        taken = 0
        with progress([], total=total, desc="choosing texts", unit="token") as bar:
            for number in self._half(half):
                if taken >= total:
                    break
                if row := self._encoded(number)[:most]:
                    rows.append(row)
                    taken += len(row)
                    bar.update(len(row))
        if len(rows) < LEAST_TEXTS:
            raise CoreInferError(
                f"{self.name}: {len(rows)} of {len(self._half(half))} documents{self._part(half)} have any tokens, and "
                f"at least {LEAST_TEXTS} are needed; give more texts"
            )
        return Beginnings.of(rows)

    def _half(self, half: int | None) -> list[int]:
        middle = len(self._order) // 2
        return self._order if half is None else (self._order[:middle], self._order[middle:])[half]

    def _part(self, half: int | None) -> str:
        return "" if half is None else f" of one half of {self.name}"

    def _encoded(self, number: int) -> list[int]:
        if number not in self._tokens:
            self._tokens[number] = self._tokenizer.encode(self._texts[number])
        return self._tokens[number]
