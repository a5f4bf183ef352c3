"""Tokenizers of checkpoints: those whose files may ask for time or memory without end work within limits, the same."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from tokenizers import Regex
from tokenizers.pre_tokenizers import Split

from coreinfer_jax.text import load_tokenizer
from coreinfer_jax.text.gguf_tokenizer import PRE_TOKENIZERS
from coreinfer_jax.text.limited_tokenizer import LimitedTokenizer
from coreinfer_jax.text.pattern_cost import is_linear
from coreinfer_jax.text.tokenizer_cost import is_plain
from coreinfer_jax.text.with_transformers import TransformersTokenizer
from tests.test_bad_input import refusal

_CASED = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]%s[\p{Ll}\p{Lm}\p{Lo}\p{M}]%s"
_APOSTROPHES = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
# As their tokenizer.json files have them.
PUBLISHED = {
    **{f"{name} {number}": one for name, cuts in PRE_TOKENIZERS.items() for number, one in enumerate(cuts)},
    "LLaMA 3": rf"{_APOSTROPHES}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}",
    "Qwen 2": rf"{_APOSTROPHES}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}",
    "GPT-4": r"(?i:'(?:[sdmt]|ll|ve|re))|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+",
    "GPT-4o": f"{_CASED % ('*', '+')}{_APOSTROPHES}?|{_CASED % ('+', '*')}{_APOSTROPHES}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}",
    "Mistral": f"{_CASED % ('*', '+')}|{_CASED % ('+', '*')}"
    rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}",
    "DeepSeek 3": r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}",
    "CLIP": r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
    "BLOOM": r" ?[^(\s|[.,!?…。，、।۔،])]+",  # noqa: RUF001 - as it is
    "ALBERT": " {2,}",
    "Chinese": "[一-龥぀-ゟ゠-ヿ]+",  # noqa: RUF001 - as it is
}
ENDLESS = (
    *("(a+)+$", "(a|a)*[xy]|a", "(?:a|a){1,50}b", "a?" * 40 + "a" * 40, "(?:a*b)?|a+", "()*", "a{1,2000}{1,2000}b"),
    *("a*[^a]", "a*+b", "a*a*b|a+", "[a-c]+[a-d]*[xy]", "a*[xy]|a|a+", "a{1,2000}b", r"(?=(\d{3})+(?!\d))"),
    *(r"(a)\1", "a+?b", "(?<=a+)b", "(?>a*)b", "(?i)a|b", "[]a]", "[a", "(", "(" * 100_000, "a**", "a{", "*"),
)
# Runs of what the published patterns repeat.
RUNS = (" ", "\n", "a", "A", "5", "!", "\N{CJK UNIFIED IDEOGRAPH-4E00}", "\N{COMBINING ACUTE ACCENT}", "'", " a", " \n")


@pytest.mark.parametrize("pattern", PUBLISHED.values(), ids=PUBLISHED)
def test_published_patterns_are_known_to_end(pattern):
    assert is_linear(pattern)
    for run in RUNS:  # of which tries in vain at every character would take minutes
        text = 20_000 * run
        assert "".join(part for part, _ in Split(Regex(pattern), "isolated").pre_tokenize_str(text)) == text


@pytest.mark.parametrize("pattern", ENDLESS, ids=lambda pattern: pattern[:20])
def test_patterns_that_may_have_no_end_are_known(pattern):
    assert not is_linear(pattern)


@pytest.fixture
def embedded(tmp_path: Path) -> Path:
    """A byte-level tokenizer."""
    source = Path(__file__).parents[1] / "coreinfer_jax" / "assets" / "opt"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, tmp_path / name)
    return tmp_path


def change(directory: Path, **fields: object) -> Path:
    """The directory, with other fields in its tokenizer.json."""
    file = directory / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return directory


def cut_by(pattern: str) -> dict[str, object]:
    cut = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    bytes_only = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [cut, bytes_only]}


def replaced(pattern: dict[str, str], content: str, times: int = 1) -> dict[str, object]:
    return {"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": pattern, "content": content}] * times}


A = {"Sequence": {"id": "A", "type_id": 0}}
COSTLY = {
    "a pattern": {"pre_tokenizer": cut_by("(a|a)*[xy]|a")},
    "a pattern of a replacement": {"normalizer": replaced({"Regex": "(a+)+$"}, "")},
    "doublings": {"normalizer": replaced({"String": "a"}, "aa", 40)},
    "doublings in decoding": {
        "decoder": {"type": "Sequence", "decoders": replaced({"String": "a"}, "aa", 40)["normalizers"]}
    },
    "a long replacement": {"normalizer": replaced({"String": "a"}, "a" * 10_000)},
    "a text between all characters": {"normalizer": replaced({"String": ""}, "a" * 1000)},
    "bytes of bytes": {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "ByteLevel"}] * 40}},
    "the text many times": {"post_processor": {"type": "TemplateProcessing", "single": [A] * 1000}},
    "a long beginning": {"normalizer": {"type": "Prepend", "prepend": "a" * 10_000}},
    "a step that is not known": {"normalizer": {"type": "Future"}},
    "a table of sentencepiece": {
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAAAA" + "YWFh" * 100}
    },
    "long tokens": {"model": {"type": "WordLevel", "vocab": {"a" * 100_000: 0}}},
    "long words": {"model": {"type": "WordPiece", "max_input_chars_per_word": 10**9, "vocab": {}}},
    "long added tokens": {"added_tokens": [{"id": 0, "content": "a" * 100_000}]},
    "what is no step": {"normalizer": [3]},
}


@pytest.mark.parametrize("fields", COSTLY.values(), ids=COSTLY)
def test_tokenizers_that_may_have_no_end_are_known(fields, embedded):
    assert is_plain(embedded)
    assert not is_plain(change(embedded, **fields))


@pytest.mark.parametrize("name", ["tokenizer_file", "fast_tokenizer_files"])
def test_a_tokenizer_of_another_file_is_not_vouched_for(name, embedded):
    """Whatever transformers makes of these settings, the file that is looked at may not be the one that is read."""
    (embedded / "tokenizer_config.json").write_text(json.dumps({name: ["tokenizer.4.0.json"]}))
    assert not is_plain(embedded)


@pytest.mark.parametrize("folder", ["models/tinystories-656k", "tokenizers/opt"])
def test_ordinary_tokenizers_run_in_this_process(folder, data):
    assert is_plain(data / folder)
    assert isinstance(load_tokenizer(data / folder), TransformersTokenizer)


def test_a_process_of_its_own_does_the_same(embedded):
    """Also after it has ended, and for what this package's own tokenizers are asked."""
    config = json.loads((embedded / "tokenizer_config.json").read_text())
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    (embedded / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    here, apart = TransformersTokenizer(embedded), LimitedTokenizer(embedded)
    for text in ("Hello world", "a" * 100_000, "caf\xe9 \0 \N{GRINNING FACE}\n", ""):
        ids = here.encode(text)
        assert apart.encode(text) == ids
        assert apart.decode(ids) == here.decode(ids)
    os.kill(apart._process.pid, signal.SIGKILL)
    apart._process.wait()
    hello = [{"role": "user", "content": "Hello"}]
    assert apart.encode_chat(hello) == here.encode_chat(hello)
    assert apart.render_chat(hello, begin_answer=True) == here.render_chat(hello, begin_answer=True) == "Hello"
    assert (apart.has_chat_template, apart.eos_id) == (here.has_chat_template, here.eos_id)
    assert apart.special_id("Hello") is here.special_id("Hello") is None
    assert refusal(lambda: apart.encode("\ud800")) == refusal(lambda: here.encode("\ud800"))


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"normalizer": replaced({"String": "a"}, "aa", 40)}, "its tokenizer takes more than 30 s or 1024 MiB"),
        pytest.param(
            {"pre_tokenizer": cut_by("a*a*a*[^a]|a")}, "takes more than 5 s or 1024 MiB", marks=pytest.mark.slow
        ),
        pytest.param({"pre_tokenizer": cut_by("(a|a)*[xy]|a")}, "retry-limit", marks=pytest.mark.slow),
    ],
    ids=["doublings", "in vain", "ways without end"],
)
def test_a_tokenizer_without_end_is_refused_in_one_line(fields, told, embedded):
    assert told in refusal(lambda: load_tokenizer(change(embedded, **fields)).encode(2000 * "a"))
