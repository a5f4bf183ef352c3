"""What a generation gives back: tokens, the core neurons behind them, and what it cost."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from coreinfer_jax.sparsity.choice import Choice, Method
from coreinfer_jax.sparsity.moving import NOTHING, DeviceRows
from coreinfer_jax.sparsity.neurons import CoreNeurons

# What chose the rows' neurons; `mixed` where it differs between the rows of a batch.
Ran = Method | Literal["mixed"]


@dataclass(frozen=True)
class Drafting:
    """What came of the drafts of a lossless generation, so far.

    Drafters are `core`, narrowed weights, and `lookup`, what followed the same n-gram earlier in the text.

    Attributes:
        tokens: new tokens of all rows, without the first of each.
        single_passes: passes of the full model over one token per row, where no draft was worth a verification.
        verifications: passes of the full model that verified drafts.
        core_steps: passes of the narrowed weights.
        reached: by drafter, at each place of a draft: how often the full model agreed with all drafted tokens before.
        accepted: of these, how often it agreed with the drafted token too.
        single_milliseconds: of one such pass, measured in the first few tokens; None where there were too few.
        verify_milliseconds: of one pass that verifies; None where there was no time to lose for measuring it.
        core_step_milliseconds: of one pass of the narrowed weights; None too where none could pay.
        regathered: how often core neurons were gathered anew, as the text had drifted from those in use.
        drift: the share of those in use that the last look at the text would have replaced, a mean over layers and
            rows; None before the first look, and where they stay.
        regathering_milliseconds: of all summing up, choosing and gathering for that, a part of `decode_seconds`.
    """

    tokens: int
    single_passes: int
    verifications: int
    core_steps: int
    reached: Mapping[str, tuple[int, ...]]
    accepted: Mapping[str, tuple[int, ...]]
    single_milliseconds: float | None
    verify_milliseconds: float | None
    core_step_milliseconds: float | None
    regathered: int = 0
    drift: float | None = None
    regathering_milliseconds: float = 0.0

    @property
    def accepted_per_draft(self) -> float:
        """Drafted tokens that were accepted, per draft of a row that was verified; 0 without any."""
        drafts = sum(places[0] for places in self.reached.values())
        return sum(map(sum, self.accepted.values())) / max(1, drafts)


@dataclass(frozen=True)
class Stats:
    """What a generation did and what it cost.

    Seconds are wall-clock, each phase awaited; the first call of a shape includes compiling its programs.

    Attributes:
        method: `dense`; `given` (the caller's core neurons); `stability`, `similarity` or `fused` (predicted from the
            prompt); `mixed` where `auto` chose differently for the rows of a batch.
        choices: per row, or once for all rows that share a set, what ran, why, the stability figure and the group.
        kept_neurons: neurons per layer that the decode steps use, F where a layer is dense.
        mlp_size: F, the number of MLP neurons per layer.
        prompt_tokens: per row.
        cached_tokens: per row, how many of these were in the KV cache already; above 0 only in `converse`.
        prefill_seconds: the full model over the prompt, its neurons summed up, and the first token.
        selection_seconds: sums to indices and offsets.
        compaction_seconds: the gather of the narrowed weights, after the first token; 0 before it.
        decode_seconds: all decode steps so far.
        decode_steps: passes of the narrowed model so far; each makes one token per unfinished row. Lossless, passes of
            the full model, which make one or more.
        bytes_read_per_token: weights and KV cache one decode step reads, with what pads widths on accelerators,
            divided by the rows it serves. Lossless, what all passes so far have read, divided by the tokens made.
        moved_bytes: of MLPs that stay on the host, what was moved to the device so far; 0 where all weights are there.
        drafting: what came of drafts; None where the generation is not lossless, and before its second token.
    """

    method: Ran
    choices: tuple[Choice, ...]
    kept_neurons: tuple[int, ...]
    mlp_size: int
    prompt_tokens: tuple[int, ...]
    cached_tokens: tuple[int, ...]
    prefill_seconds: float
    selection_seconds: float
    compaction_seconds: float
    decode_seconds: float
    decode_steps: int
    bytes_read_per_token: float
    moved_bytes: int = 0
    drafting: Drafting | None = None


@dataclass(frozen=True)
class Chunk:
    """Newly generated tokens.

    Attributes:
        tokens: int32 [B, n]; behind its own, a row holds the fill id.
        lengths: int32 [B], how many of the n belong to each row. Lossless, rows make tokens at different speeds.
        core: the core neurons in use, None when dense. Lossless, they may follow the text.
        stats: costs up to and including this chunk.
        device_rows: of MLPs that stay on the host, what is on the device; the next chunk's, or a later call that is
            given them, may use them up.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    core: CoreNeurons | None
    stats: Stats
    device_rows: DeviceRows = NOTHING


@dataclass(frozen=True)
class Generation:
    """The result of `generate`.

    Attributes:
        tokens: int32 [B, max_new_tokens], new tokens only; after a row's length it holds `fill_id`.
        lengths: int32 [B], new tokens per row, an EOS counted.
        fill_id: the model's padding id, or 0 when it has none.
        core: the core neurons used, None when dense. Lossless, they may follow the text: those used last.
        stats: costs.
        device_rows: what it left on the device of MLPs that stay on the host, for the `device_rows` of a later call:
            that moves only what it lacks. Their memory is theirs as long as they are.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    fill_id: int
    core: CoreNeurons | None
    stats: Stats
    device_rows: DeviceRows = NOTHING
