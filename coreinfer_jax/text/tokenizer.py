"""Which of a directory's files make its tokenizer."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from coreinfer_jax.text.limited_tokenizer import LimitedTokenizer
from coreinfer_jax.text.tokenizer_cost import is_plain
from coreinfer_jax.text.tokenizer_files import TOKENIZER_FILES
from coreinfer_jax.text.with_sentencepiece import SentencePieceTokenizer, is_conversion
from coreinfer_jax.text.with_transformers import TransformersTokenizer


class Tokenizer(Protocol):
    """What this package asks of a tokenizer."""

    @property
    def description(self) -> str:
        """The files it is read from and how many entries it has, for people."""
        ...

    @property
    def has_chat_template(self) -> bool:
        """Whether `encode_chat` has a template to apply."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of `text` as the model was trained to see it, a BOS first where the model has one.

        Raises:
            CoreInferError: something that is no text.
        """
        ...

    def special_id(self, text: str) -> int | None:
        """The special token that `text` is; None for anything that decoded text may hold."""
        ...

    @property
    def eos_id(self) -> int | None:
        """The token that the tokenizer's files call eos_token; None where they name none."""
        ...

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Ids of a conversation and the beginning of the answer, as the chat template says, a BOS only if it does.

        Args:
            messages: for instance `[{"role": "user", "content": "How are you?"}]`, the oldest first.

        Raises:
            CoreInferError: no chat template, or one that rejects the conversation.
        """
        ...

    def render_chat(self, messages: Sequence[Mapping[str, str]], begin_answer: bool) -> str:
        """The text whose ids `encode_chat` gives.

        Args:
            messages: as there.
            begin_answer: whether an answer begins after the last message; otherwise that one is left open, to go on.

        Raises:
            CoreInferError: as `encode_chat`.
        """
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens left out.

        More ids only add text, except that they may complete a character whose bytes ended in U+FFFD.
        """
        ...


def load_tokenizer(directory: Path) -> Tokenizer | None:
    """The tokenizer of a checkpoint directory, or None when it has none.

    One whose files may ask for time or memory without end runs in a process of its own, which has limits.

    Raises:
        CoreInferError: tokenizer files that cannot be read.
    """
    names = {name for name in TOKENIZER_FILES if (directory / name).is_file()}
    # A model whose tokenizer.model is sentencepiece's was trained on sentencepiece's ids. The tokenizer.json that often
    # lies beside it is a conversion, and transformers 5 rebuilds that once more: leading and double spaces come out
    # different. A tokenizer.model of another vocabulary, such as Llama 3's in tiktoken's format, says nothing.
    if "tokenizer.json" in names and "tokenizer.model" in names and is_conversion(directory):
        return SentencePieceTokenizer(directory)
    if "tokenizer.json" in names or {"vocab.json", "merges.txt"} <= names:
        return TransformersTokenizer(directory) if is_plain(directory) else LimitedTokenizer(directory)
    if "tokenizer.model" in names:
        return SentencePieceTokenizer(directory)
    return None
