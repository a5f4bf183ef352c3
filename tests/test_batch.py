"""Many prompts: each says what it says alone, rows are kept full, and a file is answered once whatever stops it."""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import coreinfer_jax as ci
from coreinfer_jax import device
from coreinfer_jax.cli import main
from coreinfer_jax.engine import batching, programs
from coreinfer_jax.engine.batching import Finished, Prompt, generate_many
from coreinfer_jax.io import loading
from coreinfer_jax.io.batch_output import settings_path
from coreinfer_jax.sparsity.choosers import Core
from tests import test_linear, test_linear_groups, test_prediction
from tests.stand_ins import tale
from tests.support import LLAMA, OPT, random_model, with_mlps_on_host

RNG = np.random.default_rng(11)


def words(length: int) -> list[int]:
    return RNG.integers(3, 101, length).tolist()


# All of one capacity; of two, in no order.
PROMPTS = [words(length) for length in (5, 17, 40, 9, 30, 4, 12)]
UNEVEN = [words(length) for length in (5, 60, 17, 70, 9)]
NEW = 16


def alone(params: ci.Params, prompt: list[int], core: Core, **options: Any) -> list[int]:
    out = ci.generate(params, [prompt], core, **{"max_new_tokens": NEW} | options)
    return out.tokens[0, : out.lengths[0]].tolist()


def many(params: ci.Params, core: Core = None, rows: int = 3, **options: Any) -> dict[int, list[int]]:
    finished = list(generate_many(params, PROMPTS, core, rows=rows, **{"max_new_tokens": NEW} | options))
    assert Counter(one.prompt.index for one in finished) == Counter(range(len(PROMPTS)))
    return {one.prompt.index: one.tokens.tolist() for one in finished}


AUTO = replace(test_prediction.STEADY, beta=0.5, gamma=0.25)
# Params, way of choosing, groups.
WAYS: dict[str, Callable[[], tuple[ci.Params, Core, ci.Groups | None]]] = {
    "all neurons": lambda: (random_model(LLAMA), None, None),
    "own neurons": lambda: (random_model(OPT), ci.CoreConfig(beta=0.4), None),
    "some layers, no offsets": lambda: (
        random_model(OPT),
        replace(ci.CoreConfig.paper(), beta=0.4, layers=(0.3, 1.0)),
        None,
    ),
    "linear neurons": lambda: (test_linear.explained(random_model(OPT)), ci.CoreConfig(beta=0.5), None),
    "similarity": lambda: (random_model(OPT), ci.Similarity(gamma=0.5), test_prediction.groups()),
    "fused": lambda: (
        random_model(OPT),
        test_prediction.FUSED,
        test_prediction.groups(test_prediction.FUSED, compacted=False),
    ),
    "similarity, linear neurons": lambda: (
        test_linear_groups.known(),
        test_prediction.SIMILARITY,
        test_linear_groups.groups(),
    ),
    # Its prompts keep different numbers of neurons, which asks for two states.
    "auto": lambda: (random_model(OPT), AUTO, test_prediction.groups(AUTO, compacted=False)),
}


QUICK = ("own neurons", "auto")


@pytest.mark.parametrize(
    "way", [*QUICK, *(pytest.param(way, marks=pytest.mark.slow) for way in WAYS if way not in QUICK)]
)
def test_each_prompt_says_what_it_says_alone(way: str) -> None:
    params, core, groups = WAYS[way]()
    expected = {i: alone(params, prompt, core, groups=groups) for i, prompt in enumerate(PROMPTS)}
    assert many(params, core, groups=groups) == expected


def test_given_neurons_serve_all_prompts() -> None:
    params = random_model(OPT)
    given = ci.generate(params, [PROMPTS[0]], ci.CoreConfig(beta=0.4), max_new_tokens=1).core
    assert given is not None
    shared = given.row(0)
    assert many(params, shared)[3] == alone(params, PROMPTS[3], shared)


