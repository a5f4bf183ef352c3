"""`coreinfer batch`."""

import argparse
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import jax
import numpy as np

from coreinfer_jax.checks import check_whole
from coreinfer_jax.cli import arguments, drawing, on_ray
from coreinfer_jax.cli.answering import NEW_TOKENS, Answer, Common, Model, answers, error_of
from coreinfer_jax.engine.batching import ROWS
from coreinfer_jax.errors import CoreInferError
from coreinfer_jax.files import check_new_file, to_path
from coreinfer_jax.io.batch_input import BadLine, Line, Summary, read_lines, summarise
from coreinfer_jax.io.batch_output import Output, opened, settings_path
from coreinfer_jax.model.fingerprint import fingerprint
from coreinfer_jax.progress import progress
from coreinfer_jax.sparsity.choice import Chooser
from coreinfer_jax.sparsity.choosers import resolved, settings_of

HELP = "continue many prompts: JSON lines in, JSON lines out"


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("--input", required=True, metavar="FILE", help='lines {"prompt": ...} or {"messages": ...}')
    parser.add_argument(
        "--output", required=True, metavar="FILE", help="where a line for each goes; gone on with where it exists"
    )
    parser.add_argument("--in-order", action="store_true", help="write in the order of the input; default: as they end")
    parser.add_argument("--skip-bad", action="store_true", help="report lines that cannot be answered, and go on")
    parser.add_argument(
        "--rows", type=int, default=ROWS, metavar="N", help="prompts that decode together (%(default)s)"
    )
    on_ray.add_options(parser)
    arguments.add_model(parser)
    arguments.add_mesh(parser)
    arguments.add_core(parser)
    drawing.add_sampling(parser, temperature=0.0, new_tokens=NEW_TOKENS, offers_lossless=False)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    check_whole("--rows", options.rows, 1)
    if options.max_new_tokens is not None:
        check_whole("--max-new-tokens", options.max_new_tokens, 1)
    source, target = _paths(options)
    arguments.core_config(options)
    drawing.check_stops(options)
    on_ray.check(options)
    summary = summarise(source)
    if summary.bad and not options.skip_bad:
        raise _bad(source, summary.bad[0].number, summary.bad[0].error, len(summary.bad))
    check_new_file(settings_path(target))
    if options.ray is None:
        model = load_model(options)
    else:
        on_ray.begin(options)
        model = _model_to_plan_with(options)
    common = _common(options, model)
    settings = _settings(options, summary, model, common)
    with opened(target, settings, summary.lines, options.in_order) as output:
        lines = (line for line in read_lines(source) if line.number not in output.done)
        here = options.ray is None
        made = _answered_here(model, common, lines) if here else on_ray.answered(options, common, lines)
        _write(output, made, options, source, summary)


def _paths(options: argparse.Namespace) -> tuple[Path, Path]:
    source, target = to_path(options.input), to_path(options.output)
    if target.exists() and source.exists() and target.samefile(source):
        raise CoreInferError(f"--output {target}: is the input; name another file")
    return source, target


def load_model(options: argparse.Namespace) -> Model:
    """The model that the options name, on the device."""
    params, tokenizer = arguments.load_model(options)
    return Model(params, tokenizer, *arguments.core_and_groups(options, params))


def _model_to_plan_with(options: argparse.Namespace) -> Model:
    """The same where other processes have devices: this one takes none, and reads no weights that it need not."""
    params, tokenizer = arguments.unloaded_model(argparse.Namespace(**vars(options) | {"device": "cpu"}))
    return Model(params, tokenizer, *arguments.core_and_groups(options, params))


def _common(options: argparse.Namespace, model: Model) -> Common:
    config, tokenizer = model.params.config, model.tokenizer
    return Common(
        sampling=drawing.sampling(options, config, tokenizer, is_chat=False),
        turn_ends=drawing.turn_ends(config, tokenizer),
        max_new_tokens=options.max_new_tokens,
        stops=tuple(options.stop),
        rows=options.rows,
    )


def _settings(options: argparse.Namespace, summary: Summary, model: Model, common: Common) -> dict[str, Any]:
    """All that the answers follow from, as JSON has it; rows and processes change none."""
    params, groups = model.params, model.groups
    core = resolved(params, model.core)
    known = None if params.calibration is None else _digest(params.calibration)
    clusters = None if groups is None else _digest((groups.clusters.frequencies, groups.clusters.centroids))
    settings = {
        "input": summary.digest,
        "model": fingerprint(params),
        "dtype": str(params.dtype),
        "core": settings_of(core) if isinstance(core, Chooser) else None,
        "shards": core.shards_of(params) if isinstance(core, Chooser) else 1,
        "calibration": known,
        "clusters": clusters,
        "sampling": common.sampling,
        "turn_ends": common.turn_ends,
        "max_new_tokens": common.max_new_tokens,
        "stop": common.stops,
        "in_order": options.in_order,
    }
    as_read: dict[str, Any] = json.loads(json.dumps(settings))
    return as_read


def _digest(tree: Any) -> str:
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


def _answered_here(model: Model, common: Common, lines: Iterable[Line | BadLine]) -> Iterator[Answer]:
    bad: list[BadLine] = []

    def good() -> Iterator[Line]:
        for line in lines:
            if isinstance(line, Line):
                yield line
            else:
                bad.append(line)

    for answer in answers(model, common, good()):
        while bad:
            yield error_of(bad.pop(0))
        yield answer
    yield from map(error_of, bad)


def _write(output: Output, made: Iterable[Answer], options: argparse.Namespace, source: Path, summary: Summary) -> None:
    """Write answers as they come, and say how far that is."""
    began, tokens, bad, before = perf_counter(), 0, 0, len(output.done)
    with progress((), desc="answering", unit="line", total=summary.lines, done=before) as bar:
        for answer in made:
            if "error" in answer:
                bad += 1
                if not options.skip_bad:
                    raise _bad(source, answer["line"], answer["error"], 1)
                bar.write(f"[line {answer['line']}: {answer['error']}]", file=sys.stderr)
            output.write(answer)
            tokens += answer.get("tokens", 0)
            bar.set_description_str(f"answering, {tokens / (perf_counter() - began):.1f} tokens/s", refresh=False)
            bar.update()
    seconds = perf_counter() - began
    there = f", {before} were there already" if before else ""
    skipped = f", {bad} of them bad" if bad else ""
    print(
        f"[{len(output.done) - before} lines answered{skipped}{there}; {tokens} new tokens in {seconds:.1f} s, "
        f"{tokens / seconds:.1f} tokens/s (compiling included)]",
        file=sys.stderr,
    )


def _bad(source: Path, number: int, error: str, count: int) -> CoreInferError:
    more = f" ({count} lines are bad)" if count > 1 else ""
    return CoreInferError(f"{source}: line {number}: {error}{more}; correct it, or pass over bad lines with --skip-bad")
