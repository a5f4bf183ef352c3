"""Tokenizers as transformers reads them, and its chat templates."""

import json
import logging
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

from coreinfer_jax.errors import CoreInferError
from coreinfer_jax.files import MOST_VOCABULARY
from coreinfer_jax.text import template_process
from coreinfer_jax.text.template_cost import is_plain
from coreinfer_jax.text.tokenizer_files import check_text, read_object, read_text, reason

_JSON_FILES = ("tokenizer.json", "vocab.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_TEXT_FILES = ("merges.txt", "chat_template.jinja")

_SPACED = "hello world, how are you?"
# That a template has in a process of its own, whose start counts.
SECONDS_TO_RENDER = 60

_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")


class TransformersTokenizer:
    """A tokenizer as transformers reads it from tokenizer.json, or from vocab.json and merges.txt."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._main = next(name for name in _JSON_FILES if (directory / name).is_file())
        _refuse_large_files(directory)
        with self._told():
            self._tokenizer: Any = _open(directory)
            self._backend = _byte_fallback_backend(self._tokenizer)
            declared = self._tokenizer.added_tokens_decoder.items()
            self._special = {str(token.content): int(i) for i, token in declared if token.special}
            self.decode(self.encode("a"))  # some mistakes show only in use
            if _loses_spaces(self, directory):
                raise ValueError(f"transformers {version('transformers')} loses the spaces of texts; install another")

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Let whatever fails on the files become one line."""
        try:
            yield
        except (CoreInferError, KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        # transformers, tokenizers and json each raise their own; a panic of Rust code is not even an Exception.
        except BaseException as error:
            _refuse_broken_files(self._directory)
            raise CoreInferError(
                f"{self._directory / self._main}: transformers cannot read the tokenizer, or not use it "
                f"({reason(error)}); download it again"
            ) from error

    @property
    def description(self) -> str:
        """See `Tokenizer.description`."""
        return f"{self._main}, {len(self._tokenizer)} entries"

    @property
    def has_chat_template(self) -> bool:
        """See `Tokenizer.has_chat_template`."""
        return bool(self._tokenizer.chat_template)

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer.encode`."""
        check_text(text)
        with self._told():
            return [int(i) for i in self._tokenizer(text, verbose=False)["input_ids"]]

    def special_id(self, text: str) -> int | None:
        """See `Tokenizer.special_id`."""
        return self._special.get(text)

    @property
    def eos_id(self) -> int | None:
        """See `Tokenizer.eos_id`."""
        number = self._tokenizer.eos_token_id
        return None if number is None else int(number)

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """See `Tokenizer.encode_chat`."""
        return [int(i) for i in apply_template(self._tokenizer, messages, self._directory, tokenize=True)]

    def render_chat(self, messages: Sequence[Mapping[str, str]], begin_answer: bool) -> str:
        """See `Tokenizer.render_chat`."""
        return str(
            apply_template(self._tokenizer, messages, self._directory, tokenize=False, begin_answer=begin_answer)
        )

    def decode(self, ids: Sequence[int]) -> str:
        """See `Tokenizer.decode`."""
        ids = [i for i in ids if 0 <= i < 2**32]  # others overflow; ids that are no token decode to nothing
        with self._told():
            return self._decoded(ids)

    def _decoded(self, ids: Sequence[int]) -> str:
        if self._backend is None:
            text = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            return str(text)
        special = {i for i, token in self._backend.get_added_tokens_decoder().items() if token.special}
        tokens = [self._backend.id_to_token(i) for i in ids if i not in special]
        return str(self._backend.decoder.decode(list(_join_bytes(token for token in tokens if token is not None))))


def apply_template(
    tokenizer: Any,
    messages: Sequence[Mapping[str, str]],
    directory: Path,
    *,
    tokenize: bool,
    begin_answer: bool = True,
) -> Any:
    """What `tokenizer`'s chat template makes of a conversation: ids, or text.

    Unless `begin_answer`, for which the generation prompt is added, the last message is left open.

    Raises:
        CoreInferError: no template, or one that rejects the conversation.
    """
    if not tokenizer.chat_template:
        raise CoreInferError(
            f"{directory}: has no chat template; give plain text, without --chat, or take a chat-tuned model"
        )
    given = [dict(message) for message in messages]
    options = {"add_generation_prompt": begin_answer, "continue_final_message": not begin_answer}
    try:
        template = tokenizer.get_chat_template()
        if not is_plain(template):
            named = {name: text for name, text in tokenizer.special_tokens_map.items() if isinstance(text, str)}
            text = render_within_limits(template, named, given, options)
            return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if tokenize else text
        # Python warns of code that jinja has made of odd templates.
        with _quiet(), warnings.catch_warnings(action="ignore", category=SyntaxWarning):
            return tokenizer.apply_chat_template(
                given, tokenize=tokenize, return_dict=False, tokenizer_kwargs={"verbose": False}, **options
            )
    except Exception as error:  # templates are programs, and fail in as many ways
        raise CoreInferError(
            f"{directory}: its chat template cannot be applied to this conversation ({reason(error)}); "
            "change the conversation, or take another model"
        ) from error


def render_chat(
    template: object,
    named: Mapping[str, str],
    messages: Sequence[Mapping[str, str]],
    directory: Path,
    begin_answer: bool,
) -> str:
    """The text of a conversation by a chat `template` that may use the special tokens `named`.

    Raises:
        CoreInferError: as `apply_template`.
    """
    with _quiet():
        from transformers import PreTrainedTokenizerBase
    try:
        # Without any vocabulary, for its choice among templates and its sandbox.
        base: Any = PreTrainedTokenizerBase
        tokenizer = base(chat_template=template, **named)
    except Exception as error:
        raise CoreInferError(f"{directory}: its chat template is malformed; download the tokenizer again") from error
    return str(apply_template(tokenizer, messages, directory, tokenize=False, begin_answer=begin_answer))


def render_within_limits(
    template: str, named: Mapping[str, str], messages: Sequence[Mapping[str, str]], options: Mapping[str, bool]
) -> str:
    """What a template that may have no end makes of a conversation, in a process of its own.

    Starting it takes a second or two.

    Raises:
        ValueError: the template fails, or takes more time or memory than `template_process` allows.
    """
    asked = {"template": template, "named": named, "messages": messages, "options": options}
    try:
        done = subprocess.run(
            [sys.executable, "-P", template_process.__file__],
            input=json.dumps(asked),
            capture_output=True,
            text=True,
            timeout=SECONDS_TO_RENDER,
            check=False,
            env=os.environ | template_process.ONE_THREAD,
        )
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"it takes more than {SECONDS_TO_RENDER} s") from error
    if done.returncode:
        allowed = f"{template_process.SECONDS} s or {template_process.BYTES >> 20} MiB"
        raise ValueError(f"it takes more than {allowed}")
    told = json.loads(done.stdout)
    if "error" in told:
        raise ValueError(told["error"])
    return str(told["text"])


def _open(directory: Path) -> Any:
    with _quiet():
        from transformers import AutoTokenizer

        # Unless told not to, transformers asks on the terminal whether to run code that came with a model.
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)


def _loses_spaces(tokenizer: TransformersTokenizer, directory: Path) -> bool:
    """Whether transformers' reading of tokenizer.json loses spaces that are kept by the library it is written for.

    Some releases build tokenizers of some classes anew, whatever the file says.
    """
    file = directory / "tokenizer.json"
    if not file.is_file() or " " in tokenizer.decode(tokenizer.encode(_SPACED)).strip():
        return False
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_file(str(file))
    backend.no_padding()  # which a file may ask for without end
    return " " in backend.decode(backend.encode(_SPACED).ids).strip()


def _refuse_large_files(directory: Path) -> None:
    for path in (directory / name for name in (*_JSON_FILES, *_TEXT_FILES)):
        size = path.stat().st_size if path.is_file() else 0
        if size > MOST_VOCABULARY:
            raise CoreInferError(
                f"{path}: {size} bytes, where such a file has {MOST_VOCABULARY} at most; download it again"
            )


def _refuse_broken_files(directory: Path) -> None:
    """Name the file that is broken, which transformers does not, unless each is well formed by itself."""
    for name in _JSON_FILES:
        read_object(directory / name)
    for name in _TEXT_FILES:
        if (directory / name).is_file():
            read_text(directory / name)


def _byte_fallback_backend(tokenizer: Any) -> Any:
    """The tokenizer of the tokenizers library inside, if it falls back to bytes for characters it does not know."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = None if backend is None else backend.decoder
    return backend if decoder is not None and b'"ByteFallback"' in decoder.__getstate__() else None


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from advising on the terminal, as it does on import where PyTorch is missing.

    Importing sets the level of its logger, so that only a filter is sure to hold; the loggers of its modules
    inherit the level, not the filter.
    """
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.addFilter(_is_error)
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.removeFilter(_is_error)
        logger.setLevel(level)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def _join_bytes(tokens: Iterable[str]) -> Iterator[str]:
    """`tokens` with the characters that runs of byte tokens spell in their place.

    The decoder of tokenizers would turn a whole run into U+FFFDs while its last character is incomplete, also the
    characters that have been shown.
    """
    for is_bytes, run in groupby(tokens, lambda token: _BYTE.fullmatch(token) is not None):
        if is_bytes:
            yield bytes(int(token[3:5], 16) for token in run).decode("utf-8", errors="replace")
        else:
            yield from run
