"""A continuation while it grows: the text that may be shown already, its tokens, a line of facts about its cost."""

from collections.abc import Sequence

import numpy as np

from coreinfer_jax.engine.results import Chunk, Drafting, Stats
from coreinfer_jax.sparsity.choice import ASKED
from coreinfer_jax.sparsity.groups import Groups
from coreinfer_jax.text import Tokenizer, complete, continuation, settled


class Reply:
    """The text that new tokens add to a prompt.

    Attributes:
        text: shown so far.
        tokens: all new tokens so far, those behind a stop string or an unfinished character included.
        stopped: whether a stop string has ended the text.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str]) -> None:
        self._tokenizer, self._prompt, self._stops = tokenizer, prompt, stops
        self._all = ""
        self.text, self.tokens, self.stopped = "", list[int](), False

    def add(self, chunk: Chunk) -> str:
        """Text that can be shown now: later tokens cannot change it."""
        self.tokens += chunk.tokens[0, : chunk.lengths[0]].tolist()
        self._all = continuation(self._tokenizer, self._prompt, self.tokens)
        ready, self.stopped = settled(self._all, self._stops)
        return self._show(ready)

    def finish(self) -> str:
        """What was held back for a stop string that never came; a character that was cut off stays out."""
        return "" if self.stopped else self._show(complete(self._all))

    def _show(self, text: str) -> str:
        shown, self.text = self.text, text
        return text[len(shown) :]


def facts(stats: Stats, new_tokens: int, groups: Groups | None = None) -> str:
    """One line for people."""
    choice = stats.choices[0]
    why = "" if choice.reason == ASKED else f" ({choice.reason})"
    by = "" if groups is None or choice.method == "stability" else f" by {groups.clusters.names[choice.group or 0]!r}"
    kept = np.mean(stats.kept_neurons) / stats.mlp_size
    steps = stats.decode_steps if stats.drafting is None else stats.drafting.tokens
    decode = f"{1000 * stats.decode_seconds / steps:.1f} ms/token" if steps else "no steps"
    cached = f" ({stats.cached_tokens[0]} cached)" if stats.cached_tokens[0] else ""
    return (
        f"[{stats.method}{by}{why}: {kept:.0%} of {stats.mlp_size} MLP neurons in {len(stats.kept_neurons)} layers; "
        f"{stats.prompt_tokens[0]} prompt{cached} + {new_tokens} new tokens; prefill {stats.prefill_seconds:.2f} s, "
        f"selection {stats.selection_seconds:.2f} s, compaction {stats.compaction_seconds:.2f} s, decode {decode} "
        f"(compiling included); {stats.bytes_read_per_token / 1e6:.1f} MB read per token"
        f"{'' if stats.drafting is None else _drafts(stats.drafting)}]"
    )


def _drafts(drafting: Drafting) -> str:
    """What came of drafts, the last part of the line."""
    passes = drafting.verifications + drafting.single_passes
    return (
        f"; lossless: {drafting.verifications} of {passes} passes verified drafts, "
        f"{drafting.accepted_per_draft:.2f} tokens of each accepted{_regathered(drafting)}"
    )


def _regathered(drafting: Drafting) -> str:
    """How core neurons followed the text; nothing where they stayed, or were not looked at."""
    if drafting.drift is None:
        return ""
    times = "once" if drafting.regathered == 1 else f"{drafting.regathered} times"
    return (
        f"; core neurons gathered anew {times}, drift {drafting.drift:.0%} at the last look, "
        f"{drafting.regathering_milliseconds:.0f} ms in all"
    )
