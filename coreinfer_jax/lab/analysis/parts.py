"""`analyze`: a directory of pictures and their numbers, part by part, continued after any interruption."""

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from coreinfer_jax.checks import check_fraction
from coreinfer_jax.errors import CoreInferError, shown
from coreinfer_jax.files import begun, is_directory, new_file, read_json, refuse_existing, to_path
from coreinfer_jax.lab.analysis import figures, growth, meaning, perplexity, recall
from coreinfer_jax.lab.analysis.inputs import Inputs, Pairs, content_digest
from coreinfer_jax.lab.clustering.counting import rows_digest
from coreinfer_jax.lab.clustering.grouping import check_seed
from coreinfer_jax.model.config import ModelConfig
from coreinfer_jax.model.fingerprint import fingerprint
from coreinfer_jax.model.host import check_on_device
from coreinfer_jax.model.weights import Params, check_dense
from coreinfer_jax.text import Tokenizer
from coreinfer_jax.text.corpus import LEAST_TEXTS, Corpus
from coreinfer_jax.text.documents import Documents

TEXTS, ALPHA, BETA = 64, 0.4, 0.4

# Documents, and characters of each, that tell one tokenizer from another.
PROBE = 64


@dataclass(frozen=True)
class Part:
    """One picture and its numbers.

    Attributes:
        name: of its files.
        measure: the numbers, ready for JSON but for their rounding.
        draw: the picture of those numbers.
        tokens: that its texts need, None where the model has too few positions; itself None where it takes other inputs
            than the documents, those of its name.
        halves: whether it takes texts from either half of the documents.
        needs: what those other inputs are.
    """

    name: str
    measure: Callable[[Inputs], dict[str, Any]]
    draw: Callable[[Mapping[str, Any]], Any]
    tokens: Callable[[ModelConfig], int | None] | None = None
    halves: bool = False
    needs: str = ""

    def missing(self, inputs: Inputs) -> str | None:
        """Why it cannot be made from these inputs, None where it can."""
        if self.tokens is None:
            return None if getattr(inputs, self.name) else f"needs {self.needs}"
        fits = self.tokens(inputs.config) is not None
        return None if fits else f"the model's {inputs.config.max_positions} positions are too few"


PARTS = (
    Part("perplexity", perplexity.measure, figures.perplexity, perplexity.tokens_needed),
    Part("extension", growth.extension, figures.extension, growth.extension_tokens),
    Part("growth", growth.growth, figures.growth, growth.growth_tokens),
    Part("topics", meaning.topics, figures.topics, needs="labelled texts (--topics)"),
    Part("pairs", meaning.pairs, figures.pairs, needs="judged pairs (--pairs)"),
    Part("recall", recall.measure, figures.recall, recall.tokens_needed, halves=True),
)


def analyze(
    directory: str | os.PathLike[str],
    params: Params,
    tokenizer: Tokenizer,
    documents: Documents,
    *,
    topics: Documents | None = None,
    pairs: Sequence[Pairs] = (),
    texts: int = TEXTS,
    alpha: float = ALPHA,
    beta: float = BETA,
    seed: int = 0,
) -> Path:
    """Measure what the paper says of core neurons on a model and texts of one's own (docs/core-neurons.md).

    Every part is a PNG and, of the same name, a JSON file with its numbers: `perplexity` (paper, Fig. 2), `extension`
    and `growth` (Fig. 3), `topics` (Fig. 4, 9), `pairs` (Table 1), and `recall`, which compares the methods of
    prediction. Parts that lack what they need are left out, and standard error says so. The same arguments give the
    same JSON on one machine and one set of versions.

    Args:
        directory: new, or one begun by the same call, whose finished parts are kept.
        params: dense weights.
        tokenizer: of the model.
        documents: texts; the lengths that are measured go up to 512 tokens.
        topics: texts with labels, for `topics`.
        pairs: from `read_pairs`, for `pairs`.
        texts: documents per part, and per label of `topics`, at most.
        alpha: share of a token's positive neurons that are its token-wise core neurons.
        beta: keep ratio.
        seed: of the order in which documents are taken, and of k-means.

    Returns:
        The directory.

    Raises:
        CoreInferError: a directory of something else or of other settings, texts that are too few or too short,
            activations that are not finite, a setting outside its range.
    """
    check_settings(directory, pairs, texts, alpha, beta, seed)
    check_dense(params)
    check_on_device(params, "analyze")
    target = to_path(directory)
    corpus = Corpus(documents, tokenizer, seed)
    inputs = Inputs(params, tokenizer, corpus, topics, tuple(pairs), texts, alpha, beta, seed)
    with begun(target, _settings(inputs, documents), "analysis"):
        wanted = [part for part in PARTS if _wanted(part, inputs)]
        for part in wanted:
            _check_texts(part, inputs, target)
        for part in wanted:
            _make(part, inputs, target)
    return target


