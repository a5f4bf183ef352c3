"""`python -m benchmarks NAME` appends a measurement to results/; `... report` fills the documents from them."""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import (
    batch,
    chat_model,
    chat_questions,
    compiled,
    continuations,
    decode,
    first_answer,
    first_run,
    gguf_evidence,
    group_switch,
    keep_ratio,
    kernels,
    linear_cost,
    linear_fallback,
    linear_neurons,
    linear_votes,
    long_prompts,
    lossless,
    many_devices,
    prediction,
    profile,
    prompt_lengths,
    published,
    quality,
    report,
    same_tokens,
    shares,
    shipped_calibrations,
    static_argument,
    suite,
    sweeps,
)
from benchmarks.contenders import CONTENDERS
from benchmarks.described import DEVICES
from benchmarks.environment import RESULTS
from benchmarks.shapes import SHAPES
from coreinfer_jax.errors import CoreInferError

Measurement = Callable[[argparse.Namespace], Iterable[dict[str, Any]]]
TEXTS = Path("../shared/data/text")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one measurement, the suite or the report; mistakes get one line and exit status 2."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except CoreInferError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("benchmarks: stopped; the results that were written stay", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    commands = parser.add_subparsers(required=True, metavar="NAME")
    _add(commands, "decode", "decoding side by side with other libraries", _decode, _add_decode_options)
    _add(commands, "long-prompts", "time to the first token beside transformers", lambda _: long_prompts.measure())
    _add(commands, "sweep", "cost against one thing that grows", _sweep, _add_sweep_options)
    _add(commands, "profile", "where the time of a decode step goes", _profile, _add_profile_options)
    _add(commands, "kernels", "forms of one row times a weight", _kernels, _add_kernels_options)
    _add(commands, "compile", "programs for a device that is not there", _compile, _add_compile_options)
    _add(commands, "static-argument", "core neurons as a static argument", lambda _: [static_argument.measure()])
    _add(commands, "group-switch", "what another group costs", lambda _: [group_switch.measure()])
    _add(commands, "prediction", "what the methods cost before decoding", lambda _: [prediction.measure()])
    _add(commands, "keep-ratio", "perplexity by keep ratio", lambda o: [keep_ratio.measure(o.texts)], _add_texts)
    _add(commands, "quality", "what rules cost", lambda o: quality.measure(o.texts, o.models), _add_quality_options)
    _add(commands, "chat-model", "what fewer neurons cost SmolLM2", lambda o: chat_model.measure(o.data), _add_data)
    _add(commands, "chat-questions", "SmolLM2 on its own answers to questions", lambda _: chat_questions.measure())
    _add(commands, "prompt-lengths", "SmolLM2 by length of prompt", lambda o: prompt_lengths.measure(o.data), _add_data)
    _add(
        commands,
        "published",
        "what papers measure, on SmolLM2",
        lambda o: published.measure(o.data, o.parts),
        _add_published_options,
    )
    _add(
        commands,
        "linear-neurons",
        "what linear neurons save at equal bytes",
        lambda o: linear_neurons.measure(o.texts),
        _add_texts,
    )
    _add(commands, "linear-votes", "the same beside voted neurons", lambda o: linear_votes.measure(o.texts), _add_texts)
    _add(commands, "linear-cost", "what linear neurons take of a run", lambda _: linear_cost.measure())
    _add(
        commands,
        "linear-fallback",
        "what linear neurons without a calibration are worth",
        lambda o: linear_fallback.measure(o.data),
        _add_data,
    )
    _add(commands, "many-devices", "large models over devices that are not there", lambda _: many_devices.measure())
    _add(commands, "shares", "what it costs that devices keep their own", lambda o: shares.measure(o.texts), _add_texts)
    _add(commands, "lossless", "drafts that the full model verifies", _lossless, _add_lossless_options)
    _add(
        commands,
        "same-tokens",
        "whether lossless decoding makes the full model's tokens",
        lambda o: same_tokens.measure(o.data, tuple(o.models), o.prompts),
        _add_same_tokens_options,
    )
    _add(
        commands, "batch", "many prompts together and one by one", lambda o: batch.measure(o.models), _add_batch_options
    )
    _add(
        commands,
        "free-running",
        "what generations by themselves look like",
        lambda o: continuations.measure(o.texts, o.models),
        _add_quality_options,
    )
    _add(commands, "calibrate-embedded", "write the embedded models' calibrations", _calibrate, _add_texts)
    _add(
        commands,
        "calibrate-smollm2",
        "write SmolLM2's calibration",
        lambda options: [shipped_calibrations.write_smollm2(options.texts)],
        _add_texts,
    )
    _add(commands, "first-answer", "what SmolLM2 answers, and how fast", lambda _: [first_answer.measure()])
    _add(
        commands,
        "gguf",
        "a published GGUF file against other readers",
        lambda o: [gguf_evidence.measure(o.data)],
        _add_data,
    )
    _add(commands, "first-run", "what the embedded models write", lambda _: [first_run.measure()])
    everything = commands.add_parser("suite", help="all that docs/performance.md shows, the most important first")
    _add_suite_options(everything)
    everything.set_defaults(run=lambda options: suite.measure(options.device, options.budget, options.out))
    filled = commands.add_parser("report", help="fill the tables and draw the charts of the committed results")
    filled.set_defaults(run=lambda options: report.update())
    return parser


