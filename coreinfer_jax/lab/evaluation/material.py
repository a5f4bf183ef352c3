"""What a calibration reads: documents that the user gives, or prompts of the package and what the model makes of them.

A model's own answers are what decoding reads, in the form in which the model was trained to give them. Plain texts are
neither.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from coreinfer_jax.engine.generation import generate
from coreinfer_jax.errors import CoreInferError
from coreinfer_jax.lab.evaluation.comparison import Excerpts, Texts, excerpts_of, prior_texts
from coreinfer_jax.lab.reading import batches
from coreinfer_jax.model.config import ModelConfig
from coreinfer_jax.model.weights import Params
from coreinfer_jax.text import Tokenizer
from coreinfer_jax.text.corpus import LEAST_TEXTS, Beginnings, Corpus
from coreinfer_jax.text.documents import Documents, read_utf8, split_at_separators

PROMPTS = Path(__file__).resolve().parents[2] / "assets" / "prompts"
QUESTIONS, OPENINGS = "questions.txt", "openings.txt"
OWN = "the model's own answers"
# Texts on which each layer is narrowed alone.
LAYER_TEXTS = 16
# Tokens of an answer that is learnt from, where there is room.
LEARNT = 128
# Answers to each prompt that are learnt from, each drawn anew.
ANSWERS = 3
# Rows that are generated at a time. Drawn, not greedy: the most probable words of a plain model soon repeat themselves.
ROWS, TEMPERATURE = 16, 0.7


@dataclass(frozen=True)
class Material:
    """The texts of a calibration; those to try and those to judge by are different ones.

    Attributes:
        name: where they come from, for people.
        known: what the prior is summed up over, and linear neurons are fitted to.
        prompts: int32 [n], how long a prompt each of these begins with, 0 where any beginning may be one.
        beside: more texts, any beginning of which may be a prompt, for training alone: it needs many more.
        tried: on which each layer is narrowed alone.
        held_out: on which keep ratios are judged, for each length of prompt.
    """

    name: str
    known: Beginnings
    prompts: np.ndarray
    beside: tuple[list[int], ...]
    tried: Excerpts
    held_out: tuple[Excerpts, ...]


def from_documents(
    documents: Documents, tokenizer: Tokenizer, texts: Texts, config: ModelConfig, taught: int = 0
) -> Material:
    """Half of the documents to learn from, until `taught` tokens to train by are found; the other half to judge by.

    Raises:
        CoreInferError: texts that are too few or too short.
    """
    corpus = Corpus(documents, tokenizer, texts.seed)
    tried, held_out = corpus.select(texts.tokens, LAYER_TEXTS, half=0), corpus.select(texts.tokens, texts.texts, half=1)
    longest = Excerpts(tried.rows, max(texts.prompt_tokens), tried.too_short)
    known = prior_texts(corpus, config, half=0)
    prompts = np.zeros(len(known.rows), np.int32)
    more = prior_texts(corpus, config, half=0, least=taught)
    beside = tuple(more.texts()[len(known.rows) :])
    return Material(documents.name, known, prompts, beside, longest, tuple(excerpts_of(held_out, texts)))


def together(one: Material, other: Material) -> Material:
    """Both: learnt from as one, and judged by each."""
    return Material(
        f"{one.name} and {other.name}",
        Beginnings.of([*one.known.texts(), *other.known.texts()]),
        np.concatenate([one.prompts, other.prompts]),
        one.beside + other.beside,
        _joined(one.tried, other.tried),
        (*one.held_out, *other.held_out),
    )


def _joined(one: Excerpts, other: Excerpts) -> Excerpts:
    """The texts of both, whose continuations are equally long."""
    width = max(one.rows.shape[1], other.rows.shape[1])
    rows = [np.pad(own.rows, ((0, 0), (0, width - own.rows.shape[1]))) for own in (one, other)]
    contexts = [np.broadcast_to(np.asarray(own.context, np.int32), len(own.rows)) for own in (one, other)]
    return Excerpts(np.concatenate(rows), np.concatenate(contexts), one.too_short + other.too_short)


def own_answers(params: Params, tokenizer: Tokenizer, texts: Texts) -> Material:
    """What the full model makes of the prompts of the package.

    These are questions, in the model's chat template where it has one, and openings of texts, as they are. Those that
    the model has no room for are left out.

    Args:
        params: dense weights.
        tokenizer: of the model.
        texts: how many are judged by, how many tokens of each answer, and the seed; its prompt lengths do not count.

    Raises:
        CoreInferError: a model without room for the prompts and answers, or one whose answers are too short.
    """
    asked, _ = prompt_halves(params, tokenizer, texts)
    long = max(texts.continuation + 1, LEARNT)
    drawn = [_answered(params, asked, long, texts.seed + draw * 2 * len(asked)) for draw in range(ANSWERS)]
    known = [answer for answers in drawn for answer in answers]
    return Material(
        OWN,
        Beginnings.of([[*prompt, *answer] for prompt, answer in known]),
        np.array([len(prompt) for prompt, _ in known], np.int32),
        (),
        _excerpts(drawn[0], LAYER_TEXTS, texts.continuation),
        (judged_answers(params, tokenizer, texts),),
    )


def judged_answers(params: Params, tokenizer: Tokenizer, texts: Texts) -> Excerpts:
    """The part of `own_answers` that nothing is learnt from; arguments and errors are its."""
    _, asked = prompt_halves(params, tokenizer, texts)
    return _excerpts(_answered(params, asked, texts.continuation + 1, texts.seed), texts.texts, texts.continuation)


def prompt_halves(params: Params, tokenizer: Tokenizer, texts: Texts) -> tuple[list[list[int]], list[list[int]]]:
    """The prompts of the package that there is room for, in an order drawn by the seed: to learn from, to judge by.

    Arguments and errors are those of `own_answers`.
    """
    room = params.config.max_positions - texts.continuation - 1
    prompts = [prompt for prompt in _prompts(tokenizer) if len(prompt) <= room]
    if len(prompts) < 2 * LEAST_TEXTS:
        raise CoreInferError(
            f"{params.config.max_positions} positions have no room for the prompts of the package and answers of "
            f"{texts.continuation + 1} tokens; take shorter continuations, or texts of your own"
        )
    drawn = [prompts[i] for i in np.random.default_rng(texts.seed).permutation(len(prompts))]
    middle = len(prompts) // 2
    return drawn[:middle], drawn[middle:]


def _prompts(tokenizer: Tokenizer) -> list[list[int]]:
    questions = read_utf8(PROMPTS / QUESTIONS)[0].splitlines()
    openings = split_at_separators(read_utf8(PROMPTS / OPENINGS)[0])
    if not tokenizer.has_chat_template:
        return [tokenizer.encode(text) for text in (*questions, *openings)]
    asked = [tokenizer.encode_chat([{"role": "user", "content": question}]) for question in questions]
    return [*asked, *(tokenizer.encode(opening) for opening in openings)]


Answered = tuple[list[int], list[int]]


def _answered(params: Params, prompts: Sequence[list[int]], new: int, seed: int) -> list[Answered]:
    """Each prompt with the full model's answer of at most `new` tokens, and no more than there is room for."""
    config = params.config
    # Those of like length together: one program serves nearly all of them.
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: dict[int, list[int]] = {}
    for chosen, real in batches(len(prompts), ROWS, "the model answers"):
        numbers = [by_length[i] for i in chosen]
        out = generate(
            params,
            [prompts[i] for i in numbers],
            None,
            max_new_tokens=min(new, config.max_positions - max(len(prompts[i]) for i in numbers)),
            temperature=TEMPERATURE,
            key=seed + int(chosen[0]),
            eos_ids=config.eos_ids,
        )
        rows = zip(numbers, out.tokens, out.lengths, strict=True)
        answers |= {i: row[:length].tolist() for i, row, length in list(rows)[:real]}
    return [(prompt, answers[i]) for i, prompt in enumerate(prompts)]


def _excerpts(answered: Sequence[Answered], most: int, continuation: int) -> Excerpts:
    """The first `most` prompts whose answers have enough tokens."""
    long = [one for one in answered if len(one[1]) > continuation]
    if len(long) < LEAST_TEXTS:
        raise CoreInferError(
            f"{len(long)} of {len(answered)} answers have more than {continuation} tokens, and at least {LEAST_TEXTS} "
            "are needed; take shorter continuations, or texts of your own"
        )
    chosen = long[:most]
    rows = Beginnings.of([[*prompt, *answer[: continuation + 1]] for prompt, answer in chosen]).rows
    contexts = np.array([len(prompt) for prompt, _ in chosen], np.int32)
    return Excerpts(rows, contexts, len(answered) - len(long))
