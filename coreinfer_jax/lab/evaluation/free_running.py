"""What generations that go on by themselves look like: where they leave the full model's, repetition, length."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from coreinfer_jax.engine.generation import generate
from coreinfer_jax.engine.results import Generation
from coreinfer_jax.errors import CoreInferError
from coreinfer_jax.lab.evaluation.comparison import interval
from coreinfer_jax.lab.evaluation.settings import Foreknown, PerToken, Setting
from coreinfer_jax.lab.reading import batches
from coreinfer_jax.model.host import check_on_device
from coreinfer_jax.model.weights import Params, check_dense
from coreinfer_jax.sparsity.stability import CoreConfig

ROWS = 8
# Tokens of what counts as repeated when it comes again.
PHRASE = 4


def generating(settings: Sequence[Setting], params: Params | None = None) -> list[CoreConfig]:
    """The settings, if `generate` can choose as they do, for `params` where they are loaded.

    Raises:
        CoreInferError: one by which no set can be kept for a generation.
    """
    cores = []
    for setting in settings:
        if isinstance(setting, PerToken):
            raise CoreInferError(f"rule {setting.rule!r}: gives every token neurons of its own, and generates nothing")
        if isinstance(setting, Foreknown):
            raise CoreInferError(
                "what is to be generated is not known before: a setting that knows it generates nothing"
            )
        if params is not None:
            setting.check(params, None, ROWS)
        cores.append(setting)
    return cores


def free_running(
    params: Params, prompts: np.ndarray, cores: Sequence[CoreConfig], new_tokens: int, seed: int = 0
) -> list[dict[str, Any]]:
    """Greedy continuations of prompts, on core neurons and by the full model.

    Args:
        params: dense weights; their calibration counts where a core asks for it.
        prompts: int32 [n, T].
        cores: how to choose.
        new_tokens: of each continuation, at most; an EOS ends it.
        seed: of the intervals.

    Returns:
        First for the full model, then per core, each with `mean` and `ci95` over prompts: `departure`, tokens before
        the first that differs from the full model's (at least 1, which is the full model's own; all of them where none
        differs), `repetition`, the share of 4-grams that came before in the same continuation, and `length`, in tokens.

    Raises:
        CoreInferError: as `generate`.
    """
    check_dense(params)
    check_on_device(params, "free_running")
    choices: list[CoreConfig | None] = [None, *cores]
    made: list[list[list[int]]] = [[] for _ in choices]
    for chosen, real in batches(len(prompts), ROWS, "generating"):
        for texts, core in zip(made, choices, strict=True):
            eos_ids = params.config.eos_ids
            out = generate(params, prompts[chosen], core, max_new_tokens=new_tokens, eos_ids=eos_ids)
            texts += _texts(out)[:real]
    return [_figures(texts, made[0], seed) for texts in made]


def _texts(out: Generation) -> list[list[int]]:
    return [row[:length].tolist() for row, length in zip(out.tokens, out.lengths, strict=True)]


def _figures(texts: Sequence[Sequence[int]], full: Sequence[Sequence[int]], seed: int) -> dict[str, Any]:
    values = {
        "departure": [departure(own, other) for own, other in zip(texts, full, strict=True)],
        "repetition": [repetition(own) for own in texts],
        "length": [len(own) for own in texts],
    }
    return {name: interval(np.asarray(found, np.float64), seed) for name, found in values.items()}


def departure(text: Sequence[int], full: Sequence[int]) -> int:
    """Tokens that both have in common at their beginning."""
    return next((i for i, (a, b) in enumerate(zip(text, full, strict=False)) if a != b), min(len(text), len(full)))


def repetition(text: Sequence[int]) -> float:
    """Share of the 4-grams of `text` that are not its first of their kind; 0 for fewer than 4 tokens."""
    phrases = [tuple(text[i : i + PHRASE]) for i in range(len(text) - PHRASE + 1)]
    return 1 - len(set(phrases)) / len(phrases) if phrases else 0.0
