"""How long a prompt takes until its first token is there, beside transformers."""

from collections.abc import Iterator
from typing import Any

from benchmarks import decode
from benchmarks.environment import read_results
from benchmarks.tables import made_on, markdown, shown_range

THEIRS = "transformers-eager"
KEEP = 0.4
# Tokens of a prompt, of two shapes; OPT has 2048 positions, two of which new tokens take.
PROMPTS = (
    ("smollm2-135m", 512),
    ("opt-125m", 512),
    ("smollm2-135m", 2048),
    ("opt-125m", 2046),
    ("smollm2-135m", 4096),
)
_Result = dict[str, Any]


def measure() -> Iterator[_Result]:
    """Results as `decode` makes them: of each prompt, one per contender."""
    for model, tokens in PROMPTS:
        plan = decode.Plan(
            model=model,
            contenders=("coreinfer", THEIRS),
            dtypes=("float32",),
            keeps=(KEEP,),
            prompt_tokens=tokens,
            new_tokens=2,
        )
        *_, results = decode.measure(plan)
        yield from results


def table() -> str:
    """Seconds until the first token, and how many times as fast the full model is as transformers'."""
    newest = {_case(one): one for one in read_results("long-prompts")}
    head = [
        "shape",
        "prompt tokens",
        "all neurons, s",
        f"keep {KEEP:g}, s",
        "transformers, s",
        "all neurons: times as fast",
        "rounds",
    ]
    rows = [head]
    for model, tokens in PROMPTS:
        of = [newest[model, tokens, *who] for who in (("coreinfer", None), ("coreinfer", KEEP), (THEIRS, None))]
        rows.append([model, str(tokens), *map(_seconds, of), _ratio(*of[::2]), str(of[0]["rounds"])])
    results = list(newest.values())
    return f"{markdown(rows)}\n\nfloat32, random weights; {made_on(*results)}"


def _case(result: _Result) -> tuple[str, int, str, float | None]:
    return result["model"], result["prompt_tokens"], result["contender"], result["keep"]


def _seconds(result: _Result) -> str:
    return shown_range(result["first_token_seconds"], 2)


def _ratio(one: _Result, other: _Result) -> str:
    """How many times as fast `one` is: of the medians, then the least and the most that the ranges allow."""
    ours, theirs = one["first_token_seconds"], other["first_token_seconds"]
    least, most = theirs["min"] / ours["max"], theirs["max"] / ours["min"]
    return f"{theirs['median'] / ours['median']:.2f} ({least:.2f} .. {most:.2f})"
