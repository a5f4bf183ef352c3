"""Lines of prompts to answers: what `batch` does in this process, and on a cluster in each of several."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from coreinfer_jax.cli.arguments import most_new_tokens
from coreinfer_jax.engine.batching import Finished, Prompt, generate_many
from coreinfer_jax.engine.options import GenerateOptions
from coreinfer_jax.engine.prompts import check_length, pad_prompts
from coreinfer_jax.errors import CoreInferError, one_line
from coreinfer_jax.io.batch_input import BadLine, Id, Line
from coreinfer_jax.model.config import ModelConfig
from coreinfer_jax.model.weights import Params
from coreinfer_jax.sparsity.choosers import Core, Recommended
from coreinfer_jax.sparsity.groups import Groups
from coreinfer_jax.text import Tokenizer, complete, continuation, settled

NEW_TOKENS = 128

# What `Output` writes: the line's number as `line`, its `id`, and either an `error` or a text and what it took.
Answer = dict[str, Any]


@dataclass(frozen=True)
class Common:
    """What all lines of a file have in common, as plain data, which other processes can be given.

    Attributes:
        sampling: how tokens are drawn, and where a continuation ends.
        turn_ends: tokens at which, besides, a reply ends.
        max_new_tokens: of lines that name none themselves; None for 128, or the room there is if that
            is less.
        stops: texts before which an answer ends.
        rows: that decode together.
    """

    sampling: GenerateOptions
    turn_ends: tuple[int, ...]
    max_new_tokens: int | None
    stops: tuple[str, ...]
    rows: int


@dataclass(frozen=True)
class Model:
    """What answers."""

    params: Params
    tokenizer: Tokenizer
    core: Core | Recommended
    groups: Groups | None


def answers(model: Model, common: Common, lines: Iterable[Line]) -> Iterator[Answer]:
    """An answer to each line, as they are done; lines that the model has no answer to get one with an `error`."""
    bad: deque[BadLine] = deque()
    by_number: dict[int, Line] = {}

    def refuse(line: Line, error: CoreInferError) -> None:
        bad.append(BadLine(line.number, one_line(str(error)), line.id))

    def prompts() -> Iterator[Prompt]:
        for line in lines:
            try:
                prompt = _prompt(model, common, line)
            except CoreInferError as error:
                refuse(line, error)
                continue
            by_number[line.number] = line
            yield prompt

    def is_over(prompt: Prompt, tokens: Sequence[int]) -> bool:
        return settled(continuation(model.tokenizer, prompt.tokens, tokens), common.stops)[1]

    options: Any = {**common.sampling, "groups": model.groups}
    finished = generate_many(
        model.params,
        prompts(),
        model.core,
        rows=common.rows,
        until=is_over if common.stops else None,
        refused=lambda prompt, error: refuse(by_number.pop(prompt.index), error),
        **options,
    )
    for one in finished:
        yield from _errors(bad)
        yield _answer(model, common, by_number.pop(one.prompt.index), one)
    yield from _errors(bad)


def _errors(bad: deque[BadLine]) -> Iterator[Answer]:
    while bad:
        yield error_of(bad.popleft())


def error_of(bad: BadLine) -> Answer:
    """What stands in the output for a line that cannot be answered."""
    return _named(bad.number, bad.id) | {"error": bad.error}


def _named(number: int, own: Id) -> Answer:
    return {"line": number} | ({} if own is None else {"id": own})


def _prompt(model: Model, common: Common, line: Line) -> Prompt:
    """A line for the engine.

    Raises:
        CoreInferError: the model cannot read it.
    """
    tokenizer, config = model.tokenizer, model.params.config
    is_chat = line.messages is not None
    tokens = tokenizer.encode(line.prompt or "") if line.messages is None else tokenizer.encode_chat(line.messages)
    pad_prompts([tokens], config)
    options: GenerateOptions = {"max_new_tokens": _new_tokens(common, line, config, len(tokens))}
    check_length(len(tokens), options["max_new_tokens"], config)
    if is_chat:
        options["eos_ids"] = (*common.sampling["eos_ids"], *common.turn_ends)
    return Prompt(line.number, tokens, options)


def _new_tokens(common: Common, line: Line, config: ModelConfig, prompt_tokens: int) -> int:
    asked = common.max_new_tokens if line.max_new_tokens is None else line.max_new_tokens
    return min(NEW_TOKENS, most_new_tokens(config, prompt_tokens)) if asked is None else asked


def _answer(model: Model, common: Common, line: Line, one: Finished) -> Answer:
    whole = continuation(model.tokenizer, one.prompt.tokens, one.tokens.tolist())
    text, is_stopped = settled(whole, common.stops)
    return _named(line.number, line.id) | {
        "text": text if is_stopped else complete(whole),
        "tokens": len(one.tokens),
        "reason": one.reason,
        "kept": round(float(np.mean(one.kept_neurons)) / one.mlp_size, 4),
    }
