"""What the models write by themselves on core neurons: where they leave the full model, repetition, length."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import coreinfer_jax as ci
from benchmarks.environment import environment
from benchmarks.quality import KEEPS, subjects
from coreinfer_jax.lab.evaluation.free_running import free_running
from coreinfer_jax.model.fingerprint import fingerprint
from coreinfer_jax.text.corpus import Corpus

PROMPT, NEW, TEXTS = 64, 128, 64
RULES = {"votes": ci.CoreConfig.paper(), "contribution": ci.CoreConfig()}


def measure(texts: Path, models: Path) -> Iterator[dict[str, Any]]:
    """One result per model: greedy continuations of held-out texts, dense and by two rules at every keep ratio."""
    for name, params, tokenizer, documents, _ in subjects(texts, models):
        rows = Corpus(documents, tokenizer, 0).select(PROMPT, TEXTS).rows
        choices = {(rule, keep): replace(core, beta=keep) for rule, core in RULES.items() for keep in KEEPS}
        full, *found = free_running(params, rows, list(choices.values()), NEW)
        yield environment() | {
            "benchmark": "free-running",
            "model": name,
            "fingerprint": fingerprint(params),
            "calibrated": params.calibration is not None,
            "texts": len(rows),
            "prompt_tokens": PROMPT,
            "new_tokens": NEW,
            "dense": full,
            "settings": [
                {"rule": rule, "keep": keep} | figures for (rule, keep), figures in zip(choices, found, strict=True)
            ],
        }
