"""Requests put into rows of a running state: each says what it says alone, and nothing is retraced."""

from dataclasses import dataclass, replace

import numpy as np
import pytest

import coreinfer_jax as ci
from coreinfer_jax.engine import programs
from coreinfer_jax.engine.generation import make_request
from coreinfer_jax.engine.loop import begin
from coreinfer_jax.engine.running import Running, advance, insert_request, start
from coreinfer_jax.sparsity import narrow
from coreinfer_jax.sparsity.choosers import Core
from tests.support import MODELS, one_quick_in, random_model
from tests.test_compilation import traced

RNG = np.random.default_rng(3)
VOTES = ci.CoreConfig.paper()


def words(length: int) -> list[int]:
    return RNG.integers(3, 101, length).tolist()


@dataclass(frozen=True)
class Asked:
    """A request: its prompt and options."""

    prompt: list[int]
    options: dict[str, object]


# Lengths, temperatures, EOS sets, seeds, budgets and penalties all differ; rows of the state serve two of them in turn.
REQUESTS = [
    Asked(words(5), {"max_new_tokens": 30}),
    Asked(words(40), {"max_new_tokens": 12, "temperature": 0.8, "top_k": 9, "key": 4}),
    Asked(words(17), {"max_new_tokens": 25, "temperature": 1.1, "top_p": 0.7, "key": 5, "eos_ids": tuple(range(40))}),
    Asked(words(30), {"max_new_tokens": 20, "eos_ids": tuple(range(50, 90))}),
    Asked(words(9), {"max_new_tokens": 7, "temperature": 0.5, "key": 6}),
    Asked(words(9), {"max_new_tokens": 30, "repetition_penalty": 1.6, "no_repeat_ngram_size": 2}),
]


def alone(params: ci.Params, asked: Asked, core: Core) -> list[int]:
    out = ci.generate(params, [asked.prompt], core, **asked.options)
    return out.tokens[0, : out.lengths[0]].tolist()


class Rows:
    """A running state, and what each of its requests has said so far."""

    def __init__(self, params: ci.Params, rows: int, widths: tuple[int, ...] | None) -> None:
        self.running: Running = start(params, rows, 128, widths)
        self.said: dict[int, list[int]] = {}
        self.of_row: dict[int, int] = {}

    def insert(self, row: int, number: int, core: Core) -> None:
        asked = REQUESTS[number]
        begun = begin(make_request(self.running.params, [asked.prompt], core, asked.options))
        self.said[number], self.of_row[row] = [int(begun.rows.token[0])], number
        self.running = insert_request(self.running, row, begun)

    def advance(self, steps: int) -> None:
        self.running, tokens, lengths = advance(self.running, steps)
        for row, number in self.of_row.items():
            self.said[number] += tokens[row, : lengths[row]].tolist()

    @property
    def busy(self) -> bool:
        return not bool(np.array(self.running.rows.done).all())


CORES = {
    "own neurons": ci.CoreConfig(beta=0.4),
    "votes, no offsets": replace(VOTES, beta=0.4),
    "some layers": ci.CoreConfig(beta=0.4, layers=(0.3, 1.0)),
    "all neurons": None,
}


@pytest.mark.parametrize(
    ("name", "core", "multiple"), [*one_quick_in(4, ["llama", "opt"], CORES, [1]), ("llama", "own neurons", 16)]
)
def test_each_request_says_what_it_says_alone(
    name: str, core: str, multiple: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_says_alone(random_model(MODELS[name]), CORES[core], multiple, monkeypatch)


def check_says_alone(params: ci.Params, core: Core, multiple: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [alone(params, asked, core) for asked in REQUESTS]
    monkeypatch.setattr(narrow, "width_multiple", lambda weight: multiple)  # accelerators pad widths
    kept = ci.generate(params, [REQUESTS[0].prompt], core, max_new_tokens=1).stats.kept_neurons
    rows = Rows(params, 3, None if core is None else kept)
    rows.insert(1, 0, core)
    rows.advance(4)  # alone, beside two free rows
    rows.insert(0, 1, core)
    rows.advance(3)
    rows.insert(2, 2, core)
    while rows.busy:
        rows.advance(8)
    rows.insert(0, 3, core)
    rows.insert(2, 4, core)
    rows.insert(1, 5, core)
    while rows.busy:
        rows.advance(64)
    assert [rows.said[number] for number in range(len(REQUESTS))] == expected


def test_inserting_retraces_nothing_and_leaves_the_other_rows_alone() -> None:
    params, core = random_model(MODELS["llama"]), ci.CoreConfig(beta=0.4)
    kept = ci.generate(params, [REQUESTS[0].prompt], core, max_new_tokens=1).stats.kept_neurons
    rows = Rows(params, 3, kept)
    for row, number in ((0, 0), (1, 1)):  # a greedy request and one that draws
        rows.insert(row, number, core)
    rows.advance(2)
    before = {name: getattr(programs, name)._cache_size() for name in ("insert", "insert_mlps", "decode", "prefill")}
    kept_rows = np.array(rows.running.rows.token)[:2], np.array(rows.running.rows.cache.keys[0])[:2]
    with traced() as messages:
        rows.insert(2, 2, core)
    assert messages == []
    np.testing.assert_array_equal(np.array(rows.running.rows.token)[:2], kept_rows[0])
    np.testing.assert_array_equal(np.array(rows.running.rows.cache.keys[0])[:2], kept_rows[1])
    rows.advance(5)
    rows.insert(1, 4, core)
    assert before == {name: getattr(programs, name)._cache_size() for name in before}


def test_mistakes() -> None:
    params, core = random_model(MODELS["opt"]), ci.CoreConfig(beta=0.4)
    running = start(params, 2, 64)

    def begun(prompts: list[list[int]], core: Core = None, new: int = 4) -> object:
        return begin(make_request(params, prompts, core, {"max_new_tokens": new}))

    mistakes = {
        "row=2: there are rows 0 .. 1": lambda: insert_request(running, 2, begun([words(3)])),
        "a request of 2 rows": lambda: insert_request(running, 0, begun([words(3)] * 2)),
        "the request has 128 positions, the state 64": lambda: insert_request(running, 0, begun([words(3)], new=80)),
        "neurons per layer, the state None": lambda: insert_request(running, 0, begun([words(3)], core)),
    }
    for message, mistake in mistakes.items():
        with pytest.raises(ci.CoreInferError, match=message):
            mistake()