def _add(
    commands: Any,
    name: str,
    help_: str,
    measurement: Measurement,
    add_options: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
) -> None:
    parser = commands.add_parser(name, help=help_)
    parser.add_argument(
        "--out", type=Path, default=RESULTS / f"{name}.jsonl", help="file to append JSON lines to (%(default)s)"
    )
    add_options(parser)
    parser.set_defaults(run=lambda options: _append(measurement, options))


def _append(measurement: Measurement, options: argparse.Namespace) -> None:
    """Measure, and write each result as soon as it is there."""
    try:
        file = options.out.open("a", encoding="utf-8")
    except OSError as error:
        raise CoreInferError(f"--out {options.out}: {error.strerror}; name a file that can be written") from error
    with file:
        for result in measurement(options):
            file.write(json.dumps(result) + "\n")
            file.flush()


def _calibrate(options: argparse.Namespace) -> list[dict[str, Any]]:
    return [shipped_calibrations.write(options.texts)]


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, default=TEXTS.parent, help="folder of the folders text and tasks")


def _add_published_options(parser: argparse.ArgumentParser) -> None:
    _add_data(parser)
    parser.add_argument("--parts", nargs="+", choices=published.PARTS, default=published.PARTS, help="default: all")


def _add_lossless_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", default=lossless.MODELS, help="(%(default)s)")
    parser.add_argument(
        "--mlps-on-host", action="store_true", help="move them for each pass; convert GGUF files before, which are slow"
    )


def _add_batch_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", default=batch.MODELS, help="(%(default)s)")


def _add_same_tokens_options(parser: argparse.ArgumentParser) -> None:
    _add_data(parser)
    parser.add_argument("--models", nargs="+", default=same_tokens.MODELS, help="(%(default)s)")
    parser.add_argument("--prompts", type=int, default=same_tokens.PROMPTS, help="of each model (%(default)s)")


