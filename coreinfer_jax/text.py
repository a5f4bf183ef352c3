"""Text in and out: tokenizers, the text of a growing continuation, stop strings."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from coreinfer_jax.errors import CoreInferError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)

# Prompt tokens decoded along with a continuation, so that its first token keeps the space before it.
CONTEXT_TOKENS = 8

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Tokenizer(Protocol):
    """What this package asks of a tokenizer."""

    def encode(self, text: str) -> list[int]:
        """Ids of `text` as the model was trained to see it, a BOS first where the model has one."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens left out."""
        ...


class TransformersTokenizer:
    """A tokenizer as transformers reads it from tokenizer.json, or from vocab.json and merges.txt."""

    def __init__(self, directory: Path) -> None:
        from transformers import AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        except Exception as error:  # transformers, tokenizers and json each raise their own
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise CoreInferError(f"{directory}: its tokenizer cannot be read ({reason}); download it again") from error

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer.encode`."""
        return [int(i) for i in self._tokenizer(text)["input_ids"]]

    def decode(self, ids: Sequence[int]) -> str:
        """See `Tokenizer.decode`."""
        text = self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)


class SentencePieceTokenizer:
    """A bare sentencepiece model, read by sentencepiece itself: transformers' conversion gives other ids."""

    def __init__(self, file: Path) -> None:
        import sentencepiece

        try:
            self._processor: Any = sentencepiece.SentencePieceProcessor(str(file))
        except (RuntimeError, OSError) as error:
            raise CoreInferError(f"{file}: not a sentencepiece model; download it again") from error
        bos = int(self._processor.bos_id())
        self._prefix = [] if bos < 0 else [bos]

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer.encode`."""
        return [*self._prefix, *(int(i) for i in self._processor.encode(text))]

    def decode(self, ids: Sequence[int]) -> str:
        """See `Tokenizer.decode`."""
        known = [i for i in ids if i < len(self._processor)]  # models pad their vocabulary beyond the tokenizer's
        return str(self._processor.decode(known))


def load_tokenizer(directory: Path) -> Tokenizer | None:
    """The tokenizer of a checkpoint directory, or None when it has none.

    Raises:
        CoreInferError: tokenizer files that cannot be read.
    """
    names = {name for name in TOKENIZER_FILES if (directory / name).is_file()}
    if "tokenizer.json" in names or {"vocab.json", "merges.txt"} <= names:
        return TransformersTokenizer(directory)
    if "tokenizer.model" in names:
        return SentencePieceTokenizer(directory / "tokenizer.model")
    return None


def continuation(tokenizer: Tokenizer, prompt: Sequence[int], new: Sequence[int]) -> str:
    """The text that tokens `new` add to `prompt`; while a character is incomplete it ends in U+FFFD."""
    context = list(prompt[-CONTEXT_TOKENS:])
    return tokenizer.decode([*context, *new])[len(tokenizer.decode(context)) :]


def settled(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The part of a growing `text` that later tokens cannot change, and whether it ends at a stop string.

    Held back are an incomplete last character and an end that may become a stop string; a stop string found cuts the
    text before it.
    """
    # The stop string that is complete first counts, as it would had the text come letter by letter.
    found = [(position + len(stop), position) for stop in stops if (position := text.find(stop)) >= 0]
    if found:
        return text[: min(found)[1]], True
    whole = text.rstrip(REPLACEMENT)
    held = max((_overlap(whole, stop) for stop in stops), default=0)
    return whole[: len(whole) - held], False


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(stop), len(text)), 0, -1) if text.endswith(stop[:n])), 0)
