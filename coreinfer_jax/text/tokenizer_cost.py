"""Which tokenizers encode and decode in time and memory that follow from the text; others are kept in bounds."""

from base64 import b64decode
from collections.abc import Iterator, Mapping
from math import ceil, prod
from pathlib import Path
from typing import Any

from coreinfer_jax.text.pattern_cost import is_linear
from coreinfer_jax.text.tokenizer_files import read_object

# How many times larger a text may become on its way; sentencepiece's table may make eighteen characters of one.
_MOST_GROWTH = 128
_MOST_PARTS = 100
# Characters of a token: models try all tokens that may begin at a character, and join as many as a text asks for.
_LONGEST_TOKEN = 1024
# Characters of what is put before a text, of a marker of tokens' beginnings or ends, of what replaces one character.
_LONGEST_MARK = 64
# WordPiece tries all ends of a word for all its beginnings.
_LONGEST_WORD = 1000

# The steps that are known, and how many times larger each makes a text every time. Unicode's forms are 1, because
# doing them again changes nothing.
_GROWTH = {
    **dict.fromkeys(("NFC", "NFD", "NFKC", "NFKD", "Nmt", "Lowercase", "Strip", "StripAccents", "BertNormalizer"), 1),
    **dict.fromkeys(("Split", "Digits", "Punctuation", "Whitespace", "WhitespaceSplit", "CharDelimiterSplit"), 1),
    **dict.fromkeys(("BertPreTokenizer", "UnicodeScripts", "FixedLength", "Prepend", "Sequence"), 1),
    **dict.fromkeys(("ByteFallback", "Fuse", "WordPiece", "BPEDecoder", "BertProcessing", "RobertaProcessing"), 1),
    **dict.fromkeys(("ByteLevel", "Metaspace"), 2),
}
_SECTIONS = ("normalizer", "pre_tokenizer", "decoder", "post_processor")
_MODELS = ("BPE", "Unigram", "WordPiece", "WordLevel")
# Settings by which transformers reads another file than tokenizer.json.
_OTHER_FILES = ("tokenizer_file", "fast_tokenizer_files")


def is_plain(directory: Path) -> bool:
    """Whether what a directory's tokenizer takes is bounded by the size of the texts that it is given.

    So it is where patterns are known to end (`is_linear`), nothing makes a text much larger (replacements one after
    the other multiply), and tokens are no longer than those of known models. A tokenizer of which that is not seen
    may do no harm either.

    Args:
        directory: with the tokenizer's files.

    Raises:
        CoreInferError: a file that cannot be read.
    """
    if any(read_object(directory / "tokenizer_config.json").get(name) for name in _OTHER_FILES):
        return False
    content = read_object(directory / "tokenizer.json")
    try:
        return (
            all(_is_plain_section(content.get(name)) for name in _SECTIONS)
            and _is_plain_model(content.get("model") or {})
            and all(len(token["content"]) <= _LONGEST_TOKEN for token in content.get("added_tokens") or [])
        )
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError):  # of a form that no library writes
        return False


def _is_plain_section(section: Any) -> bool:
    parts = list(_parts(section))
    return len(parts) <= _MOST_PARTS and prod(map(_growth, parts)) <= _MOST_GROWTH


def _parts(section: Any) -> Iterator[Mapping[str, Any]]:
    """A step of the way from text to tokens, or back, and the steps that it is made of."""
    if section is None:
        return
    yield section
    for name in ("normalizers", "pretokenizers", "decoders", "processors"):
        for part in section.get(name) or []:
            yield from _parts(part)


def _growth(part: Mapping[str, Any]) -> int:
    """How many times larger a step may make a text: more than is allowed where that cannot be told."""
    kind = part["type"]
    if not _has_plain_patterns(part):
        return _MOST_GROWTH + 1
    if kind == "Replace":
        return _growth_by_replacing(part["pattern"], part["content"])
    if kind == "Precompiled":
        return _growth_by_table(b64decode(part["precompiled_charsmap"]))
    if kind == "TemplateProcessing":
        return sum("Sequence" in piece for piece in part["single"]) or 1
    return _GROWTH.get(kind, _MOST_GROWTH + 1)


def _has_plain_patterns(part: Mapping[str, Any]) -> bool:
    pattern = part.get("pattern") or {}
    marks = (part.get(name) or "" for name in ("prepend", "replacement", "prefix", "suffix"))
    return is_linear(pattern.get("Regex", "")) and all(len(mark) <= _LONGEST_MARK for mark in marks)


def _growth_by_replacing(pattern: Mapping[str, str], content: str) -> int:
    """A text pattern is as long as it is; a regular expression may match one character, or none between any two."""
    length = len(pattern.get("String", ""))
    return max(1, ceil(len(content) / length)) if length else 1 + len(content)


def _growth_by_table(table: bytes) -> int:
    """sentencepiece's table: the size of its trie, the trie, and all replacements, each with a NUL at its end."""
    replacements = table[4 + int.from_bytes(table[:4], "little") :].split(b"\0")
    longest = max(map(len, replacements))
    return 18 if longest <= _LONGEST_MARK else _MOST_GROWTH + 1  # as NFKC, which such tables hold


def _is_plain_model(model: Mapping[str, Any]) -> bool:
    marks = (model.get(name) or "" for name in ("continuing_subword_prefix", "end_of_word_suffix"))
    return (
        model.get("type", "BPE") in _MODELS
        and (model.get("max_input_chars_per_word") or 0) <= _LONGEST_WORD
        and all(len(mark) <= _LONGEST_MARK for mark in marks)
        and max(map(len, _tokens(model)), default=0) <= _LONGEST_TOKEN
    )


def _tokens(model: Mapping[str, Any]) -> Iterator[str]:
    vocabulary = model.get("vocab") or {}
    return iter(vocabulary) if isinstance(vocabulary, dict) else (entry[0] for entry in vocabulary)
