"""Continuations that grow token by token: what is shown is never broken, never taken back; stop strings."""

import json
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path

import pytest
import sentencepiece
import transformers

from coreinfer_jax.text import REPLACEMENT, Tokenizer, continuation, load_tokenizer, settled

ROUND_TRIPS = [
    "The children played. 日本語のテキスト, and then 🙂🙃👩‍👩‍👧 they went home\nquietly.",
    "🙂" * 6 + " ends in a family 👩‍👩‍👧",
    "龘龘龘 rare 𓂀𓃠,  twice  spaced",
    "a genuine \N{REPLACEMENT CHARACTER} and \N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}🙂 more",
]


@dataclass(frozen=True)
class Case:
    """A tokenizer, the text its library makes of ids, its number of tokens, and those of its tokens that are bytes."""

    tokenizer: Tokenizer
    decode: Callable[[Sequence[int]], str]
    size: int
    bytes: Sequence[int]


@pytest.fixture(scope="module")
def cases(data: Path, tinystories: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    llama2 = tmp_path_factory.mktemp("llama2")
    shutil.copyfile(data / "tokenizers" / "llama2.model", llama2 / "tokenizer.model")
    processor = sentencepiece.SentencePieceProcessor(str(llama2 / "tokenizer.model"))
    # The same vocabulary as a tokenizer.json alone: another decoder, which falls back to bytes as well.
    converted = tmp_path_factory.mktemp("converted")
    transformers.LlamaTokenizer.from_pretrained(llama2).save_pretrained(converted)
    opt = data / "tokenizers" / "opt"
    vocabulary = json.loads((opt / "vocab.json").read_text())
    one_byte = [i for token, i in vocabulary.items() if len(token) == 1]
    return {
        "llama2": Case(load_tokenizer(llama2), processor.decode, len(processor), range(3, 259)),
        "converted": Case(load_tokenizer(converted), reference_decode(converted), len(processor), range(3, 259)),
        "opt": Case(load_tokenizer(opt), reference_decode(opt), len(vocabulary), one_byte),
        "tinystories": Case(load_tokenizer(tinystories), reference_decode(tinystories), 2048, []),
    }


def reference_decode(directory: Path) -> Callable[[Sequence[int]], str]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    return lambda ids: tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def stream(tokenizer: Tokenizer, prompt: list[int], new: list[int], sizes: random.Random) -> list[str]:
    """The pieces that are printed when tokens come in chunks of random sizes, the rest in the end."""
    pieces, printed, end = [], "", 0
    while end < len(new):
        end += sizes.randint(1, 5)
        text = continuation(tokenizer, prompt, new[:end])
        ready, stopped = settled(text, [])
        assert not stopped
        assert text.startswith(ready)
        assert ready.startswith(printed), (prompt, new[:end])
        pieces.append(ready[len(printed) :])
        printed = ready
    return [*pieces, text[len(printed) :]]


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("name", ["opt", "tinystories", "llama2", "converted"])
def test_random_tokens_stream_into_their_text(cases, name, seed):
    """Any tokens at all, in runs of words and runs of bytes that are sometimes characters and mostly not."""
    case, rng = cases[name], random.Random(seed)
    new: list[int] = []
    for _ in range(rng.randint(1, 12)):
        source = case.bytes if case.bytes and rng.random() < 0.5 else range(case.size)
        new += rng.choices(source, k=rng.randint(1, 12))
        if rng.random() < 0.5:
            new += case.tokenizer.encode(rng.choice(["🙂🙃", "日本", "龘", " 𓂀", "é"]))
    prompt = case.tokenizer.encode(rng.choice(["Hello", "Two words", "日本語 🙂", "  spaced  "]))
    full = case.tokenizer.decode([*prompt, *new])[len(case.tokenizer.decode(prompt)) :]
    pieces = stream(case.tokenizer, prompt, new, rng)
    assert "".join(pieces) == full
    if name != "converted":  # its library spoils whole characters beside broken ones
        assert full == case.decode([*prompt, *new])[len(case.decode(prompt)) :]


@pytest.mark.parametrize("text", ROUND_TRIPS)
@pytest.mark.parametrize("name", ["opt", "llama2", "converted"])
def test_texts_stream_whole(cases, name, text):
    """Every way to cut a text into a prompt and new tokens, in chunks of random sizes."""
    tokenizer = cases[name].tokenizer
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == cases[name].decode(ids) == text
    for cut in range(2, len(ids)):
        prompt = tokenizer.decode(ids[:cut])
        if not text.startswith(prompt):
            continue  # prompts are whole texts and never end within a character
        pieces = stream(tokenizer, ids[:cut], ids[cut:], random.Random(cut))
        assert prompt + "".join(pieces) == text
        broken = sum(piece.count(REPLACEMENT) for piece in pieces)
        assert broken == text[len(prompt) :].count(REPLACEMENT)


def test_characters_are_shown_as_soon_as_they_are_complete(cases):
    for name in ("opt", "llama2", "converted"):
        tokenizer = cases[name].tokenizer
        prompt, new = tokenizer.encode("Faces:"), tokenizer.encode("Faces:🙂🙃🙂🙃")
        new = new[len(prompt) :]
        shown = [settled(continuation(tokenizer, prompt, new[:end]), [])[0] for end in range(1, len(new) + 1)]
        assert {"", "🙂", "🙂🙃", "🙂🙃🙂", "🙂🙃🙂🙃"} == set(shown), name


@pytest.mark.parametrize("name", ["opt", "llama2", "converted"])
def test_a_model_that_writes_broken_bytes_for_ever_is_shown(cases, name):
    """Only what may still become a character is held back, not everything."""
    tokenizer = cases[name].tokenizer
    prompt, smile = tokenizer.encode("x"), tokenizer.encode("x🙂")
    broken = [smile[-1]] * 50  # the last byte of a character, over and over
    text, (ready, _) = (value := continuation(tokenizer, prompt, broken)), settled(value, [])
    assert set(text) == {REPLACEMENT}
    assert len(ready) >= len(text) - 3


def test_a_prompt_that_ends_within_a_character_hides_no_later_text(cases):
    tokenizer = cases["llama2"].tokenizer
    ids = tokenizer.encode("x🙂🙃 end")
    assert continuation(tokenizer, ids[:4], ids[4:]).endswith("🙃 end")


@pytest.mark.parametrize("stop", [".", "\n\n", "<END>", "aab", "🙂!", "日本"])
def test_a_stop_string_split_anywhere(stop):
    text = "aaaaa <EN> 日 🙂 and" + stop + "never shown" + stop
    before = text[: text.index(stop)]
    for end in range(len(text) + 1):
        ready, stopped = settled(text[:end], [stop])
        assert stopped == (end >= len(before) + len(stop))
        assert ready == before if stopped else before.startswith(ready)
        assert stopped or stop.startswith(text[len(ready) : end])  # nothing else is held back


@pytest.mark.parametrize("stop", ["日本", "🙂🙃", "ends in", " twice  sp", "𓃠,", "\nquietly", "E"])
@pytest.mark.parametrize("name", ["opt", "llama2", "converted"])
def test_a_stop_string_across_tokens(cases, name, stop):
    """The text up to the stop string is shown, whole, however the chunks fall and wherever tokens cut it."""
    tokenizer = cases[name].tokenizer
    for text in ROUND_TRIPS:
        ids, sizes = tokenizer.encode("Q: " + text), random.Random(text)
        prompt = tokenizer.encode("Q:")
        assert ids[: len(prompt)] == prompt
        printed, stopped, end = "", False, len(prompt)
        while end < len(ids) and not stopped:
            end += sizes.randint(1, 4)
            grown = continuation(tokenizer, prompt, ids[len(prompt) : end])
            ready, stopped = settled(grown, [stop, "never there"])
            assert ready.startswith(printed)
            printed = ready
        printed = printed if stopped else grown
        assert stopped == (stop in text)
        assert printed == " " + text.partition(stop)[0]


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


def test_an_incomplete_character_is_no_stop_string():
    assert settled("abc" + REPLACEMENT, [REPLACEMENT]) == ("abc", False)
    assert settled("abc" + REPLACEMENT + "and", [REPLACEMENT]) == ("abc", True)
