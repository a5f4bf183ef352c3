"""What the length of a prompt changes for SmolLM2: the same continuations behind more or less of their texts."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.chat_model import BEFORE, KEEPS, NEWS, OURS, RULES, cell_of, figures_of, load_model
from benchmarks.environment import environment, read_results
from benchmarks.tables import made_on, markdown
from coreinfer_jax.lab.evaluation import Texts
from coreinfer_jax.lab.evaluation.comparison import compare_on, excerpts_of
from coreinfer_jax.lab.evaluation.settings import prior_of
from coreinfer_jax.model.weights import Params
from coreinfer_jax.sparsity.calibration import calibration_of
from coreinfer_jax.text import Tokenizer
from coreinfer_jax.text.corpus import Corpus
from coreinfer_jax.text.documents import Documents, read_documents

TEXTS = Texts(prompt_tokens=(32, 512), continuation=64, texts=8)
NAMES = ("votes (the paper)", "GRIFFIN", BEFORE, OURS)
_Result = dict[str, Any]


def measure(data: Path) -> Iterator[_Result]:
    """One result per length, the shortest first.

    Raises:
        CoreInferError: texts that are not there, or SmolLM2 is not installed.
    """
    return of_model(*load_model(), read_documents(data / "text" / "other.txt"))


def of_model(params: Params, tokenizer: Tokenizer, documents: Documents) -> Iterator[_Result]:
    """The results of a calibrated model."""
    settings = {(name, keep): RULES[name](keep) for name in NAMES for keep in KEEPS}
    prior = prior_of(calibration_of(params))
    selection = Corpus(documents, tokenizer, TEXTS.seed).select(TEXTS.tokens, TEXTS.texts)
    for excerpts in excerpts_of(selection, TEXTS):
        made = environment()
        found = compare_on(params, excerpts, list(settings.values()), TEXTS.seed, prior)
        figures = [{"name": name} | figures_of(one) for (name, _), one in zip(settings, found, strict=True)]
        sizes = {"prompt_tokens": excerpts.length, "continuation": TEXTS.continuation, "texts": len(excerpts.rows)}
        yield made | sizes | {"settings": figures}


def table() -> str:
    """KL divergence with its interval, and agreement, by length and keep ratio."""
    results = {result["prompt_tokens"]: result for result in read_results("prompt-lengths")}
    if not results:
        return "No results yet."
    rows = [["prompt tokens, neurons kept", *NAMES]]
    for length, result in sorted(results.items()):
        found = {(own["name"], own["keep"]): own for own in result["settings"]}
        rows += [[f"{length}, {keep:.0%}", *(cell_of(found[name, keep]) for name in NAMES)] for keep in KEEPS]
    last = results[max(results)]
    what = f"{NEWS.capitalize()}: {last['texts']} texts, {last['continuation']} tokens scored of each"
    return f"{markdown(rows)}\n\n{what}; {made_on(*results.values())}"
