"""The tokenizer in a GGUF file's metadata, as the files that transformers and sentencepiece read."""

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from coreinfer_jax.errors import CoreInferError, shown

# Kinds of tokens, numbered as sentencepiece numbers them.
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|%s"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3, _QWEN2 = _WORDS % r"\p{N}{1,3}" + _REST, _WORDS % r"\p{N}" + _REST
# How text is cut before merges apply, by `tokenizer.ggml.pre`: expressions of llama.cpp's src/llama-vocab.cpp, one
# after the other, each cutting what those before it left.
PRE_TOKENIZERS: dict[str, tuple[str, ...]] = {
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "llama-bpe": (_LLAMA3,),
    "llama3": (_LLAMA3,),
    "smaug-bpe": (_LLAMA3,),
    "qwen2": (_QWEN2,),
    "deepseek-r1-qwen": (_QWEN2,),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
}
# Those that take a word that is in the vocabulary as it is, whatever its merges say.
_WHOLE_WORDS = frozenset({"llama-bpe", "llama3", "smaug-bpe"})


def files_of_gguf(metadata: Mapping[str, Any], where: str) -> dict[str, bytes]:
    """Contents of tokenizer files by name, none where the file holds no tokenizer.

    Args:
        metadata: of a GGUF file, by key.
        where: named in errors.

    Raises:
        CoreInferError: a kind of tokenizer, or a way to cut text, that is not implemented; metadata that does not fit
            together.
    """
    kind = metadata.get("tokenizer.ggml.model", "no_vocab")
    if kind in ("no_vocab", "none"):
        return {}
    makers = {"gpt2": _byte_pairs, "llama": _sentencepiece}
    if kind not in makers:
        raise CoreInferError(f"{where}: tokenizer {shown(kind)} is not implemented; {' and '.join(makers)} are")
    tokens, types = _tokens(metadata, where)
    return {
        **makers[kind](metadata, tokens, types, where),
        "tokenizer_config.json": _json(_config(metadata, kind, tokens, types)),
    }


def _tokens(metadata: Mapping[str, Any], where: str) -> tuple[list[str], list[int]]:
    """The vocabulary and the kind of each token."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise CoreInferError(f"{where}: its tokenizer has no list of tokens; download it again")
    types = metadata.get("tokenizer.ggml.token_type", [1] * len(tokens))
    if not isinstance(types, list) or len(types) != len(tokens):
        raise CoreInferError(
            f"{where}: its tokenizer has {len(tokens)} tokens, but not as many types; download it again"
        )
    return tokens, [int(kind) for kind in types]


def _json(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


def _named(metadata: Mapping[str, Any], tokens: Sequence[str]) -> dict[str, str]:
    """Special tokens by the names that transformers has for them."""
    keys = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in keys.items()}
    return {name: tokens[i] for name, i in ids.items() if isinstance(i, int) and 0 <= i < len(tokens)}


def _added(tokens: Sequence[str], types: Sequence[int]) -> list[dict[str, Any]]:
    """Tokens that stand for themselves wherever they occur, as tokenizer.json tells them."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return [
        {"id": i, "content": token, "special": kind != USER_DEFINED, **flags}
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (CONTROL, USER_DEFINED)
    ]


def _config(metadata: Mapping[str, Any], kind: str, tokens: Sequence[str], types: Sequence[int]) -> dict[str, Any]:
    """tokenizer_config.json."""
    added = {str(entry.pop("id")): entry for entry in _added(tokens, types)}
    config: dict[str, Any] = {
        "added_tokens_decoder": added,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": metadata.get("tokenizer.ggml.add_bos_token", kind == "llama"),
        "add_prefix_space": metadata.get("tokenizer.ggml.add_space_prefix", kind == "llama"),
        **_named(metadata, tokens),
    }
    if kind == "gpt2":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if template := metadata.get("tokenizer.chat_template"):
        config["chat_template"] = template
    return config


def _byte_pairs(
    metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int], where: str
) -> dict[str, bytes]:
    """tokenizer.json of byte-level BPE."""
    pre = metadata.get("tokenizer.ggml.pre", "default")
    if pre not in PRE_TOKENIZERS:
        raise CoreInferError(
            f"{where}: tokenizer.ggml.pre {shown(pre)} is not implemented; there are {', '.join(PRE_TOKENIZERS)}"
        )
    merges = metadata.get("tokenizer.ggml.merges")
    if not isinstance(merges, list) or not all(isinstance(merge, str) and merge.count(" ") == 1 for merge in merges):
        raise CoreInferError(f"{where}: its tokenizer has no list of merges, each of two parts; download it again")
    cuts = [
        {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}
        for expression in PRE_TOKENIZERS[pre]
    ]
    bytes_only = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": pre in _WHOLE_WORDS,
        "vocab": {token: i for i, token in enumerate(tokens)},
        "merges": [merge.split(" ") for merge in merges],
    }
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added(tokens, types),
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*cuts, bytes_only]},
        "post_processor": _begins_with_bos(metadata, tokens),
        "decoder": bytes_only,
        "model": model,
    }
    return {"tokenizer.json": _json(content)}


def _begins_with_bos(metadata: Mapping[str, Any], tokens: Sequence[str]) -> dict[str, Any] | None:
    """The post-processor that puts a BOS in front, where the file asks for one."""
    bos = _named(metadata, tokens).get("bos_token")
    if bos is None or not metadata.get("tokenizer.ggml.add_bos_token", False):
        return None
    first, text = {"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {bos: {"id": bos, "ids": [tokens.index(bos)], "tokens": [bos]}},
    }


def _sentencepiece(
    metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int], where: str
) -> dict[str, bytes]:
    """tokenizer.model, sentencepiece's own format, of a BPE model with scores."""
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise CoreInferError(f"{where}: its tokenizer has {len(tokens)} tokens but other scores; download it again")
    pieces = (
        _message(1, _message(1, token.encode()) + _float(2, score) + _number(3, kind))
        for token, score, kind in zip(tokens, scores, types, strict=True)
    )
    ids = {
        field: metadata.get(f"tokenizer.ggml.{name}_token_id")
        for field, name in ((40, "unknown"), (41, "bos"), (42, "eos"), (43, "padding"))
    }
    numbers = b"".join(_number(field, -1 if i is None else int(i)) for field, i in ids.items())
    has_bytes = _number(35, int(6 in types))
    trainer = _number(3, 2) + _number(4, len(tokens)) + has_bytes + numbers
    # Text is taken as it is, except that spaces are written as a visible character.
    normalizer = _message(1, b"identity") + _number(4, 0) + _number(5, 1)
    prefix = _number(3, int(bool(metadata.get("tokenizer.ggml.add_space_prefix", True))))
    return {"tokenizer.model": b"".join(pieces) + _message(2, trainer) + _message(3, normalizer + prefix)}


# Fields of a protocol buffer: a number says which field and how it is written, then comes the value.
def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value & (2**64 - 1))


def _float(field: int, value: float) -> bytes:
    return _varint(field << 3 | 5) + struct.pack("<f", value)


def _message(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    return bytes(_seven_bits(value))


def _seven_bits(value: int) -> Iterator[int]:
    while value > 127:
        yield value & 127 | 128
        value >>= 7
    yield value
