"""`calibrate`: a prior from texts like those to come, and the cheapest setting that meets a bound on others of them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from numbers import Real
from typing import Any

from coreinfer_jax.errors import CoreInferError, shown
from coreinfer_jax.lab.evaluation.comparison import Texts, check_settings, compare, prior_texts
from coreinfer_jax.lab.evaluation.measure import collect
from coreinfer_jax.lab.evaluation.sensitivity import layer_gains
from coreinfer_jax.model.weights import Params
from coreinfer_jax.sparsity.allocate import allocate
from coreinfer_jax.sparsity.calibration import Calibration
from coreinfer_jax.sparsity.narrow import check_dense
from coreinfer_jax.sparsity.stability import CoreConfig
from coreinfer_jax.text import Tokenizer
from coreinfer_jax.text.corpus import Corpus
from coreinfer_jax.text.documents import Documents

# Keep ratios to choose from, the cheapest first.
KEEPS = tuple(round(0.05 * step, 2) for step in range(1, 20))
# Texts on which each layer is narrowed alone.
LAYER_TEXTS = 16


@dataclass(frozen=True)
class Bound:
    """What a setting may cost: the 95 % interval of each mean must lie within.

    Attributes:
        max_kl: KL divergence from the full model, nats per token; None for any.
        min_agreement: share of tokens with the full model's most probable one; None for any.

    Raises:
        CoreInferError: a bound outside its range.
    """

    max_kl: float | None = None
    min_agreement: float | None = None

    def __post_init__(self) -> None:
        if self.max_kl is not None and not (isinstance(self.max_kl, Real) and self.max_kl > 0):
            raise CoreInferError(f"max_kl={shown(self.max_kl)}: give nats per token, above 0")
        agreement = self.min_agreement
        if agreement is not None and not (isinstance(agreement, Real) and 0 < agreement <= 1):
            raise CoreInferError(f"min_agreement={shown(agreement)}: give a share of tokens, above 0 and at most 1")

    def is_met(self, result: dict[str, Any]) -> bool:
        """Whether one setting's result, of `evaluate`, lies within."""
        near = self.max_kl is None or result["kl"]["ci95"][1] <= self.max_kl
        return near and (self.min_agreement is None or result["agreement"]["ci95"][0] >= self.min_agreement)


@dataclass(frozen=True)
class Calibrated:
    """What `calibrate` found.

    Attributes:
        calibration: for `Params.calibration`.
        facts: texts, bound and whether it is met.
        results: of every keep ratio that was tried, as `evaluate` gives them; empty where there was no bound.
    """

    calibration: Calibration
    facts: dict[str, Any]
    results: list[dict[str, Any]]


def calibrate(
    params: Params,
    tokenizer: Tokenizer,
    documents: Documents,
    bound: Bound = Bound(),
    texts: Texts = Texts(),
) -> Calibrated:
    """Learn what a model's neurons do on texts, which layers need most of them, and how many are needed.

    One half of the documents gives the prior and the gains of layers. On the other half every keep ratio from 0.05 to
    0.95 is evaluated as decoding would use it, and the smallest that meets the bound after prompts of each length is
    taken.

    Args:
        params: dense weights.
        tokenizer: of the model.
        documents: texts like those to come.
        bound: what a setting may cost; without one `CoreConfig()` is taken.
        texts: which of them, and how much.

    Returns:
        `Calibrated`; its `calibration.core` is None, all neurons, where no keep ratio meets the bound.

    Raises:
        CoreInferError: texts that are too few or too short, sizes that do not fit the model, activations or logits
            that are NaN or infinite.
    """
    check_dense(params)
    default = CoreConfig()
    settings = [replace(default, beta=keep) for keep in KEEPS]
    check_settings(params, settings, texts)
    corpus = Corpus(documents, tokenizer, texts.seed)
    tried, held_out = corpus.select(texts.tokens, LAYER_TEXTS, half=0), corpus.select(texts.tokens, texts.texts, half=1)
    known = prior_texts(corpus, params.config, half=0)
    prior = collect(params, known, [default.ranking])
    gains = layer_gains(params, tried.rows, max(texts.prompt_tokens), prior)
    [sums] = prior.values()
    found = Calibration(sums, gains, default)
    bounded, calibrated = bound != Bound(), replace(params, calibration=found)
    results = compare(calibrated, held_out, settings, texts, prior) if bounded else []
    core = _cheapest(results, bound) if bounded else default
    facts = {
        "data": documents.name,
        "prior_texts": len(known.rows),
        "prior_tokens": int(known.lengths.sum()),
        "layer_texts": len(tried.rows),
        "texts": asdict(texts) | {"texts": len(held_out.rows)},
        "bound": asdict(bound),
        "met": core is not None,
        "kept_neurons": None if core is None else allocate(core, params.config, gains),
    }
    return Calibrated(replace(found, core=core), facts, results)


def _cheapest(results: Sequence[dict[str, Any]], bound: Bound) -> CoreConfig | None:
    """The smallest keep ratio that meets the bound at every prompt length."""
    for keep in KEEPS:
        if all(bound.is_met(result) for result in results if result["keep"] == keep):
            return CoreConfig(beta=keep)
    return None