def _lossless(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    return lossless.measure(tuple(options.models), options.mlps_on_host)


def _add_texts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--texts", type=Path, default=TEXTS, help="folder of stories.txt and prose.txt")


def _add_quality_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--texts", type=Path, default=TEXTS, help="folder of the text files")
    parser.add_argument("--models", type=Path, default=TEXTS.parent / "models", help="folder of tinystories-656k")


def _add_decode_options(parser: argparse.ArgumentParser) -> None:
    plan = decode.Plan("")
    parser.add_argument("--model", required=True, help=f"{', '.join(SHAPES)}, or a config.json")
    parser.add_argument("--layers", type=int, help="cut the model to so many layers")
    parser.add_argument("--contenders", nargs="+", help=f"some of {', '.join(CONTENDERS)}; default: all there are")
    parser.add_argument(
        "--dtypes", nargs="+", default=plan.dtypes, choices=plan.dtypes, help="of ours and transformers"
    )
    parser.add_argument("--keeps", nargs="+", type=float, default=plan.keeps, help="keep ratios (%(default)s)")
    parser.add_argument("--prompt-tokens", type=int, default=plan.prompt_tokens, help="(%(default)s)")
    parser.add_argument("--new-tokens", type=int, default=plan.new_tokens, help="(%(default)s)")
    parser.add_argument("--rows", type=int, default=plan.rows, help="batch size (%(default)s)")
    parser.add_argument("--rounds", type=int, default=plan.rounds, help="turns of every contender (%(default)s)")


def _add_sweep_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--over", nargs="+", choices=sweeps.AXES, default=tuple(sweeps.AXES), help="default: all")
    parser.add_argument("--model", default="opt-125m", help="as for decode (%(default)s)")
    parser.add_argument("--layers", type=int, help="cut the model to so many layers")
    parser.add_argument("--dtype", default="float32", choices=decode.DTYPES, help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of every point (%(default)s)")


def _add_profile_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="as for decode")
    parser.add_argument("--layers", type=int, help="cut the model to so many layers")
    parser.add_argument("--dtype", default="float32", choices=decode.DTYPES, help="(%(default)s)")
    parser.add_argument("--keep", type=float, help="keep ratio; all neurons without")


def _add_kernels_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="as for decode")
    parser.add_argument("--layers", type=int, help="cut the model to so many layers")
    parser.add_argument("--dtype", default="bfloat16", choices=decode.DTYPES, help="(%(default)s)")
    parser.add_argument("--keep", type=float, default=0.2, help="keep ratio of the narrowed weights (%(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="turns of every form (%(default)s)")


def _add_suite_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help=f"{' or '.join(suite.SUITES)}; default: this machine's")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="of all; default: 1500 on a GPU, else no limit")
    parser.add_argument("--out", type=Path, help="one file to append all results to; default: each to its own")


def _add_compile_options(parser: argparse.ArgumentParser) -> None:
    asked = compiled.Asked("", "")
    parser.add_argument("--device", choices=tuple(DEVICES), required=True)
    parser.add_argument("--model", required=True, help="as for decode")
    parser.add_argument("--layers", type=int, help="cut the model to so many layers")
    parser.add_argument("--keeps", nargs="+", type=float, default=asked.keeps[1:], help="keep ratios (%(default)s)")
    parser.add_argument("--rows", type=int, default=asked.rows, help="batch size (%(default)s)")
    parser.add_argument("--shared", action="store_true", help="one core set for all rows; default: one for each")
    parser.add_argument("--prefill", type=int, default=asked.prompt_tokens, metavar="TOKENS", help="(%(default)s)")
    parser.add_argument("--capacity", type=int, default=asked.capacity, help="positions of the cache (%(default)s)")
    parser.add_argument("--programs", nargs="+", default=asked.programs, choices=asked.programs, help="default: all")


def _compile(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    asked = compiled.Asked(
        device=options.device,
        model=options.model,
        layers=options.layers,
        keeps=(None, *options.keeps),
        rows=options.rows,
        per_row=not options.shared,
        prompt_tokens=options.prefill,
        capacity=options.capacity,
        programs=tuple(options.programs),
    )
    return compiled.measure(asked)


def _kernels(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    return kernels.measure(options.model, options.layers, options.dtype, options.keep, options.rounds)


def _profile(options: argparse.Namespace) -> Iterable[dict[str, Any]]:
    return [profile.measure(options.model, options.layers, options.dtype, options.keep)]


def _sweep(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    common = (options.model, options.layers, options.dtype, options.rounds)
    return (sweeps.measure(over, *common) for over in options.over)


def _decode(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    plan = decode.Plan(
        model=options.model,
        layers=options.layers,
        contenders=None if options.contenders is None else tuple(options.contenders),
        dtypes=tuple(options.dtypes),
        keeps=tuple(options.keeps),
        prompt_tokens=options.prompt_tokens,
        new_tokens=options.new_tokens,
        rows=options.rows,
        rounds=options.rounds,
    )
    results: list[dict[str, Any]] = []
    try:
        for results in decode.measure(plan):
            yield from results
    finally:
        if results:
            print(decode.table(results))


if __name__ == "__main__":
    sys.exit(main())