def test_draws_follow_from_key_and_index_whatever_runs_beside() -> None:
    params, key = random_model(OPT), jax.random.key(5)
    drawn = {"temperature": 0.9, "top_k": 30, "repetition_penalty": 1.2}
    at_once = many(params, rows=3, key=5, **drawn)
    for i in (0, 3, 6):
        assert at_once[i] == alone(params, PROMPTS[i], None, key=jax.random.fold_in(key, i), **drawn)
    rest = [Prompt(i, PROMPTS[i]) for i in (6, 1)]
    later = generate_many(params, rest, None, rows=3, max_new_tokens=NEW, key=5, **drawn)
    assert {one.prompt.index: one.tokens.tolist() for one in later} == {i: at_once[i] for i in (6, 1)}


def test_prompts_differ_in_options_and_ends() -> None:
    params = random_model(OPT)
    full = alone(params, PROMPTS[0], None)
    end = full[4]
    first = full.index(end) + 1
    prompts = [
        Prompt(0, PROMPTS[0], {"eos_ids": (end,)}),
        Prompt(1, PROMPTS[0], {"max_new_tokens": 3}),
        Prompt(2, PROMPTS[0], {"temperature": 0.9, "key": 4}),
        Prompt(3, PROMPTS[0], {"max_new_tokens": 1}),
        Prompt(4, PROMPTS[0]),
    ]
    asked: list[int] = []

    def is_over(prompt: Prompt, tokens: list[int]) -> bool:
        asked.append(prompt.index)
        return prompt.index == 4 and len(tokens) == 7

    made = {
        one.prompt.index: one for one in generate_many(params, prompts, None, rows=3, until=is_over, max_new_tokens=NEW)
    }
    assert made[0].tokens.tolist() == full[:first]
    assert made[1].tokens.tolist() == full[:3]
    assert made[2].tokens.tolist() == alone(params, PROMPTS[0], None, temperature=0.9, key=4)
    assert made[3].tokens.tolist() == full[:1]
    assert made[4].tokens.tolist() == full[:7]
    assert [made[i].reason for i in range(5)] == ["stop", "length", "length", "length", "stop"]
    assert Counter(asked)[4] == 7