def check_settings(
    directory: str | os.PathLike[str], pairs: Sequence[Pairs], texts: int, alpha: float, beta: float, seed: int
) -> None:
    """Refuse what can be refused without the model; arguments and errors are those of `analyze`."""
    figures.require_drawing()
    target = to_path(directory)
    if not is_directory(target):
        refuse_existing(target)
    check_fraction("alpha", alpha)
    check_fraction("beta", beta)
    if type(texts) is not int or texts < LEAST_TEXTS:
        raise CoreInferError(f"texts={shown(texts)}: give a whole number of at least {LEAST_TEXTS}")
    check_seed(seed)
    names = [own.name for own in pairs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise CoreInferError(f"pairs: two files are called {twice}; give each once, or rename one")


def _settings(inputs: Inputs, documents: Documents) -> dict[str, Any]:
    """What the numbers follow from; of texts their digests, whatever file they came from.

    The version stands for all that this package fixes, and a probe of the first documents for the tokenizer.
    """
    probe = [inputs.tokenizer.encode(text[:PROBE]) for text in documents.texts[:PROBE]]
    return {
        "version": version("coreinfer_jax"),
        "tokenizer": rows_digest(probe),
        "model": fingerprint(inputs.params),
        "dtype": inputs.params.dtype.name,
        "data": _named(documents),
        "topics": None if inputs.topics is None else _named(inputs.topics),
        "pairs": [
            {"name": own.name, "pairs": len(own.scores), "sha256": content_digest(own.first, own.second, own.scores)}
            for own in inputs.pairs
        ],
        "texts": inputs.texts,
        **inputs.facts(),
    }


def _named(documents: Documents) -> dict[str, Any]:
    digest = content_digest(documents.texts, documents.labels)
    return {"name": documents.name, "documents": len(documents.texts), "sha256": digest}


def _wanted(part: Part, inputs: Inputs) -> bool:
    """Whether `part` can be made; says so where it cannot."""
    missing = part.missing(inputs)
    if missing is not None:
        print(f"[{part.name} is left out: {missing}]", file=sys.stderr)
    return missing is None


def _check_texts(part: Part, inputs: Inputs, target: Path) -> None:
    """Refuse texts that are too few before anything is measured."""
    if _numbers(part, target).exists():
        return
    size = None if part.tokens is None else part.tokens(inputs.config)
    if size is not None:
        for half in (0, 1) if part.halves else (None,):
            inputs.corpus.select(size, inputs.texts, half)
    elif part.name == "topics" and inputs.topics is not None:
        meaning.topic_texts(inputs.topics, inputs.texts, inputs.seed)


def _numbers(part: Part, target: Path) -> Path:
    return target / f"{part.name}.json"


def _make(part: Part, inputs: Inputs, target: Path) -> None:
    """Measure and draw what is not there yet."""
    numbers, picture = _numbers(part, target), target / f"{part.name}.png"
    if not numbers.exists():
        found = rounded(part.measure(inputs))
        _tell(part, found)
        with new_file(numbers) as partial:
            partial.write_text(json.dumps(found) + "\n", encoding="utf-8")
    if not picture.exists():
        figure = part.draw(read_json(numbers))
        with new_file(picture) as partial:
            figure.savefig(partial, format="png", dpi=figures.DPI)


def _tell(part: Part, found: Mapping[str, Any]) -> None:
    if found.get("too_short"):
        print(
            f"[{part.name}: {found['texts']} texts; {found['too_short']} documents passed over as too short]",
            file=sys.stderr,
        )


def rounded(value: Any) -> Any:
    """`value` of dictionaries, sequences, arrays and numbers as JSON has it, floats of six significant digits."""
    if isinstance(value, Mapping):
        return {str(key): rounded(own) for key, own in value.items()}
    if isinstance(value, np.ndarray):
        return rounded(value.tolist())
    if isinstance(value, list | tuple):
        return [rounded(own) for own in value]
    if isinstance(value, float | np.floating):
        return float(f"{float(value):.6g}")
    return int(value) if isinstance(value, np.integer) else value
