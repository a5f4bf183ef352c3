"""The text of a growing continuation, and how much of it can be shown."""

from collections.abc import Sequence

from coreinfer_jax.text.tokenizer import Tokenizer

# Prompt tokens decoded along with a continuation, so that its first token keeps the space before it.
CONTEXT_TOKENS = 8

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

# Bytes of a UTF-8 character that is not complete yet, at most: it has four.
INCOMPLETE_BYTES = 3


def continuation(tokenizer: Tokenizer, prompt: Sequence[int], new: Sequence[int]) -> str:
    """The text that tokens `new` add to `prompt`; while a character is incomplete it ends in U+FFFD.

    A character that begins in the prompt and ends in `new` counts as new.
    """
    context = list(prompt[-CONTEXT_TOKENS:])
    text = tokenizer.decode([*context, *new])
    before = tokenizer.decode(context)
    differing = (i for i, (old, now) in enumerate(zip(before, text, strict=False)) if old != now)
    return text[next(differing, len(before)) :]


def settled(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The part of a growing `text` that later tokens cannot change, and whether it ends at a stop string.

    Held back are an incomplete last character and an end that may become a stop string; a stop string found cuts the
    text before it. A U+FFFD followed by other text, or by three more, is there to stay and is shown: the model wrote
    it, or bytes that are no character.
    """
    whole = complete(text)
    # The stop string that is complete first counts, as it would had the text come letter by letter.
    found = [(position + len(stop), position) for stop in stops if (position := whole.find(stop)) >= 0]
    if found:
        return whole[: min(found)[1]], True
    held = max((_overlap(whole, stop) for stop in stops), default=0)
    return whole[: len(whole) - held], False


def complete(text: str) -> str:
    """`text` without the last U+FFFDs, as far as they may be the beginning of one character."""
    kept = len(text.rstrip(REPLACEMENT))
    return text[: max(kept, len(text) - INCOMPLETE_BYTES)]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(stop), len(text)), 0, -1) if text.endswith(stop[:n])), 0)
