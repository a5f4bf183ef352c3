"""Tokenizers against the libraries they come from; the text of growing continuations; stop strings."""

import shutil
from itertools import pairwise, product
from pathlib import Path

import pytest
import sentencepiece
import transformers

import coreinfer_jax as ci
from coreinfer_jax.text import REPLACEMENT, Tokenizer, continuation, load_tokenizer, settled

TEXTS = [
    "Hello world",
    " leading space",
    "two  spaces   three",
    "trailing  ",
    "line\nbreak\n\nand\ttab",
    "Ünïcödé, 日本語のテキスト。",
    "🙂👩‍👩‍👧 e\u0301",
    "<s></s>",
    "42 + 1.5e-3 = ?",
]
ROUND_TRIPS = [
    "The children played. 日本語のテキスト, and then 🙂🙃👩‍👩‍👧 they went home\nquietly.",
    "🙂" * 6 + " ends in a family 👩‍👩‍👧",
    "龘龘龘 rare 𓂀𓃠,  twice  spaced",
]


@pytest.fixture(scope="module")
def sentencepiece_directory(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("llama2")
    shutil.copyfile(data / "tokenizers" / "llama2.model", directory / "tokenizer.model")
    return directory


@pytest.fixture(scope="module")
def tokenizers(data: Path, tinystories: Path, sentencepiece_directory: Path) -> dict[str, Tokenizer | None]:
    return {
        "opt": load_tokenizer(data / "tokenizers" / "opt"),
        "tinystories": load_tokenizer(tinystories),
        "llama2": load_tokenizer(sentencepiece_directory),
    }


@pytest.mark.parametrize("text", ["", *TEXTS])
def test_sentencepiece_ids(tokenizers, sentencepiece_directory, text):
    reference = sentencepiece.SentencePieceProcessor(str(sentencepiece_directory / "tokenizer.model"))
    ids = tokenizers["llama2"].encode(text)
    assert ids == [1, *reference.encode(text)]
    assert tokenizers["llama2"].decode(ids) == text


@pytest.mark.parametrize("name", ["opt", "tinystories"])
def test_transformers_ids(tokenizers, data, tinystories, name):
    directory = {"opt": data / "tokenizers" / "opt", "tinystories": tinystories}[name]
    reference = transformers.AutoTokenizer.from_pretrained(directory)
    for text in ["", *TEXTS]:
        assert tokenizers[name].encode(text) == reference(text)["input_ids"], text


# From the docstrings of transformers' tokenizers; OPT's BPE is RoBERTa's with another BOS.
@pytest.mark.parametrize(
    ("name", "text", "ids"),
    [
        ("opt", "Hello world", [2, 31414, 232]),
        ("opt", " Hello world", [2, 20920, 232]),
        ("llama2", "Hello this is a test", [1, 15043, 445, 338, 263, 1243]),
    ],
)
def test_published_ids(tokenizers, name, text, ids):
    assert tokenizers[name].encode(text) == ids
    assert tokenizers[name].decode(ids) == text


@pytest.mark.parametrize("names", [[], ["tokenizer_config.json"], ["vocab.json"], ["README.md"]], ids=str)
def test_directories_without_a_tokenizer(tmp_path, names):
    for name in names:
        (tmp_path / name).write_text("{}")
    assert load_tokenizer(tmp_path) is None


@pytest.mark.parametrize("content", [b"", b"{}", b"\0" * 100, b"\xff\xfe" * 50], ids=["empty", "{}", "zeros", "noise"])
@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
def test_corrupt_tokenizers(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ci.CoreInferError) as caught:
        load_tokenizer(tmp_path)
    assert str(caught.value).startswith(str(tmp_path))
    assert str(caught.value).endswith("download it again")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["llama2", "tinystories"])
def test_truncated_tokenizers(tmp_path, sentencepiece_directory, tinystories, source):
    file = {"llama2": sentencepiece_directory / "tokenizer.model", "tinystories": tinystories / "tokenizer.json"}[
        source
    ]
    (tmp_path / file.name).write_bytes(file.read_bytes()[:50_000])
    with pytest.raises(ci.CoreInferError, match="download it again"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("text", ROUND_TRIPS)
@pytest.mark.parametrize("name", ["opt", "llama2"])
def test_text_streams_without_broken_characters_or_retractions(tokenizers, name, text):
    """Every way to cut a text into a prompt and new tokens, the new ones coming one by one."""
    tokenizer = tokenizers[name]
    ids = tokenizer.encode(text)
    for cut in range(2, len(ids)):
        prompt = tokenizer.decode(ids[:cut])
        if prompt.endswith(REPLACEMENT):
            continue  # prompts are whole texts and never end within a character
        printed = ""
        for end in range(cut + 1, len(ids) + 1):
            ready, stopped = settled(continuation(tokenizer, ids[:cut], ids[cut:end]), [])
            assert ready.startswith(printed)
            assert REPLACEMENT not in ready
            assert not stopped
            printed = ready
        assert prompt + printed == text


@pytest.mark.parametrize("stop", [".", "\n\n", "<END>", "aab", "🙂!", "日本"])
def test_a_stop_string_split_anywhere(stop):
    text = "aaaaa <EN> 日 🙂 and" + stop + "never shown" + stop
    before = text[: text.index(stop)]
    for end in range(len(text) + 1):
        ready, stopped = settled(text[:end], [stop])
        assert stopped == (end >= len(before) + len(stop))
        assert ready == before if stopped else before.startswith(ready)
        assert stopped or stop.startswith(text[len(ready) : end])  # nothing else is held back


@pytest.mark.parametrize(
    "stops", [["aab"], ["ab", "bb"], ["abab", "ba"], ["aba", "b"], ["abb", "bbb", "aaaa"]], ids=str
)
def test_where_text_stops_does_not_depend_on_how_it_arrives(stops):
    for letters in product("ab", repeat=7):
        text = "".join(letters)
        arrived = [settled(text[:end], stops) for end in range(len(text) + 1)]
        printed = [ready for ready, _ in arrived]
        first = next((ready for ready, stopped in arrived if stopped), None)
        assert first is None or printed[-1] == first, text
        assert all(later.startswith(earlier) for earlier, later in pairwise(printed)), text
        assert not any(stop in ready for ready in printed for stop in stops), text


def test_an_incomplete_character_is_held_back():
    assert settled("abc" + REPLACEMENT * 3, []) == ("abc", False)
    assert settled("a<E" + REPLACEMENT, ["<END>"]) == ("a", False)


def test_ids_beyond_a_sentencepiece_model_decode_to_nothing(data, tmp_path):
    shutil.copyfile(data / "tokenizers" / "llama2.model", tmp_path / "tokenizer.model")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode([1, 15043, 32000, 3186]) == "Hello world"
