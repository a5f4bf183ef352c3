"""The small files of a tokenizer: added tokens, names of special tokens, chat template."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coreinfer_jax.errors import CoreInferError, shown
from coreinfer_jax.files import MOST_VOCABULARY, parse_json, read_bytes

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

# The files that declare added tokens, the most authoritative last.
_DECLARING = ("added_tokens.json", "tokenizer.json", "tokenizer_config.json")

LONGEST_REASON = 300

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class AddedToken:
    """A string that is one token wherever it stands, outside the vocabulary that was learned.

    Attributes:
        id: the token.
        content: the string.
        special: markup rather than text, left out of decoded text.
        lstrip: white space before it belongs to it.
        rstrip: white space behind it belongs to it.
    """

    id: int
    content: str
    special: bool
    lstrip: bool = False
    rstrip: bool = False


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`, empty where there is no such file.

    Raises:
        CoreInferError: the file cannot be read or holds something else.
    """
    if not path.is_file():
        return {}
    text = read_text(path)
    try:
        value = parse_json(text)
    except ValueError as error:
        raise CoreInferError(f"{path}: not valid JSON ({reason(error)}); download it again") from error
    if not isinstance(value, dict):
        raise CoreInferError(f"{path}: holds a JSON {type(value).__name__}, not an object; download it again")
    return value


def read_text(path: Path) -> str:
    """The UTF-8 text in `path`.

    Raises:
        CoreInferError: the file cannot be read or is not UTF-8.
    """
    try:
        return read_bytes(path, MOST_VOCABULARY).decode("utf-8").replace("\r\n", "\n")
    except OSError as error:
        raise CoreInferError(f"{path}: {error.strerror or error}; make it readable") from error
    except UnicodeDecodeError as error:
        raise CoreInferError(f"{path}: not UTF-8 text ({reason(error)}); download it again") from error


def read_added_tokens(directory: Path) -> list[AddedToken]:
    """The added tokens that a directory declares; where two files give one string, the more authoritative counts.

    Raises:
        CoreInferError: a file that cannot be read or is not formed as transformers writes it.
    """
    special = set(_listed(directory))
    tokens: dict[str, AddedToken] = {}
    for name in _DECLARING:
        content = read_object(directory / name)
        try:
            found = [_token(number, entry) for number, entry in _entries(name, content, special)]
        except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise CoreInferError(f"{directory / name}: its added tokens cannot be read; download it again") from error
        tokens |= {token.content: token for token in found if token.content}
    return list(tokens.values())


def _entries(name: str, content: dict[str, Any], special: set[str]) -> Iterable[tuple[Any, dict[str, Any]]]:
    """(id, description) of the added tokens that file `name` declares."""
    if name == "added_tokens.json":
        return [(number, {"content": text, "special": text in special}) for text, number in content.items()]
    if name == "tokenizer.json":
        return [(entry["id"], entry) for entry in content.get("added_tokens") or []]
    return (content.get("added_tokens_decoder") or {}).items()


def _token(number: Any, entry: dict[str, Any]) -> AddedToken:
    if int(number) < 0 or not isinstance(entry["content"], str):
        raise ValueError("a token needs an id and a string")
    flags = {name: bool(entry.get(name, False)) for name in ("special", "lstrip", "rstrip")}
    return AddedToken(int(number), entry["content"], **flags)


def read_named_tokens(directory: Path) -> dict[str, str]:
    """What a directory calls bos_token, eos_token and so on, as far as it does.

    Raises:
        CoreInferError: a file that cannot be read.
    """
    named = read_object(directory / "special_tokens_map.json") | read_object(directory / "tokenizer_config.json")
    texts = {name: _text_of(named.get(name)) for name in _NAMED_TOKENS}
    return {name: text for name, text in texts.items() if text}


def read_listed_tokens(directory: Path, id_of: Callable[[str], int | None]) -> list[AddedToken]:
    """The special tokens which a directory lists without their ids, by a name such as eos_token or without one.

    Args:
        directory: with the tokenizer's files.
        id_of: the token that a string is in the vocabulary, None where it is none there.

    Raises:
        CoreInferError: a file that cannot be read.
    """
    listed = [(id_of(text), text, value) for text, value in _listed(directory).items()]
    return [
        _token(number, {**(value if isinstance(value, dict) else {}), "content": text, "special": True})
        for number, text, value in listed
        if number is not None
    ]


def _listed(directory: Path) -> dict[str, object]:
    """Strings which the directory lists as special, each with what stands there: the string, or an object with it."""
    found: dict[str, object] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        content = read_object(directory / name)
        others = content.get("additional_special_tokens")
        values = [*map(content.get, _NAMED_TOKENS), *(others if isinstance(others, list) else [])]
        found |= {_text_of(value): value for value in values}
    return {text: value for text, value in found.items() if text}


def _text_of(value: object) -> str:
    """A special token's string: transformers writes it plainly or within an object. Empty where there is none."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else ""


def read_chat_template(directory: Path) -> object:
    """The chat template, None where there is none; several templates come as transformers writes them.

    Raises:
        CoreInferError: a file that cannot be read.
    """
    file = directory / "chat_template.jinja"
    return read_text(file) if file.is_file() else read_object(directory / "tokenizer_config.json").get("chat_template")


def check_text(text: object) -> None:
    """Refuse what no tokenizer can encode."""
    if not isinstance(text, str):
        raise CoreInferError(f"text={shown(text)}: give a str")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise CoreInferError(f"text={shown(text)}: holds a lone surrogate, which is no character") from error


def reason(error: BaseException) -> str:
    """The first line of what `error` says, shortened where it quotes a file at length, or its name."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line if len(line) <= LONGEST_REASON else f"{line[:LONGEST_REASON]}..."
