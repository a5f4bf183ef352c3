"""What fewer neurons cost SmolLM2 on its own greedy answers to questions, none of which a calibration learnt from."""

from collections.abc import Iterator
from typing import Any

import numpy as np

import coreinfer_jax as ci
from benchmarks.chat_model import BEFORE, OURS, RULES, cell_of, figures_of, load_model
from benchmarks.environment import environment, read_results
from benchmarks.tables import made_on, markdown
from coreinfer_jax.lab.evaluation import Texts
from coreinfer_jax.lab.evaluation.comparison import Excerpts, compare_on
from coreinfer_jax.lab.evaluation.material import PROMPTS, prompt_halves
from coreinfer_jax.lab.evaluation.settings import prior_of
from coreinfer_jax.lab.reading import batches
from coreinfer_jax.model.weights import Params
from coreinfer_jax.sparsity.calibration import calibration_of
from coreinfer_jax.text import Tokenizer
from coreinfer_jax.text.corpus import Beginnings

# Questions, and the tokens of each answer; shorter answers do not count.
TEXTS = Texts(texts=40, continuation=48)
NAMES, KEEPS = ("GRIFFIN", BEFORE, OURS), (0.4, 0.6, 0.8, 0.9)
ROWS = 16
_Result = dict[str, Any]


def measure() -> Iterator[_Result]:
    """One result.

    Raises:
        CoreInferError: SmolLM2 is not installed.
    """
    yield of_model(*load_model())


def of_model(params: Params, tokenizer: Tokenizer) -> _Result:
    """The result of a calibrated chat model."""
    made = environment()
    settings = {(name, keep): RULES[name](keep) for name in NAMES for keep in KEEPS}
    excerpts = answered(params, tokenizer)
    found = compare_on(params, excerpts, list(settings.values()), TEXTS.seed, prior_of(calibration_of(params)))
    figures = [{"name": name} | figures_of(one) for (name, _), one in zip(settings, found, strict=True)]
    sizes = {"prompt_tokens": excerpts.length, "continuation": TEXTS.continuation, "texts": len(excerpts.rows)}
    return made | sizes | {"settings": figures}


def answered(params: Params, tokenizer: Tokenizer) -> Excerpts:
    """The questions that a calibration only judges by, with the first tokens of the full model's greedy answers."""
    questions = (PROMPTS / "questions.txt").read_text(encoding="utf-8").splitlines()
    asked = {tuple(tokenizer.encode_chat([{"role": "user", "content": question}])) for question in questions}
    _, judged = prompt_halves(params, tokenizer, TEXTS)
    prompts = sorted((prompt for prompt in judged if tuple(prompt) in asked), key=len)
    new, long = TEXTS.continuation + 1, []
    for chosen, real in batches(len(prompts), ROWS, "the model answers"):
        own = [prompts[i] for i in chosen]
        out = ci.generate(params, own, None, max_new_tokens=new, eos_ids=params.config.eos_ids)
        found = list(zip(own, out.tokens.tolist(), out.lengths, strict=True))[:real]
        long += [(prompt, answer) for prompt, answer, length in found if length == new]
    kept = long[: TEXTS.texts]
    rows = Beginnings.of([[*prompt, *answer] for prompt, answer in kept]).rows
    return Excerpts(rows, np.array([len(prompt) for prompt, _ in kept], np.int32), len(prompts) - len(long))


def table() -> str:
    """KL divergence with its interval, and agreement, by keep ratio."""
    results = read_results("chat-questions")
    if not results:
        return "No results yet."
    result = results[-1]
    found = {(own["name"], own["keep"]): own for own in result["settings"]}
    rows = [["neurons kept", *NAMES, "of constants' divergence"]]
    for keep in KEEPS:
        ours, before = (found[name, keep]["kl"]["mean"] for name in (OURS, BEFORE))
        rows.append([f"{keep:.0%}", *(cell_of(found[name, keep]) for name in NAMES), f"{ours / before:.0%}"])
    what = f"{result['texts']} questions, {result['continuation']} tokens scored of each greedy answer"
    return f"{markdown(rows)}\n\n{what}; {made_on(result)}"
