"""One contender in a process of its own: reads a `Trial` as JSON from standard input, prints what it measured."""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from importlib import import_module

import jax

from benchmarks.contenders import CONTENDERS
from benchmarks.contenders.trial import Report, Trial
from benchmarks.memory import bandwidth, watched
from coreinfer_jax.errors import CoreInferError


def measure(trial: Trial) -> dict[str, object]:
    """What the contender measured, its peak memory, and the bandwidth that plain reads or copies have here."""
    if trial.cache is not None:
        jax.config.update("jax_compilation_cache_dir", trial.cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    run: Callable[[Trial], Report] = import_module(f"benchmarks.contenders.{CONTENDERS[trial.contender].module}").run
    with watched() as peak:
        report = run(trial)
    made = min(report.made_tokens)
    if made != trial.new_tokens:
        raise CoreInferError(f"made {made} tokens and not the {trial.new_tokens} asked for")
    return asdict(report) | {
        "anonymous_bytes": peak.anonymous,
        "file_bytes": peak.file,
        # After the peak was read: what is copied here must not count.
        "bandwidth": bandwidth(),
    }


def main() -> int:
    """Exit status 2, and the reason on standard error, where there is nothing to report."""
    trial = Trial(**json.load(sys.stdin))
    try:
        measured = measure(trial)
    except (CoreInferError, ImportError, MemoryError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        print(reason[0], file=sys.stderr)
        return 2
    print(json.dumps(measured))
    return 0


if __name__ == "__main__":
    sys.exit(main())