class Watched:
    """Counts rows at work in each step of a running state."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[int] = []
        self.inserted = 0
        for name in ("advance", "insert_request"):
            monkeypatch.setattr(batching, name, self._watched(name, getattr(batching, name)))

    def _watched(self, name: str, own: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            result = own(*arguments)
            if name == "advance":
                _, tokens, lengths = result
                self.steps += [int((lengths > step).sum()) for step in range(tokens.shape[1])]
            else:
                self.inserted += 1
            return result

        return call


def test_rows_are_kept_full(monkeypatch: pytest.MonkeyPatch) -> None:
    params, watched = random_model(OPT), Watched(monkeypatch)
    # After the first token, 4 .. 34 steps each: taken three at a time in turns, some would wait for the longest.
    prompts = [Prompt(i, words(6), {"max_new_tokens": new}) for i, new in enumerate([5, 35, 9, 12, 30, 6, 20, 8, 17])]
    made = list(generate_many(params, prompts, None, rows=3))
    asked = [len(one.tokens) - 1 for one in made]
    assert watched.inserted == len(prompts)
    assert sum(watched.steps) == sum(asked) == 133
    # A row is idle only once no prompt waits.
    full = watched.steps.index(next(rows for rows in watched.steps if rows < 3))
    assert all(rows == 3 for rows in watched.steps[:full])
    assert len(watched.steps) - full <= max(asked)
    assert len(watched.steps) < 60


def test_lengths_are_sorted_and_no_program_is_compiled_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    params = random_model(OPT)
    started: list[int] = []
    start = batching.start
    monkeypatch.setattr(batching, "start", lambda *a, **k: (started.append(a[2]), start(*a, **k))[1])
    expected = [alone(params, prompt, None) for prompt in UNEVEN]

    def made() -> list[list[int]]:
        finished = generate_many(params, UNEVEN, None, rows=3, max_new_tokens=NEW)
        return [one.tokens.tolist() for one in sorted(finished, key=lambda one: one.prompt.index)]

    assert made() == expected
    assert started == [64, 128]
    before = {name: getattr(programs, name)._cache_size() for name in ("insert", "decode", "prefill")}
    assert made() == expected
    assert before == {name: getattr(programs, name)._cache_size() for name in before}


def test_prompts_are_read_as_they_are_needed_and_none_waits_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "WINDOW", 4)
    read: list[int] = []

    def endless() -> Iterator[list[int]]:
        while True:
            read.append(len(read))
            yield words(90 if len(read) == 2 else 6)

    made: list[Finished] = []
    for one in generate_many(random_model(OPT), endless(), None, rows=3, max_new_tokens=2):
        made.append(one)
        if one.prompt.index == 1:
            break
    assert len(made) <= 7
    assert len(read) <= 11


def test_what_cannot_be_run_is_refused() -> None:
    params = random_model(OPT)
    mistakes = {
        "rows=0": lambda: generate_many(params, PROMPTS, rows=0),
        "top_k=0": lambda: generate_many(params, PROMPTS, top_k=0),
        "groups": lambda: generate_many(params, PROMPTS, ci.Similarity()),
        "without mlps_on_host": lambda: generate_many(with_mlps_on_host(params), PROMPTS),
        "lossless=True: ": lambda: next(generate_many(params, PROMPTS, lossless=True)),
        "regather_at=0.0: ": lambda: next(generate_many(params, PROMPTS, regather_at=0.0)),
        "max_new_tokens=200 exceed": lambda: next(generate_many(params, PROMPTS, max_new_tokens=200)),
        "index=-1": lambda: Prompt(-1, [3]),
        "index=4294967296: give at most": lambda: Prompt(2**32, [3]),
    }
    for message, mistake in mistakes.items():
        with pytest.raises(ci.CoreInferError, match=message):
            mistake()


# ---------------------------------------------------------------------------- files

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def work(tmp_path: Path) -> Path:
    lines: list[dict[str, Any]] = [{"prompt": tale(i)[: 20 + 30 * (i % 4)]} for i in range(12)]
    lines[2]["id"], lines[3]["id"] = "third", 4
    lines[5]["max_new_tokens"] = 2
    write(tmp_path / "in.jsonl", lines)
    return tmp_path


def write(path: Path, lines: list[Any]) -> None:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))


def arguments(work: Path, model: Path, *options: object, source: str = "in.jsonl", out: str = "out.jsonl") -> list[str]:
    places = ["batch", "--input", work / source, "--output", work / out, "--model", model]
    return [str(one) for one in (*places, "--max-new-tokens", 8, "--rows", 3, *options)]


@pytest.fixture
def batch(work: Path, shallow: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> Run:
    """`coreinfer batch` of a small model, greedy: its status, and what it says."""

    def run(*options: object, **places: str) -> tuple[int, str]:
        status = main(arguments(work, shallow["opt"], "--temperature", 0, *options, **places))
        return status, capsys.readouterr().err

    return run


def read(path: Path) -> dict[int, dict[str, Any]]:
    """The answers by line; each once."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    by_line = {one["line"]: one for one in found}
    assert len(found) == len(by_line)
    return by_line


def test_answers_are_those_of_generate(batch: Run, work: Path, shallow: dict[str, Path]) -> None:
    status, told = batch("--beta", 0.5, "--stop", " the")
    assert status == 0, told
    params, tokenizer = ci.load(shallow["opt"], "float32")
    assert tokenizer is not None
    made = read(work / "out.jsonl")
    assert sorted(made) == list(range(1, 13))
    assert [made[i].get("id") for i in range(2, 6)] == [None, "third", 4, None]
    for number, line in enumerate((work / "in.jsonl").read_text().splitlines(), start=1):
        asked = json.loads(line)
        prompt = tokenizer.encode(asked["prompt"])
        new = asked.get("max_new_tokens", 8)
        tokens = alone(params, prompt, ci.CoreConfig(beta=0.5), max_new_tokens=new, eos_ids=params.config.eos_ids)
        text = tokenizer.decode(prompt + tokens).removeprefix(tokenizer.decode(prompt))
        assert made[number]["text"] == text.partition(" the")[0].rstrip("\N{REPLACEMENT CHARACTER}")
        assert made[number]["reason"] == ("stop" if " the" in text or 2 in tokens else "length")
        assert made[number]["kept"] == pytest.approx(0.5, abs=0.01)
    assert " tokens/s (compiling included)]" in told


