"""sentencepiece models, read by sentencepiece itself: transformers' conversions give other ids."""

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from coreinfer_jax.errors import CoreInferError
from coreinfer_jax.files import MOST_VOCABULARY, read_bytes
from coreinfer_jax.text.sentencepiece_cost import check_expansion
from coreinfer_jax.text.tokenizer_files import (
    AddedToken,
    check_text,
    read_added_tokens,
    read_chat_template,
    read_listed_tokens,
    read_named_tokens,
    read_object,
    reason,
)
from coreinfer_jax.text.with_transformers import render_chat

# How sentencepiece writes a space.
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"

# A serialised protocol buffer that follows another one overrides its fields; these bytes set field 3 of the model,
# normalizer_spec, to one whose field 3, add_dummy_prefix, is false.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


class SentencePieceTokenizer:
    """A sentencepiece model, with the added tokens and the chat template declared in the files beside it.

    sentencepiece puts a space before a text. Where an added token cuts the text in two, the second part gets one too,
    as in Meta's code, which encodes a conversation turn by turn; unless the files beside the model say otherwise.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        config = read_object(directory / "tokenizer_config.json")
        self._processor = read_model(directory / "tokenizer.model")
        self._inner = self._processor
        if not _prefixes_every_section(read_object(directory / "tokenizer.json"), config):
            self._inner = read_model(directory / "tokenizer.model", _NO_DUMMY_PREFIX)
        if config.get("add_prefix_space") is False:
            self._processor = self._inner = read_model(directory / "tokenizer.model", _NO_DUMMY_PREFIX)
        listed = read_listed_tokens(directory, self._piece)
        added = [*listed, *read_added_tokens(directory)]
        # In plain prompts only what the files declare counts as a token; sentencepiece itself takes <s> for text.
        self._prompt_tokens = {token.content: token for token in added}
        # Chat templates write <s> as well.
        self._chat_tokens = {token.content: token for token in (*_control_pieces(self._processor), *added)}
        self._by_id = {token.id: token for token in added}
        self._named = _named_pieces(self._processor) | read_named_tokens(directory)
        self._template = read_chat_template(directory)
        self._bos = self._id_of(self._named.get("bos_token", ""))
        self._start = [] if self._bos is None or config.get("add_bos_token") is False else [self._bos]

    @property
    def description(self) -> str:
        """See `Tokenizer.description`."""
        return f"tokenizer.model (sentencepiece), {len(self._processor)} entries"

    @property
    def has_chat_template(self) -> bool:
        """See `Tokenizer.has_chat_template`."""
        return bool(self._template)

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer.encode`."""
        check_text(text)
        return self._encode(text, self._prompt_tokens, self._start)

    def special_id(self, text: str) -> int | None:
        """See `Tokenizer.special_id`."""
        token = self._chat_tokens.get(text)
        return token.id if token is not None and token.special else None

    @property
    def eos_id(self) -> int | None:
        """See `Tokenizer.eos_id`."""
        return self._id_of(self._named.get("eos_token", ""))

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """See `Tokenizer.encode_chat`."""
        return self._encode(self.render_chat(messages, begin_answer=True), self._chat_tokens, [])

    def render_chat(self, messages: Sequence[Mapping[str, str]], begin_answer: bool) -> str:
        """See `Tokenizer.render_chat`."""
        return render_chat(self._template, self._named, messages, self._directory, begin_answer)

    def _encode(self, text: str, tokens: Mapping[str, AddedToken], start: Sequence[int]) -> list[int]:
        """Ids `start` and those of `text`, where the strings `tokens` stand for themselves."""
        ids = list(start)
        for part in _split(text, tokens):
            if isinstance(part, AddedToken):
                ids.append(part.id)
                continue
            # A sequence starts behind every BOS, not only the first.
            processor = self._processor if not ids or ids[-1] == self._bos else self._inner
            ids += [int(i) for i in processor.encode(part)]
        return ids

    def _id_of(self, text: str) -> int | None:
        """The one token that `text` is, if it is."""
        token = self._chat_tokens.get(text)
        return self._piece(text) if token is None else token.id

    def _piece(self, text: str) -> int | None:
        """The piece that `text` is, if it is; of those that no text produces as well."""
        i = int(self._processor.piece_to_id(text.encode(errors="replace")))  # JSON may hold lone surrogates
        return i if str(self._processor.id_to_piece(i)) == text else None

    def decode(self, ids: Sequence[int]) -> str:
        """See `Tokenizer.decode`."""
        parts: list[str] = []
        for token, run in groupby(filter(self._is_text, ids), self._by_id.get):
            if token is None:
                parts.append(str((self._inner if parts else self._processor).decode(list(run))))
            else:
                parts += [token.content for _ in run]
        return "".join(parts)

    def _is_text(self, i: int) -> bool:
        """Whether token `i` is more than markup; models pad their vocabulary beyond the tokenizer's."""
        token = self._by_id.get(i)
        return 0 <= i < len(self._processor) if token is None else not token.special


