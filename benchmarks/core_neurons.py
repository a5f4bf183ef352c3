"""The tables of docs/core-neurons.md, from the numbers that `coreinfer analyze` left beside its pictures."""

import json
from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.environment import REPOSITORY
from coreinfer_jax.lab.analysis.recall import METHODS

PAGE = REPOSITORY / "docs" / "core-neurons.md"
MODELS = ("opt", "llama")


def _committed(model: str, name: str, beta: str = "") -> dict[str, Any]:
    path = PAGE.parent / "core-neurons" / f"{model}{beta}" / f"{name}.json"
    numbers: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return numbers


def _perplexity() -> list[list[str]]:
    rows = [["", "opt, paper", *MODELS]]
    numbers = [_committed(model, "perplexity") for model in MODELS]
    shares = numbers[0]["shares"]
    dense = [f"{own['perplexity'][name]:.1f}" for name in ("dense", "dense_continuation") for own in numbers]
    rows += [
        ["perplexity of texts, all neurons", "", *dense[:2]],
        ["perplexity of continuations, all neurons", "", *dense[2:]],
    ]
    asked = [
        *(("token", "dense", f"texts, alpha {share:g}", share) for share in (0.2, 0.4, 1.0)),
        *(("text", "dense", f"texts, beta {share:g}", share) for share in (0.2, 0.3, 0.4, 0.7)),
        *(
            ("decoding", "dense_continuation", f"continuations, beta {share:g}", share)
            for share in (0.2, 0.3, 0.4, 0.7)
        ),
    ]
    paper = {"texts, alpha 0.4": "1.02", "texts, beta 0.3": "1.03 (beta 0.25)"}
    for name, dense_name, title, share in asked:
        found = [own["perplexity"] for own in numbers]
        ratios = [f"{own[name][shares.index(share)] / own[dense_name]:.2f}" for own in found]
        rows.append([f"{title}: times that of all neurons", paper.get(title, ""), *ratios])
    return rows


def _extension() -> list[list[str]]:
    rows = [["length + tokens added", "paper", *MODELS]]
    numbers = [_committed(model, "extension") for model in MODELS]
    pairs = list(zip(numbers[0]["original_tokens"], numbers[0]["added_tokens"], strict=True))
    for pair, paper in [
        ((16, 8), ""),
        ((16, 64), ""),
        ((64, 8), ""),
        ((64, 64), ""),
        ((256, 8), "3 %"),
        ((256, 64), "6 %"),
    ]:
        changes = [100 * (1 - own["overlap"]["mean"][pairs.index(pair)]) for own in numbers]
        rows.append([f"{pair[0]} + {pair[1]}", paper, *(f"{change:.1f} %" for change in changes)])
    return rows


def _growth() -> list[list[str]]:
    numbers = [_committed(model, "growth") for model in MODELS]
    rows = [["tokens read", *MODELS]]
    for tokens in (8, 32, 128, 256, 448):
        rows.append(
            [str(tokens), *(f"{100 * g['overlap']['median'][g['tokens'].index(tokens)]:.0f} %" for g in numbers)]
        )
    return rows


def _topic() -> list[list[str]]:
    columns = {"accuracy": "labels found", "silhouette": "silhouette", "shuffled_silhouette": "shuffled"}
    rows = [["layer", *(f"{model}: {title}" for model in MODELS for title in columns.values())]]
    numbers = [_committed(model, "topics") for model in MODELS]
    for l in range(max(len(own["accuracy"]) for own in numbers)):
        rows.append([str(l)])
        for own in numbers:
            found = [own[name][l : l + 1] for name in columns]
            shown = [f"{100 * a:.0f} %" for a in found[0]] + [f"{s:.4f}" for part in found[1:] for s in part]
            rows[-1] += shown or [""] * len(columns)
    return rows


def _pair() -> list[list[str]]:
    rows = [["", "paper", *MODELS]]
    numbers = [_committed(model, "pairs")["files"] for model in MODELS]
    names = (("stsb-en-test.csv", "STS-B", ".52 to .66"), ("SICK_test_annotated.txt", "SICK", ".41 to .51"))
    for file, title, paper in names:
        own = [found[file] for found in numbers]
        rows.append([f"{title}, all layers together", paper, *(f"{found['all']:.2f}" for found in own)])
        ranges = [f"{min(found['layers']):.2f} to {max(found['layers']):.2f}" for found in own]
        rows.append([f"{title}, single layers", "", *ranges])
        rows.append([f"{title}, common tokens, no model", "", *(f"{found['same_tokens']:.2f}" for found in own)])
    return rows


def _recall() -> list[list[str]]:
    numbers = [_committed(model, "recall") for model in MODELS]
    methods = ("own", "group", "fused", "figure")
    rows = [["prompt tokens", *(f"{model}: {method}" for model in MODELS for method in methods)]]
    for i, n in enumerate(numbers[0]["prompt_tokens"]):
        cells = []
        for own in numbers:
            cells += [f"{own['recall']['with_prompt'][method]['mean'][i]:.2f}" for method in METHODS]
            cells.append(f"{own['stability_figure']['median'][i]:.2f}")
        rows.append([str(n), *cells])
    return rows


def _voted() -> list[list[str]]:
    numbers = [_committed(model, "recall") for model in MODELS]
    shares = [[f"{100 * share:.0f} %" for share in own["voted"]] for own in numbers]
    return [
        ["prompt tokens", *MODELS],
        *([str(n), *own] for n, *own in zip(numbers[0]["prompt_tokens"], *shares, strict=True)),
    ]


def _crossover() -> list[list[str]]:
    rows = [["beta, neurons to be found", *(f"{model}: {what}" for model in MODELS for what in ("tokens", "figure"))]]
    titles = {"with_prompt": "prompt and continuation", "continuation": "the continuation alone"}
    for beta, folder in (("0.4", ""), ("0.7", "-beta-0.7")):
        for truth, title in titles.items():
            found = [_committed(model, "recall", folder)["crossover"][truth] for model in MODELS]
            rows.append([f"{beta}, {title}", *(cell for own in found for cell in _crossing(own))])
    return rows


def _crossing(found: dict[str, float] | None) -> list[str]:
    return ["never", ""] if found is None else [str(found["tokens"]), f"{found['stability_figure']:.2f}"]


def tables() -> dict[str, Callable[[], str]]:
    """What makes each of the page's tables, by its name."""
    makers = (_perplexity, _extension, _growth, _topic, _pair, _recall, _voted, _crossover)
    return {f"core-neurons {rows.__name__.strip('_')}": partial(_markdown, rows) for rows in makers}


def _markdown(rows: Callable[[], list[list[str]]]) -> str:
    head, *body = rows()
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *body))