def test_a_run_that_was_stopped_goes_on(batch: Run, work: Path) -> None:
    drawn = ("--temperature", 0.9, "--seed", 3)
    batch(*drawn)
    whole = (work / "out.jsonl").read_text()
    lines = whole.splitlines(keepends=True)
    for kept in ("".join(lines[:5]), "".join(lines[:5]) + lines[5][:-1], "".join(lines[:7]) + lines[7][:9]):
        (work / "out.jsonl").write_text(kept)
        status, told = batch(*drawn)
        assert status == 0
        assert (", 5 were there already" in told) == (kept.count("\n") == 5)
        assert sorted((work / "out.jsonl").read_text().splitlines()) == sorted(whole.splitlines())
    status, told = batch(*drawn)
    assert (status, told.count("[0 lines answered, 12 were there already")) == (0, 1)


def test_in_order(batch: Run, work: Path) -> None:
    batch()
    batch("--in-order", out="ordered.jsonl")
    written = (work / "ordered.jsonl").read_text()
    assert [json.loads(line)["line"] for line in written.splitlines()] == list(range(1, 13))
    assert read(work / "ordered.jsonl") == read(work / "out.jsonl")
    assert list(read(work / "out.jsonl")) != list(range(1, 13))
    (work / "ordered.jsonl").write_text(written[: len(written) // 2])
    batch("--in-order", out="ordered.jsonl")
    assert (work / "ordered.jsonl").read_text() == written


BAD = {
    "": "not valid JSON",
    "[1]": r"\[1\]: give a JSON object",
    '{"promt": "a"}': "unknown field 'promt'",
    '{"prompt": "a", "messages": []}': "give either 'prompt'",
    '{"id": 1}': "give either 'prompt'",
    '{"prompt": ""}': "prompt='': give a text",
    '{"prompt": 5}': "prompt=5: give a text",
    '{"prompt": "\\ud800"}': "half of a surrogate pair",
    '{"messages": [{"role": "user"}]}': "give an object with 'role' and 'content'",
    '{"prompt": "a", "max_new_tokens": 0}': "max_new_tokens=0: give",
    '{"prompt": "a", "id": true}': "id=True: give a text or a number",
    '{"prompt": "b", "id": "first"}': "id='first': an earlier line has it too",
    '{"messages": [{"role": "user", "content": "Hi"}]}': "no chat template",
    json.dumps({"prompt": "one two " * 300}): "exceed the model's 512 positions",
    '{"prompt": "a", "max_new_tokens": 512}': "exceed the model's 512 positions",
}


def test_bad_lines(batch: Run, work: Path) -> None:
    write(work / "bad.jsonl", [{"prompt": "Once", "id": "first"}, *BAD, {"prompt": "Twice"}])
    status, told = batch(source="bad.jsonl")
    assert (status, told.count("\n")) == (2, 1)
    assert "bad.jsonl: line 2: not valid JSON" in told
    assert not (work / "out.jsonl").exists()
    status, told = batch("--skip-bad", source="bad.jsonl")
    assert status == 0
    made = read(work / "out.jsonl")
    assert sorted(made) == list(range(1, len(BAD) + 3))
    assert {1, len(BAD) + 2} == {number for number, answer in made.items() if "text" in answer}
    for number, message in enumerate(BAD.values(), start=2):
        with pytest.raises(ValueError, match=message):
            raise ValueError(made[number]["error"])
        assert f"[line {number}: " in told
    assert f"[{len(made)} lines answered, {len(BAD)} of them bad; " in told


def test_a_line_that_is_too_long_for_the_model_stops_the_rest(batch: Run, work: Path) -> None:
    write(work / "long.jsonl", [{"prompt": "Once"}, {"prompt": "a", "max_new_tokens": 512}])
    status, told = batch(source="long.jsonl")
    assert status == 2
    assert "long.jsonl: line 2: " in told.splitlines()[-1]


def test_lines_without_memory_are_bad_ones(batch: Run, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that needs too much by itself, one in so many rows; in KB: 590 for 3 rows of 64, 1180 for one of 256."""
    asked = [{"prompt": "Once", "id": "a"}, {"prompt": "Twice", "max_new_tokens": 480, "id": "b"}]
    asked += [{"prompt": "Thrice", "max_new_tokens": 200}, {"prompt": "Four"}]
    write(work / "in.jsonl", asked)
    monkeypatch.setattr(loading, "check_memory", lambda *_: None)
    monkeypatch.setattr(device, "free_bytes", lambda: 1_500_000)
    status, told = batch()
    assert status == 2
    assert re.search(r"line \d: .* GB are free; ask for fewer .*; correct it, or pass over", told.splitlines()[-1])
    status, told = batch("--skip-bad")
    assert status == 0
    made = read(work / "out.jsonl")
    assert (made[2]["id"], made[2]["error"][:26]) == ("b", "a cache of 512 positions, ")
    assert made[3]["error"].startswith("3 rows of 256 positions: ")
    assert ["text" in made[number] for number in (1, 4)] == [True, True]
    assert all(f"[line {number}: {made[number]['error']}]" in told for number in (2, 3))


def test_a_prompt_that_has_no_place_beside_others_waits_for_their_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that penalise are of another kind: where there is no memory for both, one comes after the other."""
    params = random_model(OPT)
    prompts = [Prompt(i, [5, 6, 7 + i], {"repetition_penalty": 1.5} if i % 2 else {}) for i in range(4)]
    alive: list[weakref.ref[object]] = []
    begin_lane = batching._Lane.__init__

    def begun(lane: object, *arguments: object) -> None:
        if any(one() is not None for one in alive):
            raise ci.CoreInferError("no memory")
        alive.append(weakref.ref(lane))
        begin_lane(lane, *arguments)

    monkeypatch.setattr(batching._Lane, "__init__", begun)
    made = {one.prompt.index: one.tokens.tolist() for one in generate_many(params, prompts, None, max_new_tokens=6)}
    for prompt in prompts:
        assert made[prompt.index] == alone(params, prompt.tokens, None, max_new_tokens=6, **prompt.options)
    assert len(alive) > 1


def test_other_work_is_not_mixed_in(batch: Run, work: Path, shallow: dict[str, Path]) -> None:
    assert batch()[0] == 0
    out, lines = work / "out.jsonl", (work / "in.jsonl").read_text()
    before = out.read_text()
    (work / "foreign.jsonl").write_text("mine\n")
    os.mkfifo(work / "pipe")
    changed = {
        "(max_new_tokens)": lambda: batch("--max-new-tokens", 9),
        "(core)": lambda: batch("--beta", 0.5),
        "(sampling)": lambda: batch("--temperature", 0.5),
        "(in_order)": lambda: batch("--in-order"),
        "(stop)": lambda: batch("--stop", "x"),
        "dtype": lambda: batch("--dtype", "bfloat16"),
        "model": lambda: batch("--model", shallow["llama"]),
        "foreign.jsonl.settings.json is not beside it": lambda: batch(out="foreign.jsonl"),
        "is the input": lambda: batch(out="in.jsonl"),
        "no such file": lambda: batch(source="nowhere.jsonl"),
        "no regular file": lambda: batch(out="pipe"),
    }
    for message, attempt in changed.items():
        status, told = attempt()
        assert status == 2, message
        assert message.lower() in told.splitlines()[-1].lower()
    (work / "in.jsonl").write_text(lines + '{"prompt": "more"}\n')
    assert "(input)" in batch()[1]
    (work / "in.jsonl").write_text(lines)
    first = before.splitlines(keepends=True)[0]
    for damage, message in {
        before + first: "a second time",
        before + '{"line": 99}\n': "answers line 99",
        "{\n" + before: "line 1 is damaged",
    }.items():
        out.write_text(damage)
        status, told = batch()
        assert (status, message in told) == (2, True)
        assert out.read_text() == damage
    out.write_text(before)
    settings_path(out).write_text("[]")
    assert batch()[0] == 2


START = "import sys; from coreinfer_command import main; sys.exit(main())"


@pytest.mark.parametrize("killed_after", [1, pytest.param(12, marks=pytest.mark.slow)])
def test_kill_in_the_middle_loses_and_repeats_nothing(
    killed_after: int, work: Path, shallow: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [{"prompt": tale(i)[:40]} for i in range(24)]
    write(work / "in.jsonl", lines)
    drawn = ("--temperature", 0.8, "--max-new-tokens", 24, "--rows", 3)
    out = work / "out.jsonl"
    command = [sys.executable, "-c", START, *arguments(work, shallow["opt"], *drawn)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not (out.exists() and out.read_bytes().count(b"\n") >= killed_after):
            time.sleep(0.002)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    there = out.read_bytes().count(b"\n")
    assert killed_after <= there < len(lines)
    assert main(arguments(work, shallow["opt"], *drawn)) == 0
    assert f", {there} were there already" in capsys.readouterr().err
    assert main(arguments(work, shallow["opt"], *drawn, out="whole.jsonl")) == 0
    assert len(read(out)) == len(lines)
    assert read(out) == read(work / "whole.jsonl")


def test_two_at_a_time_do_not_write_one_file(batch: Run, work: Path) -> None:
    batch()
    with (work / "out.jsonl").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        status, told = batch()
    assert (status, "another batch writes it" in told) == (2, True)


# ---------------------------------------------------------------------------- Ray


# A process of its own: Ray warns, and forks.
TWO_WORKERS = """
import sys
from coreinfer_jax.cli import main, on_ray
on_ray.set_up()
import ray
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_cluster_gives_the_same_answers(batch: Run, work: Path, shallow: dict[str, Path]) -> None:
    pytest.importorskip("ray")
    lines = [json.loads(line) for line in (work / "in.jsonl").read_text().splitlines()]
    write(work / "more.jsonl", [*lines, "no JSON", {"prompt": "a", "max_new_tokens": 512}, *lines[6:], *lines[6:]])
    shared = ("--skip-bad", "--temperature", 0.9, "--seed", 1)
    assert batch(*shared, source="more.jsonl")[0] == 0
    on_cluster = ("--ray", "--workers", 2, "--rows", 1)

    def together(*options: object) -> tuple[int, str]:
        asked = arguments(work, shallow["opt"], *options, *on_cluster, source="more.jsonl", out="ray.jsonl")
        ended = subprocess.run([sys.executable, "-c", TWO_WORKERS, *asked], capture_output=True, text=True, check=False)
        return ended.returncode, ended.stderr

    status, told = together(*shared)
    assert status == 0, told
    assert read(work / "ray.jsonl") == read(work / "out.jsonl")
    some = (work / "ray.jsonl").read_text().splitlines(keepends=True)[:6]
    (work / "ray.jsonl").write_text("".join(some))
    status, told = together(*shared)
    assert (status, ", 6 were there already" in told) == (0, True)
    assert read(work / "ray.jsonl") == read(work / "out.jsonl")


def test_options_of_a_cluster(batch: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from coreinfer_jax.cli import on_ray

    monkeypatch.setattr(on_ray, "find_spec", lambda name: None)
    for message, options in {
        "--workers 2: are of --ray": ("--workers", 2),
        "--ray local: pip install": ("--ray",),
        "--workers=0": ("--ray", "--workers", 0),
    }.items():
        status, told = batch(*options)
        assert (status, message in told) == (2, True)