def read_model(file: Path, override: bytes = b"") -> Any:
    """The sentencepiece processor in `file`, with fields of the model overridden.

    Raises:
        CoreInferError: the file cannot be read or is no sentencepiece model.
    """
    import sentencepiece

    try:
        content = read_bytes(file, MOST_VOCABULARY)
    except OSError as error:
        raise CoreInferError(f"{file}: {error.strerror or error}; make it readable") from error
    try:
        if not content:
            raise ValueError("the file is empty")  # sentencepiece would make a processor that is not initialised
        check_expansion(content)
        processor = sentencepiece.SentencePieceProcessor(model_proto=content + override)
        # Some mistakes show only in use; pieces that are not UTF-8 in the first look at them.
        processor.decode(processor.encode("a"))
        processor.id_to_piece(list(range(len(processor))))
    except (RuntimeError, ValueError, IndexError) as error:
        raise CoreInferError(
            f"{file}: not a sentencepiece model ({reason(error)}); add the model's tokenizer.json or download it again"
        ) from error
    return processor


def is_conversion(directory: Path) -> bool:
    """Whether tokenizer.json says what tokenizer.model says: the same pieces with the same ids.

    Raises:
        CoreInferError: tokenizer.json comes from a sentencepiece model, but tokenizer.model cannot be read.
    """
    vocabulary = _vocabulary(directory / "tokenizer.json")
    if SPACE not in vocabulary:
        return False
    processor = read_model(directory / "tokenizer.model")
    # Tokens outside the learned vocabulary may have been renamed or added, and are read from the files beside it.
    apart = {token.id for token in (*_control_pieces(processor), *read_added_tokens(directory))}
    pieces = {processor.id_to_piece(i): i for i in range(len(processor)) if i not in apart}
    return pieces == {piece: i for piece, i in vocabulary.items() if i not in apart}


def _vocabulary(file: Path) -> dict[str, int]:
    """Piece to id in a tokenizer.json; empty where it is not formed that way."""
    model = read_object(file).get("model")
    entries = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(entries, dict):
        return {piece: i for piece, i in entries.items() if isinstance(i, int)}
    if isinstance(entries, list) and all(isinstance(entry, list) and entry for entry in entries):
        return {str(entry[0]): i for i, entry in enumerate(entries)}
    return {}


def _prefixes_every_section(pipeline: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Whether text behind an added token gets a space in front.

    tokenizer.json tells how the model's fine-tuning saw it; without one, transformers' flag for its own former
    behaviour does.
    """
    if pipeline:
        return re.search("'(first|never)'", f"{pipeline.get('normalizer')}{pipeline.get('pre_tokenizer')}") is None
    return config.get("legacy") is not False


def _control_pieces(processor: Any) -> list[AddedToken]:
    """The pieces that no text produces, <unk> among them."""
    numbers = [i for i in range(len(processor)) if processor.is_control(i) or processor.is_unknown(i)]
    return [AddedToken(i, str(processor.id_to_piece(i)), special=True) for i in numbers]


def _named_pieces(processor: Any) -> dict[str, str]:
    """bos_token, eos_token and unk_token as far as the model has them."""
    numbers = {"bos_token": processor.bos_id(), "eos_token": processor.eos_id(), "unk_token": processor.unk_id()}
    return {name: str(processor.id_to_piece(i)) for name, i in numbers.items() if i >= 0}


def _split(text: str, tokens: Mapping[str, AddedToken]) -> Iterable[str | AddedToken]:
    """`text` cut at the strings `tokens`, the longest where several fit; empty parts left out."""
    if not tokens:
        return [text] if text else []
    longest_first = sorted(tokens, key=len, reverse=True)
    parts: list[str] = re.split(f"({'|'.join(map(re.escape, longest_first))})", text)
    for i in range(1, len(parts), 2):
        token = tokens[parts[i]]
        parts[i - 1] = parts[i - 1].rstrip() if token.lstrip else parts[i - 1]
        parts[i + 1] = parts[i + 1].lstrip() if token.rstrip else parts[i + 1]
    return [tokens[part] if i % 2 else part for i, part in enumerate(parts) if part]
