"""`calibrate`: a prior from texts like those to come, and the cheapest setting that meets a bound on others of them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from numbers import Real
from typing import Any

from coreinfer_jax.errors import CoreInferError, shown
from coreinfer_jax.lab.evaluation.comparison import Texts, check_settings, compare_on
from coreinfer_jax.lab.evaluation.distilling import CONTINUATION, distil, lesson, wanted
from coreinfer_jax.lab.evaluation.fitting import learn
from coreinfer_jax.lab.evaluation.material import Material, from_documents, own_answers, together
from coreinfer_jax.lab.evaluation.sensitivity import layer_gains, linear_up_to
from coreinfer_jax.lab.evaluation.settings import without_prior
from coreinfer_jax.model.host import check_on_device
from coreinfer_jax.model.weights import Params, check_dense
from coreinfer_jax.sparsity.calibration import Calibration, explained_by
from coreinfer_jax.sparsity.stability import CoreConfig
from coreinfer_jax.text import Tokenizer
from coreinfer_jax.text.documents import Documents

# Keep ratios to choose from, the cheapest first.
KEEPS = tuple(round(0.05 * step, 2) for step in range(1, 20))


@dataclass(frozen=True)
class Bound:
    """What a setting may cost: the 95 % interval of each mean must lie within.

    Attributes:
        max_kl: KL divergence from the full model, nats per token; None for any.
        min_agreement: share of tokens with the full model's most probable one; None for any.

    Raises:
        CoreInferError: a bound outside its range, or none.
    """

    max_kl: float | None = None
    min_agreement: float | None = None

    def __post_init__(self) -> None:
        if self.max_kl is None and self.min_agreement is None:
            raise CoreInferError("Bound(): bounds nothing; give max_kl or min_agreement")
        if self.max_kl is not None and not (isinstance(self.max_kl, Real) and self.max_kl > 0):
            raise CoreInferError(f"max_kl={shown(self.max_kl)}: give nats per token, above 0")
        agreement = self.min_agreement
        if agreement is not None and not (isinstance(agreement, Real) and 0 < agreement <= 1):
            raise CoreInferError(f"min_agreement={shown(agreement)}: give a share of tokens, above 0 and at most 1")

    def is_met(self, result: dict[str, Any]) -> bool:
        """Whether one setting's result, of `evaluate`, lies within."""
        near = self.max_kl is None or result["kl"]["ci95"][1] <= self.max_kl
        return near and (self.min_agreement is None or result["agreement"]["ci95"][0] >= self.min_agreement)


# A tenth of a nat makes the text about a tenth more surprising to the full model, as its perplexity counts.
BOUND = Bound(max_kl=0.1)
TEXTS = Texts(continuation=32, texts=48)


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

    @property
    def chosen(self) -> list[dict[str, Any]]:
        """The results of the keep ratio that was taken, one for each length of prompt."""
        core = self.calibration.core
        keep = core.beta if isinstance(core, CoreConfig) else None
        return [result for result in self.results if result["keep"] == keep]


def calibrate(
    params: Params,
    tokenizer: Tokenizer,
    documents: Documents | None = None,
    bound: Bound | None = BOUND,
    texts: Texts = TEXTS,
    *,
    answers: bool = False,
    steps: int = 0,
) -> Calibrated:
    """Learn what a model's neurons do on texts, which layers need most of them, and how many are needed.

    One half of the texts gives the prior and the gains of layers. On the other half every keep ratio from 0.05 to 0.95
    is evaluated as decoding would use it, and the smallest that meets the bound after prompts of each length is taken.

    Args:
        params: dense weights.
        tokenizer: of the model.
        documents: texts like those to come; None for prompts of the package, each with the model's own answer.
        bound: what a setting may cost; None takes `CoreConfig()`, whatever that costs.
        texts: which of them, and how much; the model's own answers have no use for `prompt_tokens` and `switched`.
        answers: whether the model's own answers are read beside documents.
        steps: how long linear neurons are trained after they are fitted (`distilling`), 0 for not.

    Returns:
        `Calibrated`; its `calibration.core` is None, all neurons, where no keep ratio meets the bound.

    Raises:
        CoreInferError: texts that are too few or too short, sizes that do not fit the model, activations or logits
            that are NaN or infinite.
    """
    check_dense(params)
    check_on_device(params, "calibrate")
    default = CoreConfig()
    settings = [replace(default, beta=keep) for keep in KEEPS]
    material = _material(params, tokenizer, documents, settings, texts, answers, wanted(steps))
    sums, explained = learn(params, material.known)
    prior = {without_prior(default.ranking): sums}
    if explained is not None and steps:
        begun = [*material.prompts.tolist(), *[0] * len(material.beside)]
        taught = lesson([*material.known.texts(), *material.beside], begun, texts.seed)
        explained = distil(params, explained, material.known, taught, steps, texts.seed)
    if explained is not None:
        explained = linear_up_to(params, explained, material.tried, prior)
    completed = replace(params, calibration=Calibration(sums, None, default, explained))
    gains = layer_gains(completed, material.tried.rows, material.tried.context, prior)
    found = Calibration(sums, gains, default, explained)
    core: CoreConfig | None = default
    results: list[dict[str, Any]] = []
    if bound is not None:
        calibrated = replace(params, calibration=found)
        judged = [compare_on(calibrated, own, settings, texts.seed, prior) for own in material.held_out]
        results = [result for one in judged for result in one]
        core = _cheapest(results, bound)
    facts = {
        "data": material.name,
        "prior_texts": len(material.known.rows),
        "prior_tokens": int(material.known.lengths.sum()),
        "texts_beside": len(material.beside),
        "layer_texts": len(material.tried.rows),
        "texts": asdict(texts)
        | {"texts": len(material.held_out[0].rows), "prompt_tokens": [own.length for own in material.held_out]},
        "bound": {} if bound is None else asdict(bound),
        "met": core is not None,
        "kept_neurons": None if core is None else core.widths(replace(params, calibration=found)),
        "trained_steps": 0 if explained is None else steps,
        "linear_up_to": 0.0 if explained is None else explained.up_to,
        "linear_neurons": _linear_neurons(core, replace(params, calibration=found)),
    }
    return Calibrated(replace(found, core=core), facts, results)


def _linear_neurons(core: CoreConfig | None, params: Params) -> list[int]:
    """How many each layer has as `core` narrows it."""
    known = explained_by(params)
    if core is None or known is None:
        return [0] * params.config.num_layers
    return [known.size if there else 0 for there in core.linear_layers(params)]


def _material(
    params: Params,
    tokenizer: Tokenizer,
    documents: Documents | None,
    settings: Sequence[CoreConfig],
    texts: Texts,
    answers: bool,
    taught: int,
) -> Material:
    """The texts to read, if these sizes fit the model, and of documents about `taught` beside them to train by."""
    if documents is None:
        check_settings(params, settings, replace(texts, prompt_tokens=(1,)))  # prompts have lengths of their own
        return own_answers(params, tokenizer, texts)
    check_settings(params, settings, texts)
    given = from_documents(documents, tokenizer, texts, params.config, 2 * CONTINUATION * taught)
    return together(given, own_answers(params, tokenizer, texts)) if answers else given


def _cheapest(results: Sequence[dict[str, Any]], bound: Bound) -> CoreConfig | None:
    """The smallest keep ratio that meets the bound at every prompt length."""
    for keep in KEEPS:
        if all(bound.is_met(result) for result in results if result["keep"] == keep):
            return CoreConfig(beta=keep)
    return None
