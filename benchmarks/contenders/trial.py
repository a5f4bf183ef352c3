"""The terms a contender runs under, and what it reports."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Trial:
    """One contender in one process.

    Attributes:
        contender: its name in `CONTENDERS`.
        dtype: of the weights; for llama.cpp the GGUF type.
        keep: share of the MLP neurons decoded with; None for all.
        fields: config.json of the model.
        prompt_tokens: prompt length of every row.
        new_tokens: tokens to make per row, the first of them from the prefill.
        rows: batch size.
        generations: how many are measured, after one that is not.
        gguf: weights file of llama.cpp.
        cache: folder of compiled programs, empty at first; None keeps none.
    """

    contender: str
    dtype: str
    keep: float | None
    fields: dict[str, Any]
    prompt_tokens: int
    new_tokens: int
    rows: int = 1
    generations: int = 2
    gguf: str | None = None
    cache: str | None = None

    @property
    def name(self) -> str:
        """The contender as people name it."""
        kept = "" if self.keep is None else f" keep {self.keep:g}"
        return f"{self.contender}{kept} {self.dtype}"


@dataclass
class Report:
    """What one process measured; seconds and bytes, None where a contender has no such thing.

    Attributes:
        decode_seconds: per generation, of all tokens after the first.
        first_token_seconds: per generation, from the request to the first token.
        made_tokens: per generation and row, to show that none stopped early.
        load_seconds: making or reading the weights.
        first_call_seconds: the unmeasured generation; less a measured one, it is what compiling took.
        bytes_per_token: weights and cache a step reads per row.
        prefill_seconds: per generation.
        selection_seconds: per generation.
        compaction_seconds: per generation.
        temporary_bytes: of the compiled decode program.
        device_bytes: most memory in use on the accelerator.
        device_needed_bytes: of the weights, of those narrowed to core neurons, and of one cache.
        predictor_bytes: weights of the predictors.
    """

    decode_seconds: list[float]
    first_token_seconds: list[float]
    made_tokens: list[int]
    load_seconds: float
    first_call_seconds: float
    bytes_per_token: float
    prefill_seconds: list[float] = field(default_factory=list)
    selection_seconds: list[float] = field(default_factory=list)
    compaction_seconds: list[float] = field(default_factory=list)
    temporary_bytes: int | None = None
    device_bytes: int | None = None
    device_needed_bytes: int | None = None
    predictor_bytes: int | None = None


@dataclass(frozen=True)
class Continued:
    """One prompt, continued.

    Attributes:
        tokens: the new ones, int32 [n].
        decode_seconds: of all tokens after the first.
        moved_bytes: of MLPs, from the host to the device; None where that is not counted.
        drafts: what came of drafts; None where there were none.
    """

    tokens: np.ndarray
    decode_seconds: float
    moved_bytes: int | None = None
    drafts: dict[str, Any] | None = None

    @property
    def milliseconds(self) -> float:
        """Per token after the first."""
        return 1000 * self.decode_seconds / max(1, len(self.tokens) - 1)
