"""Options of how tokens are drawn and where to stop, which `generate`, `chat` and `batch` take, and what they mean."""

import argparse
from typing import Any

from coreinfer_jax.cli import processes
from coreinfer_jax.cli.arguments import add_lossless, add_regathering, check_text
from coreinfer_jax.engine.options import GenerateOptions, drawing_of, lossless_of
from coreinfer_jax.errors import CoreInferError
from coreinfer_jax.io.generation_config import Recommended, read_recommended
from coreinfer_jax.io.loading import model_path
from coreinfer_jax.model.config import ModelConfig
from coreinfer_jax.text import Tokenizer, end_of_turn

# Options that generation_config.json may recommend.
_RECOMMENDED = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "no_repeat_ngram_size")


def add_sampling(
    parser: argparse.ArgumentParser, temperature: float, new_tokens: int, offers_lossless: bool = True
) -> None:
    """How tokens are drawn, and when to stop; `temperature` is for models that recommend none."""
    parser.set_defaults(usual_temperature=temperature, lossless=False, regather_at=None)
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help=f"default {new_tokens}, if there is room")
    usual = "default: as the model's generation_config.json recommends"
    parser.add_argument(
        "--temperature", type=float, help=f"0 takes the most probable token; {usual}, else {temperature:g}"
    )
    parser.add_argument("--top-k", type=int, metavar="K", help=f"draw among the K most probable; {usual}")
    parser.add_argument("--top-p", type=float, metavar="P", help=f"draw among those that hold this share; {usual}")
    parser.add_argument(
        "--min-p", type=float, metavar="P", help=f"draw among those at least P times as probable as the best; {usual}"
    )
    parser.add_argument(
        "--repetition-penalty",
        type=float,
        metavar="X",
        help=f"above 1, tokens of the text become less probable; {usual}",
    )
    parser.add_argument(
        "--no-repeat-ngram-size", type=int, metavar="N", help=f"no N tokens stand twice in the text; {usual}"
    )
    parser.add_argument("--seed", type=int, help="for temperatures above 0 (default 0)")
    if offers_lossless:
        add_lossless(parser)
        add_regathering(parser)
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before TEXT; may be repeated")


def check_stops(options: argparse.Namespace) -> None:
    """Refuse stop strings that no text can hold."""
    if "" in options.stop:
        raise CoreInferError("--stop '': give text to stop at")
    for stop in options.stop:
        check_text("--stop text", stop)


def sampling(options: argparse.Namespace, config: ModelConfig, tokenizer: Tokenizer, is_chat: bool) -> GenerateOptions:
    """How tokens are drawn, and where to stop; what of it changes nothing is said on standard error.

    Args:
        options: of the command.
        config: of the model.
        tokenizer: its.
        is_chat: whether what is generated is a reply, which ends where the tokenizer ends a turn.

    Raises:
        CoreInferError: a setting outside its range, from the options or from the model's files.
    """
    # A special token leaves no text behind in which a stop string could be found.
    stops = {i for stop in options.stop if (i := tokenizer.special_id(stop)) is not None}
    ends = turn_ends(config, tokenizer) if is_chat else ()
    recommended = _recommended(options, config)
    given = {name: getattr(options, name) for name in _RECOMMENDED}
    drawn: dict[str, Any] = {
        "temperature": options.usual_temperature,
        **({} if recommended is None else recommended.sampling),
        **{name: value for name, value in given.items() if value is not None},
        "eos_ids": (*config.eos_ids, *stops, *ends),
        "key": options.seed or 0,
        "lossless": options.lossless,
        "regather_at": options.regather_at,
    }
    # All names in `drawn` are options; a type checker cannot know that of a dict.
    asked = GenerateOptions(**drawn)  # type: ignore[typeddict-item]
    drawing_of(asked, config)
    lossless_of(asked)
    if recommended is not None and recommended.not_honoured:
        _say(f"{recommended.where}: not honoured: {', '.join(recommended.not_honoured)}")
    if drawn["temperature"] == 0:
        _say_what_is_idle(options)
    return asked


def turn_ends(config: ModelConfig, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens that end a reply; files of a tokenizer may name more, which the model does not have."""
    return tuple(i for i in end_of_turn(tokenizer) if i < config.vocab_size)


def _recommended(options: argparse.Namespace, config: ModelConfig) -> Recommended | None:
    """What the model's files recommend; None where the most probable token is asked for, whatever they say."""
    return None if options.temperature == 0 else read_recommended(model_path(options.model), config)


def _say_what_is_idle(options: argparse.Namespace) -> None:
    idle = [name for name in ("top_k", "top_p", "min_p", "seed") if getattr(options, name) is not None]
    if idle:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in idle)
        _say(f"{names}: without effect where nothing is drawn; add a --temperature above 0")


def _say(line: str) -> None:
    processes.say(f"[{line}]")
