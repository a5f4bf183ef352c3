"""The generated parts of the embedded models' card: figures and held-out documents, from their training.json."""

import json
from typing import Any

from benchmarks.environment import REPOSITORY

ASSETS = REPOSITORY / "coreinfer_jax" / "assets"
CARD = ASSETS / "MODEL_CARD.md"


def trained() -> dict[str, dict[str, Any]]:
    """What each embedded model's training.json says."""
    return {
        path.parent.name: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(ASSETS.glob("*/training.json"))
    }


def figures() -> str:
    """A table of both models."""
    models = trained()
    rows: dict[str, list[str]] = {
        "parameters": [f"{facts['parameters']:,}" for facts in models.values()],
        "layers, D, F, heads": [_sizes(facts["recipe"]) for facts in models.values()],
        "vocabulary": [str(facts["recipe"]["vocab_size"]) for facts in models.values()],
        "tokens seen": [f"{sum(stage['tokens_seen'] for stage in _stages(facts)):,}" for facts in models.values()],
    }
    for number, stages in enumerate(zip(*map(_stages, models.values()), strict=True), start=1):
        rows[f"run {number}"] = [_run(stage) for stage in stages]
    for text in next(iter(models.values()))["held_out"]:
        rows[f"held-out perplexity, {text}"] = [_perplexity(facts["held_out"][text]) for facts in models.values()]
    head = [f"| | {' | '.join(f'embedded:{name}' for name in models)} |", "|---" * (len(models) + 1) + "|"]
    return "\n".join([*head, *(f"| {name} | {' | '.join(values)} |" for name, values in rows.items())])


def held_out() -> str:
    """A table of the documents that training did not see, the same for both models."""
    texts = next(iter(trained().values()))["texts"]
    rows = [
        f"| {text['file']} | {entry['document']} | {_plain(entry['begins'])} |"
        for text in texts
        for entry in text["held_out"]
    ]
    return "\n".join(["| file | document, from 0 | begins |", "|---|---|---|", *rows])


def _sizes(recipe: dict[str, Any]) -> str:
    return f"{recipe['num_layers']}, {recipe['hidden_size']}, {recipe['mlp_size']}, {recipe['num_heads']}"


def _stages(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs that made a model, the first one first."""
    before = facts.get("init_from")  # the first runs were made before there was such a field
    return [*(_stages(before["training"]) if before else []), facts]


def _run(facts: dict[str, Any]) -> str:
    recipe = facts["recipe"]
    tokens, peak = recipe["batch"] * recipe["sequence"], recipe["learning_rate"]
    return (
        f"{recipe['steps']} steps of {tokens:,} tokens, learning rate {peak}, products in {recipe['dtype']}, "
        f"seed {recipe['seed']}; {facts['seconds'] / 60:.0f} min on {facts['hardware']}"
    )


def _perplexity(loss: dict[str, float]) -> str:
    return f"{loss['perplexity']:.1f} per token, {loss['bits_per_byte']:.3f} bits per byte"


def _plain(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
