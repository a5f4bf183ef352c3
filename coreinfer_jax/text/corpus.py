"""Texts of equal length, out of documents of any length."""

from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from coreinfer_jax.errors import CoreInferError
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
        middle = len(self._order) // 2
        order = self._order if half is None else (self._order[:middle], self._order[middle:])[half]
        rows: list[list[int]] = []
        looked_at = 0
        with tqdm(total=count, desc="choosing texts", unit="text", disable=None, leave=False) as bar:
            for number in order:
                if len(rows) == count:
                    break
                looked_at += 1
                if len(row := self._encoded(number)) >= tokens:
                    rows.append(row[:tokens])
                    bar.update()
        if len(rows) < LEAST_TEXTS:
            part = "" if half is None else f" of one half of {self.name}"
            raise CoreInferError(
                f"{self.name}: texts of {tokens} tokens are needed, at least {LEAST_TEXTS}; {len(rows)} of "
                f"{len(order)} documents{part} are as long; give longer texts, or more"
            )
        return Selection(np.array(rows, np.int32), looked_at - len(rows))

    def _encoded(self, number: int) -> list[int]:
        if number not in self._tokens:
            self._tokens[number] = self._tokenizer.encode(self._texts[number])
        return self._tokens[number]
