"""Many prompts through few rows: a finished row's place is taken by the next prompt."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Unpack

import jax
import numpy as np

from coreinfer_jax.checks import check_whole
from coreinfer_jax.device import check_memory
from coreinfer_jax.engine.generation import make_request
from coreinfer_jax.engine.loop import Begun, begin
from coreinfer_jax.engine.options import GenerateOptions, drawing_of
from coreinfer_jax.engine.programs import DISPATCH
from coreinfer_jax.engine.request import Request
from coreinfer_jax.engine.running import advance, insert_request, start
from coreinfer_jax.errors import CoreInferError, shown
from coreinfer_jax.model.cache import cache_bytes
from coreinfer_jax.model.host import check_on_device
from coreinfer_jax.model.shards import bytes_in_a_memory
from coreinfer_jax.model.weights import Params, check_dense
from coreinfer_jax.sparsity.choice import Choice
from coreinfer_jax.sparsity.choosers import Core, Recommended, chooser_for
from coreinfer_jax.sparsity.narrow import narrowed_bytes

ROWS = 8
# Prompts that are read ahead, to be sorted by length: no prompt waits until more than so many later ones are read.
WINDOW = 512
# Decode steps between two looks at which rows have finished, where prompts wait for their places.
STEPS = 8
# What a step of many rows has no use for.
_ELSEWHERE = ("lossless", "regather_at", "device_memory", "device_rows")
# What a key can be folded with.
_MOST_INDEX = 2**32 - 1

# Whether a prompt's text is complete with these new tokens, for reasons that only its caller knows.
Until = Callable[["Prompt", Sequence[int]], bool]
# Told of a prompt that cannot be answered, and why.
Refused = Callable[["Prompt", CoreInferError], None]


@dataclass(frozen=True)
class Prompt:
    """A prompt of `generate_many`.

    Attributes:
        index: what identifies it, from 0 to 2^32 - 1; at a temperature, its draws follow from it.
        tokens: int [T].
        options: those in which it differs from the others; a `key` of its own is used as it is.
    """

    index: int
    tokens: Sequence[int]
    options: GenerateOptions = field(default_factory=GenerateOptions)

    def __post_init__(self) -> None:
        check_whole("index", self.index, 0)
        if self.index > _MOST_INDEX:
            raise CoreInferError(f"index={shown(self.index)}: give at most {_MOST_INDEX}")


@dataclass(frozen=True)
class Finished:
    """What became of a prompt.

    Attributes:
        prompt: it.
        tokens: int32 [n], new tokens, an EOS counted.
        reason: `stop` where an EOS or the caller's `until` has ended it, `length` where its new tokens are used up.
        kept_neurons: neurons per layer that its decode steps used, F where a layer is dense.
        mlp_size: F.
        choice: how its core neurons were found.
    """

    prompt: Prompt
    tokens: np.ndarray
    reason: Literal["stop", "length"]
    kept_neurons: tuple[int, ...]
    mlp_size: int
    choice: Choice


def _raise(prompt: Prompt, error: CoreInferError) -> None:
    raise CoreInferError(f"prompt {prompt.index}: {error}") from error


def generate_many(
    params: Params,
    prompts: Iterable[Prompt | Sequence[int]],
    core: Core | Recommended = "recommended",
    *,
    rows: int = ROWS,
    until: Until | None = None,
    refused: Refused = _raise,
    **options: Unpack[GenerateOptions],
) -> Iterator[Finished]:
    """Generate from any number of prompts, several at a time, each as by itself.

    The full model reads each prompt alone and chooses its core neurons; then it takes the place of a prompt that has
    finished in a state of `rows` rows, which decode together. Up to 512 prompts are read ahead and sorted by the
    positions that they need, so that few programs are compiled. In float32 the tokens are those of `generate`; with 16
    bits the rounding of a step depends on its number of rows.

    Args:
        params: dense weights, from `load`, on the device.
        prompts: rows of token ids, which are numbered from 0, or each a `Prompt`; read as they are needed.
        core: as for `generate`. Every prompt is a batch of its own, so `per_row` makes no difference.
        rows: how many decode together (B).
        until: called with a prompt and its tokens after each new one; True ends it there.
        refused: called with a prompt that cannot be answered, such as one that there is no memory for, and with the
            error; the others go on. By default the error is raised.
        **options: see `GenerateOptions`; those of a `Prompt` come before these. A prompt draws as alone with the key
            `jax.random.fold_in(key, index)`, whatever is run beside it. `lossless`, `regather_at`, `device_memory`
            and `device_rows` are refused.

    Returns:
        An iterator over what becomes of each prompt, in the order in which they finish.

    Raises:
        CoreInferError: at the call what `generate` refuses; later what it refuses of a prompt, and rows that do not
            fit the device, unless `refused` takes the error.
    """
    check_whole("rows", rows, 1)
    check_dense(params)
    check_on_device(params, "generate_many")
    _check_options(options)
    drawing_of(options, params.config)
    chooser_for(params, core).check(params, options.get("groups"), 1)
    waiting = _Waiting(_requests(params, prompts, core, options, refused))
    return _scheduled(waiting, rows, until, refused)


def _check_options(options: GenerateOptions) -> None:
    given: Any = options
    if used := [name for name in _ELSEWHERE if given.get(name) is not None and given[name] is not False]:
        raise CoreInferError(
            f"{used[0]}={given[used[0]]}: rows that come and go have none; leave it out, or use generate"
        )


def _numbered(prompts: Iterable[Prompt | Sequence[int]]) -> Iterator[Prompt]:
    for index, prompt in enumerate(prompts):
        yield prompt if isinstance(prompt, Prompt) else Prompt(index, prompt)


@dataclass(frozen=True)
class _Asked:
    prompt: Prompt
    request: Request


def _requests(
    params: Params,
    prompts: Iterable[Prompt | Sequence[int]],
    core: Core | Recommended,
    options: GenerateOptions,
    refused: Refused,
) -> Iterator[_Asked]:
    for prompt in _numbered(prompts):
        try:
            asked = _asked(params, prompt, core, options)
        except CoreInferError as error:
            refused(prompt, error)
            continue
        yield asked


def _asked(params: Params, prompt: Prompt, core: Core | Recommended, options: GenerateOptions) -> _Asked:
    """A prompt as a request of one row."""
    _check_options(prompt.options)
    own: Any = {**options, **prompt.options}
    drawing = drawing_of(own, params.config)
    if drawing.key is not None and "key" not in prompt.options:
        own["key"] = jax.random.fold_in(drawing.key, np.uint32(prompt.index))
    return _Asked(prompt, make_request(params, [prompt.tokens], core, own))


class _Waiting:
    """Prompts that wait, by the positions that they need, in the order in which they came."""

    def __init__(self, source: Iterator[_Asked]) -> None:
        self._source: Iterator[tuple[int, _Asked]] = enumerate(source)
        self._queues: dict[int, deque[tuple[int, _Asked]]] = {}
        self._read = 0

    def oldest_capacity(self) -> int | None:
        """The positions that the prompt needs which has waited longest; None where none waits."""
        self._fill()
        return min(self._queues, key=lambda capacity: self._queues[capacity][0][0], default=None)

    def take(self, capacity: int) -> _Asked | None:
        """The next prompt of so many positions; None where none waits."""
        self._fill()
        queue = self._queues.get(capacity)
        if queue is None:
            return None
        _, asked = queue.popleft()
        if not queue:
            del self._queues[capacity]
        return asked

    def has(self, capacity: int) -> bool:
        """Whether a prompt of so many positions waits."""
        self._fill()
        return capacity in self._queues

    def _fill(self) -> None:
        """Read on, until the oldest prompt has seen so many later ones."""
        while not self._queues or self._read < WINDOW + min(queue[0][0] for queue in self._queues.values()):
            read = next(self._source, None)
            if read is None:
                return
            self._read = read[0] + 1
            self._queues.setdefault(read[1].request.capacity, deque()).append(read)


@dataclass(frozen=True)
class _Kind:
    """What requests that share a state have in common."""

    capacity: int
    widths: tuple[int, ...] | None
    linear: tuple[bool, ...] | None
    draws: bool
    looks_back: bool


def _kind_of(asked: _Asked, begun: Begun) -> _Kind:
    request, core = asked.request, begun.chosen.core
    widths = None if core is None else core.kept(request.params.config.mlp_size)
    linear = None if core is None else core.linear
    return _Kind(request.capacity, widths, linear, request.drawing.key is not None, request.looks_back)


@dataclass
class _Work:
    """A prompt at work in a row."""

    asked: _Asked
    begun: Begun
    until: Until | None
    tokens: list[int] = field(default_factory=list)
    is_stopped: bool = False

    def add(self, new: Iterable[int]) -> None:
        """Its next tokens, as far as they are its own."""
        eos_ids = self.asked.request.drawing.eos_ids
        for token in new:
            if self.is_over:
                return
            self.tokens.append(token)
            ends = self.until is not None and self.until(self.asked.prompt, self.tokens)
            self.is_stopped = ends or token in eos_ids

    @property
    def is_over(self) -> bool:
        """Whether it is complete."""
        return self.is_stopped or self.left == 0

    @property
    def left(self) -> int:
        """Tokens that it may still make."""
        return self.asked.request.max_new_tokens - len(self.tokens)

    def finished(self) -> Finished:
        """What became of it."""
        stats = self.begun.stats
        return Finished(
            prompt=self.asked.prompt,
            tokens=np.array(self.tokens, np.int32),
            reason="stop" if self.is_stopped else "length",
            kept_neurons=stats.kept_neurons,
            mlp_size=stats.mlp_size,
            choice=stats.choices[0],
        )


class _Lane:
    """A running state, and the prompts in its rows."""

    def __init__(self, params: Params, kind: _Kind, rows: int) -> None:
        _check_memory(params, kind, rows)
        self._running = start(
            params, rows, kind.capacity, kind.widths, kind.linear, draws=kind.draws, looks_back=kind.looks_back
        )
        self._rows: list[_Work | None] = [None] * rows

    @property
    def has_room(self) -> bool:
        """Whether a row is free."""
        return None in self._rows

    @property
    def is_busy(self) -> bool:
        """Whether a row is at work."""
        return any(self._rows)

    def insert(self, work: _Work) -> None:
        """Put a prompt into a free row."""
        row = self._rows.index(None)
        self._running = insert_request(self._running, row, work.begun)
        self._rows[row] = work

    def advance(self, most: int, *, waited_for: bool) -> Iterator[Finished]:
        """Decode up to `most` steps; what has finished.

        Where its rows are waited for, none behind the end of the one that is known to end first.
        """
        at_work = [(row, work) for row, work in enumerate(self._rows) if work is not None]
        if not at_work:
            return
        steps = min(most, *(work.left for _, work in at_work)) if waited_for else most
        self._running, tokens, lengths = advance(self._running, steps)
        for row, work in at_work:
            work.add(tokens[row, : lengths[row]].tolist())
            if work.is_over:
                self._rows[row] = None
                yield work.finished()


def _check_memory(params: Params, kind: _Kind, rows: int) -> None:
    config = params.config
    cache = cache_bytes(config, rows, kind.capacity, params.dtype)
    widths = [] if kind.widths is None else [0 if width == config.mlp_size else width for width in kind.widths]
    narrowed = sum(narrowed_bytes(params, (l,), width, rows) for l, width in enumerate(widths))
    needed = bytes_in_a_memory(cache + narrowed, params.mesh)
    check_memory(needed, f"{rows} rows of {kind.capacity} positions", "take fewer rows or tokens")


def _scheduled(waiting: _Waiting, rows: int, until: Until | None, refused: Refused) -> Iterator[Finished]:
    while (capacity := waiting.oldest_capacity()) is not None:
        yield from _of_capacity(waiting, capacity, rows, until, refused)


def _of_capacity(
    waiting: _Waiting, capacity: int, rows: int, until: Until | None, refused: Refused
) -> Iterator[Finished]:
    """All prompts of so many positions, as long as there are any within the window.

    Where a prompt decides how many neurons it keeps, there are several states: each takes the prompts that fit it.
    """
    lanes: dict[_Kind, _Lane] = {}
    while (asked := waiting.take(capacity)) is not None:
        work = yield from _placed(asked, lanes, rows, until, refused)
        if work is None:
            continue
        if work.is_over:
            yield work.finished()
            continue
        # Until there is room in each: which of them the next prompt needs is known once it is read.
        while waiting.has(capacity) and not all(lane.has_room for lane in lanes.values()):
            for lane in lanes.values():
                yield from lane.advance(STEPS, waited_for=True)
    yield from _ended(lanes)


def _ended(lanes: dict[_Kind, _Lane]) -> Iterator[Finished]:
    """All that is at work, to its end."""
    while any(lane.is_busy for lane in lanes.values()):
        for lane in lanes.values():
            yield from lane.advance(DISPATCH, waited_for=False)


def _placed(
    asked: _Asked, lanes: dict[_Kind, _Lane], rows: int, until: Until | None, refused: Refused
) -> Generator[Finished, None, _Work | None]:
    """A prompt at work, or None where it was refused.

    Whether it is does not depend on the others: where it has no place beside them, they end first and make room.
    """
    is_alone = not lanes
    try:
        return _put(asked, lanes, rows, until)
    except CoreInferError as error:
        if is_alone:
            refused(asked.prompt, error)
            return None
    yield from _ended(lanes)
    lanes.clear()
    return (yield from _placed(asked, lanes, rows, until, refused))


def _put(asked: _Asked, lanes: dict[_Kind, _Lane], rows: int, until: Until | None) -> _Work:
    """A prompt with its first token and, if there are to be more, in a row of the state of its kind."""
    work = _Work(asked, begin(asked.request), until)
    work.add(np.array(work.begun.rows.token).tolist())
    if work.is_over:
        return work
    kind = _kind_of(asked, work.begun)
    if kind not in lanes:
        lanes[kind] = _Lane(asked.request.params, kind, rows)
    lanes[kind].insert(work)
    return work
