"""All that docs/performance.md shows, measured by one command: the most important first, within a budget of time.

Every measurement is the command that a person could run, in a process of its own: what it leaves on the device, and how
it ends, costs the others nothing.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from time import perf_counter

import jax

from benchmarks.decode import missing
from benchmarks.environment import REPOSITORY
from coreinfer_jax.errors import CoreInferError

Arguments = tuple[str, ...]
Run = Callable[[Arguments, float | None], None]


class CutOffError(Exception):
    """A measurement that its time did not allow for; what it had written stays."""


_TORCH = ("transformers-eager", "transformers-compiled")
_PROFILED = ("profile", "--model", "opt-1.3b", "--layers", "12")
_ON_GPU = ("--dtypes", "bfloat16", "--prompt-tokens", "512", "--new-tokens", "128", "--rounds", "2")
_SWEPT = ("sweep", "--model", "opt-6.7b", "--layers", "12", "--dtype", "bfloat16", "--rounds", "3", "--over")
# By device, the most important first.
SUITES: dict[str, tuple[Arguments, ...]] = {
    "cpu": (
        ("decode", "--model", "llama-1.1b"),
        ("decode", "--model", "opt-1.3b", "--layers", "12"),
        ("sweep",),
        ("profile", "--model", "llama-1.1b", "--dtype", "bfloat16"),
        ("profile", "--model", "llama-1.1b", "--dtype", "bfloat16", "--keep", "0.2"),
        _PROFILED,
        (*_PROFILED, "--keep", "0.2"),
        (*_PROFILED, "--dtype", "bfloat16"),
        (*_PROFILED, "--dtype", "bfloat16", "--keep", "0.2"),
    ),
    "gpu": (
        # Decoding and prefill, with all neurons and with core neurons, gathering, compiling and memory, beside
        # transformers: all the aims.
        ("decode", "--model", "llama-3.1-8b", *_ON_GPU, "--contenders", "coreinfer", *_TORCH),
        ("decode", "--model", "opt-6.7b", *_ON_GPU, "--contenders", "coreinfer", *_TORCH, "predictor", "gather"),
        ("kernels", "--model", "llama-3.1-8b"),
        (*_SWEPT, "prompt-tokens"),
        ("kernels", "--model", "opt-6.7b"),
        (*_SWEPT, "keep"),
        (*_SWEPT, "rows"),
        (*_SWEPT, "new-tokens"),
        (*_SWEPT, "layers"),
    ),
}
# Seconds that all of a suite may take.
BUDGETS: dict[str, float | None] = {"cpu": None, "gpu": 25 * 60.0}
# Seconds to end by itself, before a measurement is killed.
_GRACE = 10.0
# They write what they have after every round, and need not end.
_IN_ROUNDS = ("decode",)


def measure(device: str | None, budget: float | None, out: Path | None) -> None:
    """Measure the suite of `device`, this machine's where it is None, in at most `budget` seconds, by default its own.

    Results go to one file `out`, or where each measurement puts its own.

    Raises:
        CoreInferError: no such device, or measurements that failed, after all others.
    """
    device = _found(device)
    if budget is not None and budget <= 0:
        raise CoreInferError(f"--budget {budget:g}: give more than 0 seconds")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)  # no measurement is left running
    items, absent = _plan(SUITES[device])
    if absent:
        print(f"left out, not installed: {', '.join(absent)}; pip install '.[torch]'")
    to = () if out is None else ("--out", str(out.resolve()))
    run_all(items, BUDGETS[device] if budget is None else budget, lambda item, left: in_process((*item, *to), left))


def _found(device: str | None) -> str:
    """The device to measure; mistakes are found before anything runs."""
    if device not in (None, *SUITES):
        raise CoreInferError(f"--device {device}: give {' or '.join(SUITES)}")
    # Inherited by all measurements. None may hold memory that another one needs, this process least of all.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    if device == "cpu":
        os.environ["JAX_PLATFORMS"] = "cpu"
        return device
    there = _backend()
    if device is not None and there != device:
        raise CoreInferError(f"--device {device}: JAX finds no GPU here, but {there}; pip install '.[cuda]'")
    if there not in SUITES:
        raise CoreInferError(f"there is no suite for {there}; give --device {' or '.join(SUITES)}")
    return there


def _backend() -> str:
    try:
        return jax.default_backend()
    except RuntimeError as error:  # JAX_PLATFORMS names one that there is not
        raise CoreInferError(f"JAX finds no device: {str(error).splitlines()[0]}") from error


def _plan(items: Sequence[Arguments]) -> tuple[list[Arguments], list[str]]:
    """`items` without the contenders that are not installed, and these."""
    absent = [name for name in _TORCH if missing(name) is not None]
    return [tuple(word for word in item if word not in absent) for item in items], absent


def run_all(items: Sequence[Arguments], budget: float | None, run: Run) -> None:
    """Run `items` in order, for at most `budget` seconds.

    What takes as long as the last one of its kind did is not begun where that is more than what is left, unless it
    writes results on its way.

    Raises:
        CoreInferError: some failed, after all others have run.
    """
    limit = "" if budget is None else f" in at most {budget / 60:g} minutes"
    print(f"{len(items)} measurements{limit}, the most important first:")
    for number, item in enumerate(items, 1):
        print(f"{number:3}. {' '.join(item)}")
    lasted: dict[str, float] = {}
    left_out, failed = [], []
    began = perf_counter()
    for number, item in enumerate(items, 1):
        left = None if budget is None else began + budget - perf_counter()
        if left is not None and left <= lasted.get(item[0], 0.0):
            left_out.append(f"{number}. {' '.join(item)}")
            continue
        print(f"{number}. {' '.join(item)}", flush=True)
        begun = perf_counter()
        try:
            run(item, left)
        except CutOffError:
            print(f"{number}. was cut off; the results that it had written stay")
        except CoreInferError as error:
            failed.append(f"{number}. {error}")
        else:
            seconds = perf_counter() - begun
            lasted[item[0]] = 0.0 if item[0] in _IN_ROUNDS else seconds
            print(f"{number}. took {seconds:.0f} s")
    if left_out:
        print(f"left out for want of time: {'; '.join(left_out)}")
    if failed:
        raise CoreInferError("; ".join(failed))


def in_process(item: Arguments, seconds: float | None) -> None:
    """Run `python -m benchmarks` with `item`, and end it after so many seconds.

    Raises:
        CutOffError: it was ended.
        CoreInferError: it failed.
    """
    # A group of its own, so that what it has started can be ended with it.
    process = subprocess.Popen([sys.executable, "-m", "benchmarks", *item], cwd=REPOSITORY, start_new_session=True)
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        _end(process)
        raise CutOffError from None
    except KeyboardInterrupt:
        _end(process)
        raise
    if code != 0:
        raise CoreInferError(f"{' '.join(item)} failed; its reason is above")


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Ask a group of processes to stop, and end what does not."""
    try:
        with suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, signal.SIGINT)
            process.wait(_GRACE)
    finally:  # also where a second Ctrl-C ends the wait
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
