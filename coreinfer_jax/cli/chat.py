"""`coreinfer chat`: turn after turn in a terminal."""

import argparse
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from types import FrameType

from coreinfer_jax.cli import arguments, drawing
from coreinfer_jax.cli.reply import Reply, facts
from coreinfer_jax.engine.conversation import Conversation, converse
from coreinfer_jax.engine.generation import make_request
from coreinfer_jax.engine.options import GenerateOptions
from coreinfer_jax.engine.prompts import check_length
from coreinfer_jax.errors import CoreInferError, one_line
from coreinfer_jax.model.weights import Params
from coreinfer_jax.sparsity.choice import Chooser
from coreinfer_jax.sparsity.choosers import Recommended
from coreinfer_jax.sparsity.groups import Groups
from coreinfer_jax.text import Tokenizer

HELP = "talk to a model, its core neurons chosen anew each turn"
NEW_TOKENS = 256
RESET, END = "/reset", "/exit"
WHEN_FULL = ("trim", "wait")
# The share of the model's positions that a reply has at least, if it asks for so many, and the share that a trimmed
# conversation takes at most. That is less than it might, because the model reads what was trimmed anew.
LEAST_FOR_REPLY, MOST_AFTER_TRIMMING = 1 / 4, 1 / 2
_REMEDY = {"trim": "the next turn takes some", "wait": f"{RESET} starts over"}
Message = dict[str, str]


@dataclass(frozen=True)
class _Model:
    """What answers, by which core neurons, and how its tokens are drawn in the first turn."""

    params: Params
    tokenizer: Tokenizer
    core: Chooser | Recommended | None
    groups: Groups | None
    drawn: GenerateOptions


@dataclass(frozen=True)
class _Session:
    """What was said, and what the model has read of it."""

    messages: tuple[Message, ...]
    conversation: Conversation | None = None


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    arguments.add_model(parser)
    arguments.add_mesh(parser)
    arguments.add_device_memory(parser)
    arguments.add_core(parser)
    drawing.add_sampling(parser, temperature=0.7, new_tokens=NEW_TOKENS)
    parser.add_argument("--system", metavar="TEXT", help="what the chat template puts before the conversation")
    parser.add_argument(
        "--when-full",
        choices=WHEN_FULL,
        default=WHEN_FULL[0],
        help=f"what a conversation that fills the model's positions does: lose its oldest turns, or wait for {RESET} "
        "(%(default)s)",
    )
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    arguments.core_config(options)
    drawing.check_stops(options)
    if options.system is not None:
        arguments.check_text("system message", options.system)
    budget = arguments.device_memory(options)
    open_model = arguments.load_model if budget is None else arguments.unloaded_model
    params, tokenizer = open_model(options)
    check_length(1, _most(options), params.config)
    drawn = drawing.sampling(options, params.config, tokenizer, is_chat=True)
    if budget is not None:
        drawn["device_memory"] = budget
    model = _Model(params, tokenizer, *arguments.core_and_groups(options, params), drawn)
    opening = () if options.system is None else ({"role": "system", "content": options.system},)
    if not tokenizer.has_chat_template:
        if opening:
            raise CoreInferError("--system: this model has no chat template to put it in; leave the option out")
        _say("[no chat template: what you write and what the model answers is one text that it continues]")
    if budget is not None:
        _plan(options, model, opening)
        params = arguments.planned_model(options)
        model = _Model(params, tokenizer, *arguments.core_and_groups(options, params), drawn)
    if find_spec("readline"):
        import readline  # noqa: F401 - gives input() editing and history
    _say(f"[{RESET} forgets the conversation, {END} or Ctrl-D ends, Ctrl-C stops a reply]")
    with _handler(signal.default_int_handler):
        _converse(options, model, opening)


def _plan(options: argparse.Namespace, model: _Model, opening: tuple[Message, ...]) -> None:
    """Say on standard error what a first turn takes that is as short as any, or refuse it."""
    prompt = _encode(model.tokenizer, (*opening, {"role": "user", "content": "?"}))
    make_request(model.params, [prompt], model.core, _wanted(options, model, prompt))


def _converse(options: argparse.Namespace, model: _Model, opening: tuple[Message, ...]) -> None:
    """Turn after turn, from `opening` on, until the user ends."""
    session = _Session(opening)
    for turn, line in enumerate(_lines()):
        if line == RESET:
            session = _Session(opening)
            _say("[the conversation is forgotten]")
            continue
        try:
            session = _turn(options, model, session, line, turn)
        except CoreInferError as error:
            _say(f"\ncoreinfer: error: {one_line(str(error))} ({RESET} starts over)")
            session = _still_alive(session)
        except KeyboardInterrupt:
            _say("\n[interrupted]")
            session = _still_alive(session)


