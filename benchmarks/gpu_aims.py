"""What was aimed at on a GPU, met or missed, from the decode results of one."""

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.decode import ratios
from benchmarks.performance import COMPILED, EAGER, OURS, Side, decode_runs
from benchmarks.tables import markdown

Result = dict[str, Any]
DENSE, NARROWED = Side(OURS, None, "bfloat16"), Side(OURS, 0.2, "bfloat16")
# To the full model, by family: what the bytes allow is 2.03 and 2.49 for the shapes these are of.
GAINS = {"opt-6.7b": 1.8, "llama-3.1-8b": 2.2}
LEAST_SHARE, MOST_PREFILL, MOST_STEPS, MOST_COLD, MOST_WARM = 0.85, 1.15, 5.0, 60.0, 10.0
MOST_MEMORY = 1.1


def section() -> str:
    """A table of aims, a column per model and GPU."""
    runs = {title: results for title, results in decode_runs().items() if not title.endswith("cpu")}
    if not runs:
        return "Nothing was measured on a GPU yet."
    rows = [["aim", *(title.partition(";")[0] for title in runs)]]
    rows += [[words, *(verdict(results) for results in runs.values())] for words, verdict in AIMS.items()]
    return markdown(rows)


def _told(met: bool, figure: str) -> str:
    return f"{'met' if met else 'missed'}: {figure}"


def _share(side: Side, results: Sequence[Result]) -> str:
    found = side.fastest(results)
    if found is None:
        return ""
    share = found["bandwidth_share"]["median"]
    return _told(share >= LEAST_SHARE, f"{share:.0%}")


def _times_faster(other: Side, results: Sequence[Result], least: float | None) -> str:
    ours, theirs = NARROWED.fastest(results), other.fastest(results)
    if ours is None or theirs is None or least is None:
        return ""
    gain = ratios(ours, theirs)["median"]
    return _told(gain >= least, f"x {gain:.2f} of {least:g}")


def _prefill(results: Sequence[Result]) -> str:
    plain, choosing = DENSE.fastest(results), NARROWED.fastest(results)
    if plain is None or choosing is None:
        return ""
    ratio = choosing["prefill_seconds"]["median"] / plain["prefill_seconds"]["median"]
    return _told(ratio <= MOST_PREFILL, f"x {ratio:.2f}, {choosing['prompt_tokens']} tokens")


def _gather(results: Sequence[Result]) -> str:
    plain, choosing = DENSE.fastest(results), NARROWED.fastest(results)
    if plain is None or choosing is None:
        return ""
    steps = 1000 * choosing["compaction_seconds"]["median"] / plain["decode_ms_per_token"]["median"]
    return _told(steps <= MOST_STEPS, f"{steps:.1f} steps")


def _compiling(results: Sequence[Result]) -> str:
    found = NARROWED.fastest(results)
    if found is None or found["compile_warm_seconds"] is None:
        return ""
    cold, warm = found["compile_cold_seconds"], found["compile_warm_seconds"]["median"]
    return _told(cold <= MOST_COLD and warm <= MOST_WARM, f"{cold:.0f} s, again {warm:.1f} s, {found['layers']} layers")


def _memory(side: Side, results: Sequence[Result]) -> str:
    found = side.fastest(results)
    if found is None or found.get("device_needed_gb") is None:
        return ""
    ratio = found["device_gb"] / found["device_needed_gb"]
    return _told(ratio <= MOST_MEMORY, f"x {ratio:.2f}, {found['device_gb']:.1f} GB")


AIMS: dict[str, Callable[[Sequence[Result]], str]] = {
    f"all neurons: at least {LEAST_SHARE:.0%} of the bandwidth of copies": lambda results: _share(DENSE, results),
    f"keep 0.2: at least {LEAST_SHARE:.0%} of the bandwidth of copies": lambda results: _share(NARROWED, results),
    "keep 0.2: times as fast as all neurons": lambda results: _times_faster(
        DENSE, results, GAINS.get(results[0]["model"])
    ),
    "keep 0.2: times as fast as transformers-eager": lambda results: _times_faster(
        Side(EAGER, None, "bfloat16"), results, 10.33
    ),
    "keep 0.2: times as fast as transformers-compiled": lambda results: _times_faster(
        Side(COMPILED, None, "bfloat16"), results, 2.5
    ),
    f"a prefill that chooses neurons: at most {MOST_PREFILL:g} times a plain one": _prefill,
    f"the gather: at most {MOST_STEPS:g} steps with all neurons": _gather,
    f"compiling: at most {MOST_COLD:g} s, again {MOST_WARM:g} s": _compiling,
    f"memory at its peak, all neurons: at most {MOST_MEMORY:g} times weights and cache": lambda results: _memory(
        DENSE, results
    ),
    f"memory at its peak, keep 0.2: at most {MOST_MEMORY:g} times all weights, narrowed ones and cache": (
        lambda results: _memory(NARROWED, results)
    ),
}
