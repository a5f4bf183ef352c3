"""Decoding side by side: every contender in a process of its own, all in turn, several rounds of it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from tqdm import tqdm

from benchmarks.contenders import CONTENDERS
from benchmarks.contenders.trial import Trial
from benchmarks.environment import REPOSITORY, environment, spread
from benchmarks.shapes import Fields, shape_config, shape_fields
from benchmarks.tables import shown_range
from coreinfer_jax.checks import check_fraction
from coreinfer_jax.errors import CoreInferError

KEEPS = (0.4, 0.2)
DTYPES = ("float32", "bfloat16")
BY_TOKEN = ("predictor", "gather")  # those that change the neurons for every token
GGUF_TYPES = ("F16", "Q8_0", "Q4_0")
# What those measure that cannot take every model or batch.
_LIMITS = {
    **dict.fromkeys(BY_TOKEN, "is measured for one row, of models that normalise before each block"),
    "llama.cpp": "is measured for one row, of LLaMA models without biases",
}
GB = 1e9


@dataclass(frozen=True)
class Plan:
    """What a run compares.

    Attributes:
        model: name of a shape, or a config.json.
        layers: of the model; None for all.
        contenders: some of `CONTENDERS`; None for all that are installed and know the model.
        dtypes: of ours and of transformers.
        keeps: keep ratios of ours; those that change the neurons for every token take the last.
        prompt_tokens: per row.
        new_tokens: per row.
        rows: batch size.
        rounds: how often all take their turn.
    """

    model: str
    layers: int | None = None
    contenders: tuple[str, ...] | None = None
    dtypes: tuple[str, ...] = DTYPES
    keeps: tuple[float, ...] = KEEPS
    prompt_tokens: int = 64
    new_tokens: int = 32
    rows: int = 1
    rounds: int = 3


def measure(plan: Plan) -> Iterator[list[dict[str, Any]]]:
    """After every round, one result per contender, in the order of the plan, of all rounds so far.

    Raises:
        CoreInferError: an unknown model or contender, sizes that do not fit, or contenders that failed, after the last
            round.
    """
    fields = shape_fields(plan.model, plan.layers)
    _check(plan, fields)
    made_on = environment() | {"run": datetime.now(UTC).isoformat(timespec="seconds")}
    with TemporaryDirectory(prefix="coreinfer-benchmark-") as folder:
        trials = trials_of(plan, fields)
        for measured, failed in _rounds(trials, plan.rounds, Path(folder)):
            failures = failed
            done = [(trial, rounds) for trial, rounds in zip(trials, measured, strict=True) if rounds]
            results = [_result(plan, trial, rounds) | made_on | _versions(trial, made_on) for trial, rounds in done]
            yield [result | _gains(result, results) for result in results]
    if failures:
        raise CoreInferError(f"left out: {'; '.join(failures)}")


def _versions(trial: Trial, made_on: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """The versions of `made_on`, and of what else the contender is made of."""
    others = {name: version(name) for name in CONTENDERS[trial.contender].packages}
    return {"versions": made_on["versions"] | others}


def _check(plan: Plan, fields: Fields) -> None:
    unknown = [name for name in plan.contenders or () if name not in CONTENDERS]
    if unknown:
        raise CoreInferError(f"--contenders {unknown[0]}: give some of {', '.join(CONTENDERS)}")
    for name in plan.contenders or ():
        if package := missing(name):
            remedy = f"pip install '.[{CONTENDERS[name].extra}]'"
            raise CoreInferError(f"--contenders {name}: {package} is not installed; {remedy}")
        if not _knows(name, plan, fields):
            raise CoreInferError(f"--contenders {name} {_LIMITS[name]}; leave it out")
    if min(plan.rounds, plan.rows, plan.prompt_tokens) < 1 or plan.new_tokens < 2:
        raise CoreInferError("--rounds, --rows and --prompt-tokens are at least 1, --new-tokens at least 2")
    for keep in plan.keeps:
        check_fraction("--keeps", keep)
    positions = shape_config(fields).max_positions
    if plan.prompt_tokens + plan.new_tokens > positions:
        raise CoreInferError(f"--prompt-tokens and --new-tokens together exceed the model's {positions} positions")


def missing(contender: str) -> str | None:
    """The first package the contender needs and does not find."""
    return next((name for name in CONTENDERS[contender].imports if find_spec(name) is None), None)


def trials_of(plan: Plan, fields: Fields) -> list[Trial]:
    """Every contender in every type it has."""
    able = [name for name in CONTENDERS if missing(name) is None and _knows(name, plan, fields)]
    wanted = dict.fromkeys(plan.contenders or able)
    base = Trial("", "", None, fields, plan.prompt_tokens, plan.new_tokens, plan.rows)
    made: list[Trial] = []
    for name in wanted:
        dtypes = dict.fromkeys(GGUF_TYPES if name == "llama.cpp" else plan.dtypes)
        keeps = dict.fromkeys(_keeps_of(name, plan))
        made += [replace(base, contender=name, dtype=dtype, keep=keep) for dtype in dtypes for keep in keeps]
    return made


def _keeps_of(contender: str, plan: Plan) -> tuple[float | None, ...]:
    if contender == "coreinfer":
        return (None, *plan.keeps)
    return plan.keeps[-1:] if contender in BY_TOKEN else (None,)


def _knows(contender: str, plan: Plan, fields: Fields) -> bool:
    if contender == "llama.cpp":
        biased = fields.get("attention_bias") or fields.get("mlp_bias")
        return fields["model_type"] == "llama" and not biased and plan.rows == 1
    return contender not in BY_TOKEN or (plan.rows == 1 and shape_config(fields).norm_first)


def _rounds(
    trials: Sequence[Trial], rounds: int, folder: Path
) -> Iterator[tuple[list[list[dict[str, Any]]], list[str]]]:
    """After every round, what each trial measured in each so far, and why those failed whose lists are empty.

    Every round starts with the next trial, so that none is always first. Who fails once has no further turn. Ctrl-C
    ends the run with the rounds that are complete.
    """
    measured: list[list[dict[str, Any]]] = [[] for _ in trials]
    failures: dict[int, str] = {}
    bar = tqdm(total=rounds * len(trials), unit="run", disable=None)
    for turn in range(rounds):
        try:
            _round(trials, turn, measured, failures, folder, bar)
        except KeyboardInterrupt:
            if not turn:
                raise
            break
        yield measured, list(failures.values())
    bar.close()


def _round(
    trials: Sequence[Trial],
    turn: int,
    measured: list[list[dict[str, Any]]],
    failures: dict[int, str],
    folder: Path,
    bar: "tqdm[Any]",
) -> None:
    """Add one round to `measured`, and to `failures` those that fail in it."""
    for i in ((i + turn) % len(trials) for i in range(len(trials))):
        bar.set_description(trials[i].name)
        bar.update()
        if i in failures:
            continue
        try:
            measured[i].append(in_process(_prepared(trials[i], folder)))
        except (CoreInferError, OSError, ValueError) as error:
            failures[i], measured[i] = f"{trials[i].name}: {error}", []


def _prepared(trial: Trial, folder: Path) -> Trial:
    """`trial` with its own folder for compiled programs, or its weights file; both stay for the next round."""
    if trial.contender != "llama.cpp":
        return replace(trial, cache=str(folder / trial.name.replace(" ", "-")))
    from benchmarks.gguf_file import write_gguf

    path = folder / f"{trial.dtype}.gguf"
    if not path.exists():
        write_gguf(path, trial.fields, trial.dtype)
    return replace(trial, gguf=str(path))


def in_process(trial: Trial) -> dict[str, Any]:
    """What `benchmarks.worker` measures of `trial`.

    Raises:
        CoreInferError: it failed, with the reason it gave.
    """
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.worker"],
        input=json.dumps(asdict(trial)),
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env=os.environ | _worker_environment(trial),
        check=False,
    )
    if done.returncode < 0:
        raise CoreInferError(f"killed by signal {-done.returncode}; memory may have run out")
    if done.returncode != 0:
        raise CoreInferError((done.stderr.strip().splitlines() or ["it gave no reason"])[-1])
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


def _worker_environment(trial: Trial) -> dict[str, str]:
    compiled = {} if trial.cache is None else {"TORCHINDUCTOR_CACHE_DIR": f"{trial.cache}/torch"}
    # What is allocated is what is used, so that figures of device memory mean something.
    return {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **compiled}


def _result(plan: Plan, trial: Trial, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """The JSON line of a contender."""
    steps = trial.new_tokens - 1
    milliseconds = [1000 * seconds / steps for one in rounds for seconds in one["decode_seconds"]]
    by_round = [median(1000 * seconds / steps for seconds in one["decode_seconds"]) for one in rounds]
    gb = rounds[0]["bytes_per_token"] / GB
    # Bytes that one pass over the weights reads serve all rows.
    speeds = [gb * trial.rows / (ms / 1000) for ms in by_round]
    shares = [speed * GB / one["bandwidth"] for speed, one in zip(speeds, rounds, strict=True)]
    compiles = CONTENDERS[trial.contender].compiles
    compiling = [max(0.0, one["first_call_seconds"] - _generation(one)) for one in rounds if compiles]
    whole = shape_config(shape_fields(plan.model, None)).num_layers
    return {
        "benchmark": "decode",
        "contender": trial.contender,
        "model": plan.model,
        "layers": trial.fields["num_hidden_layers"],
        "model_layers": whole,
        "dtype": trial.dtype,
        "keep": trial.keep,
        "rows": trial.rows,
        "prompt_tokens": trial.prompt_tokens,
        "new_tokens": trial.new_tokens,
        "rounds": len(rounds),
        "generations": trial.generations,
        "fields": trial.fields,
        "decode_ms_per_token": spread(milliseconds),
        "decode_ms_per_token_by_round": by_round,
        "gb_per_token": gb,
        "gb_per_second": spread(speeds),
        "plain_gb_per_second": spread([one["bandwidth"] / GB for one in rounds]),
        "bandwidth_share": spread(shares),
        "first_token_seconds": _spread_of(rounds, "first_token_seconds"),
        "prefill_seconds": _spread_of(rounds, "prefill_seconds"),
        "selection_seconds": _spread_of(rounds, "selection_seconds"),
        "compaction_seconds": _spread_of(rounds, "compaction_seconds"),
        "tokens_per_second": spread([trial.rows * trial.new_tokens / _generation(one) for one in rounds]),
        "load_seconds": spread([one["load_seconds"] for one in rounds]),
        "compile_cold_seconds": compiling[0] if compiles else None,
        "compile_warm_seconds": spread(compiling[1:]) if compiling[1:] else None,
        "anonymous_gb": max(one["anonymous_bytes"] for one in rounds) / GB,
        "file_gb": max(one["file_bytes"] for one in rounds) / GB,
        "device_gb": _most(rounds, "device_bytes"),
        "device_needed_gb": _most(rounds, "device_needed_bytes"),
        "temporary_gb": _most(rounds, "temporary_bytes"),
        "predictor_gb": _most(rounds, "predictor_bytes"),
    }


def _generation(one: dict[str, Any]) -> float:
    """Seconds of a whole generation: the first token, the gather where there is one, all other tokens."""
    gathers = one["compaction_seconds"] or [0.0] * len(one["decode_seconds"])
    return median(map(sum, zip(one["first_token_seconds"], gathers, one["decode_seconds"], strict=True)))


def _spread_of(rounds: list[dict[str, Any]], name: str) -> dict[str, float] | None:
    values = [seconds for one in rounds for seconds in one[name]]
    return spread(values) if values else None


def _most(rounds: list[dict[str, Any]], name: str) -> float | None:
    known = [one[name] for one in rounds if one[name] is not None]
    return max(known) / GB if known else None


def _gains(result: dict[str, Any], results: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """For a narrowed contender of ours: new tokens from which it is done sooner than the full model in its dtype."""
    if result["contender"] != "coreinfer" or result["keep"] is None:
        return {}
    dense = [
        r for r in results if r["contender"] == "coreinfer" and r["keep"] is None and r["dtype"] == result["dtype"]
    ]
    return {"pays_from_tokens": _pays_from(result, dense[0])} if dense else {}


def _pays_from(narrowed: dict[str, Any], dense: dict[str, Any]) -> int | None:
    """The fewest new tokens for which narrowing takes less time, None when it never does."""
    later = 1000 * (_before_decode(narrowed) - _before_decode(dense))
    saved = dense["decode_ms_per_token"]["median"] - narrowed["decode_ms_per_token"]["median"]
    return None if saved <= 0 else 1 + max(1, int(later / saved) + 1)


def _before_decode(result: dict[str, Any]) -> float:
    """Seconds before the first decode step."""
    return result["first_token_seconds"]["median"] + result["compaction_seconds"]["median"]


def ratios(one: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """How many times faster `one` decodes than `other`, round by round: median, least and most."""
    pairs = zip(one["decode_ms_per_token_by_round"], other["decode_ms_per_token_by_round"], strict=True)
    return spread([theirs / ours for ours, theirs in pairs])


def table(results: Sequence[dict[str, Any]]) -> str:
    """The results for a terminal."""
    rows = [[name for name, _ in _COLUMNS]] + [[cell(result) for _, cell in _COLUMNS] for result in results]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def compiling(result: dict[str, Any]) -> str:
    """Seconds of compiling, at first and with kept programs, in words."""
    cold, warm = result["compile_cold_seconds"], result["compile_warm_seconds"]
    return "-" if cold is None else f"{cold:.1f}, {'-' if warm is None else format(warm['median'], '.1f')}"


_COLUMNS: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
    ("contender", lambda r: r["contender"]),
    ("dtype", lambda r: r["dtype"]),
    ("keep", lambda r: "all" if r["keep"] is None else f"{r['keep']:g}"),
    ("ms per token", lambda r: shown_range(r["decode_ms_per_token"], 1)),
    ("GB per token", lambda r: f"{r['gb_per_token']:.2f}"),
    ("GB/s", lambda r: shown_range(r["gb_per_second"], 1)),
    ("of plain reads", lambda r: f"{r['bandwidth_share']['median']:.0%}"),
    ("first token s", lambda r: f"{r['first_token_seconds']['median']:.2f}"),
    ("compile s, again", compiling),
    ("memory GB, mapped", lambda r: f"{r['anonymous_gb']:.1f}, {r['file_gb']:.1f}"),
)