def _most(options: argparse.Namespace) -> int:
    """New tokens a reply may have, if there is room."""
    return NEW_TOKENS if options.max_new_tokens is None else int(options.max_new_tokens)


def _still_alive(session: _Session) -> _Session:
    """`session`, to be read anew where a reply that came to nothing has taken the memory of what was read."""
    alive = session.conversation is not None and session.conversation.past.is_alive
    return session if alive else replace(session, conversation=None)


def _lines() -> Iterator[str]:
    """What the user types, line by line; empty ones are passed over, Ctrl-C clears one."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            _say("")
            return
        except KeyboardInterrupt:
            _say("")
            continue
        if line.strip() == END:
            return
        if line.strip():
            yield line.strip()


def _turn(options: argparse.Namespace, model: _Model, session: _Session, line: str, turn: int) -> _Session:
    """The session after one line of the user and the model's reply to it, which is printed as it comes."""
    arguments.check_text("line", line)
    params, tokenizer = model.params, model.tokenizer
    messages = (*session.messages, {"role": "user", "content": line})
    if options.when_full == "trim":
        messages = _trimmed(messages, model, _most(options))
    prompt = _encode(tokenizer, messages)
    chunks = converse(params, prompt, session.conversation, model.core, **_wanted(options, model, prompt, turn))
    reply = Reply(tokenizer, prompt, options.stop)
    with _interruptible() as interrupted:
        for chunk, latest in chunks:
            conversation = latest
            print(reply.add(chunk), end="", flush=True)
            if reply.stopped or interrupted:
                break
    print(reply.finish(), flush=True)
    full = len(prompt) + len(reply.tokens) >= params.config.max_positions
    _say(
        facts(chunk.stats, len(reply.tokens), model.groups)
        + (" [stopped]" if interrupted else "")
        + (f" [no room is left: {_REMEDY[options.when_full]}]" if full else "")
    )
    return replace(
        session, messages=(*messages, {"role": "assistant", "content": reply.text}), conversation=conversation
    )


def _wanted(options: argparse.Namespace, model: _Model, prompt: list[int], turn: int = 0) -> GenerateOptions:
    """What `converse` is given in a turn besides the model and the tokens."""
    new = min(_most(options), arguments.most_new_tokens(model.params.config, len(prompt)))
    key = (options.seed or 0) + turn
    return model.drawn | {"key": key % 2**63, "groups": model.groups, "max_new_tokens": new}


def _trimmed(messages: tuple[Message, ...], model: _Model, reply_tokens: int) -> tuple[Message, ...]:
    """`messages` without their oldest turns, as many as it takes for a reply to have room; this is said."""
    positions, kept = model.params.config.max_positions, messages
    room = positions - len(_encode(model.tokenizer, messages))
    if room >= min(reply_tokens, int(LEAST_FOR_REPLY * positions)):
        return messages
    while _turns(kept) > 1 and len(_encode(model.tokenizer, kept)) > MOST_AFTER_TRIMMING * positions:
        kept = _without_oldest_turn(kept)
    if turns := _turns(messages) - _turns(kept):
        _say(f"[no room was left: the oldest {turns} turn{'s are' if turns > 1 else ' is'} forgotten]")
    return kept


def _turns(messages: tuple[Message, ...]) -> int:
    return sum(message["role"] == "user" for message in messages)


def _without_oldest_turn(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """`messages` without the first of the user and its reply; what comes before them stays."""
    first = next(i for i, message in enumerate(messages) if message["role"] == "user")
    return messages[:first] + messages[first + 2 :]


def _encode(tokenizer: Tokenizer, messages: tuple[Message, ...]) -> list[int]:
    """The conversation by the chat template; without one its running text, every turn of the user a new paragraph."""
    if tokenizer.has_chat_template:
        return tokenizer.encode_chat(messages)
    paragraphs = [
        ("\n\n" if i and message["role"] == "user" else "") + message["content"] for i, message in enumerate(messages)
    ]
    return tokenizer.encode("".join(paragraphs))


@contextmanager
def _interruptible() -> Iterator[list[int]]:
    """A list that the first Ctrl-C makes non-empty, so that what runs ends in order; the second one interrupts."""
    pressed: list[int] = []

    def press(number: int, _: FrameType | None) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    with _handler(press):
        yield pressed


@contextmanager
def _handler(press: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """What Ctrl-C does meanwhile, in the place of what it does to other commands, which is to end them."""
    before = signal.signal(signal.SIGINT, press)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
