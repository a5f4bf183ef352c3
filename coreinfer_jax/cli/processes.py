"""Commands that run as several processes, each with devices of its own: how they find each other, and how they end."""

import argparse
import os
import sys
import time
from typing import Any, TextIO

import jax
from jax.experimental import multihost_utils

from coreinfer_jax.errors import CoreInferError, shown

HELP = "this process is one of several: found by JAX (SLURM, MPI, Kubernetes, TPU), or HOST:PORT,PROCESSES,NUMBER"
DETECTED = "detect"
# A process that has gone silent is given up after so long.
SECONDS = 10
# Seconds after the others have ended.
FIRST_STAYS = 3


def add_distributed(parser: argparse.ArgumentParser) -> None:
    """Whether the command is one of several processes."""
    parser.add_argument("--distributed", nargs="?", const=DETECTED, metavar="HOST:PORT,N,I", help=HELP)


def join(options: argparse.Namespace) -> None:
    """Meet the other processes of `--distributed`, before anything asks for a device. The first alone prints results.

    Raises:
        CoreInferError: the others cannot be found.
    """
    asked = getattr(options, "distributed", None)
    if asked is None:
        return
    if options.mesh is None:
        raise CoreInferError("--distributed: says nothing without --mesh tensor=N, N devices of all processes together")
    jax.config.update("jax_enable_recoverability", True)  # else another's end ends this process with a core dump
    named = _named(asked)
    results = _results_apart()
    try:
        jax.distributed.initialize(**named, heartbeat_timeout_seconds=SECONDS, shutdown_timeout_seconds=SECONDS)
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CoreInferError(
            f"--distributed {asked}: the processes cannot meet ({reason}); start all of them, "
            "or name the first: HOST:PORT,PROCESSES,NUMBER"
        ) from error
    if is_first():
        sys.stdout = results
    else:
        results.close()


def _named(asked: str) -> dict[str, Any]:
    """What `initialize` is given."""
    if asked == DETECTED:
        return {}
    address, *numbers = asked.split(",")
    if ":" not in address or len(numbers) != 2 or not all(one.isascii() and one.isdigit() for one in numbers):
        raise CoreInferError(
            f"--distributed {shown(asked)}: give HOST:PORT,PROCESSES,NUMBER, such as 10.0.0.1:1234,2,0 in the first of "
            "two processes, on whose host the port is free"
        )
    processes, number = map(int, numbers)
    if number >= processes:
        raise CoreInferError(f"--distributed {shown(asked)}: of {processes} processes the last is {processes - 1}")
    return {"coordinator_address": address, "num_processes": processes, "process_id": number}


def are_joined() -> bool:
    """Whether this process runs with others."""
    return jax.distributed.is_initialized()


def is_first() -> bool:
    """Whether this process is the one of several that tells results; true of one alone."""
    return not are_joined() or jax.process_index() == 0


def say(line: str) -> None:
    """Tell on standard error, beside the results, what all processes would."""
    if is_first():
        print(line, file=sys.stderr)


def lost(error: Exception) -> str | None:
    """What an error of devices, which others wait for, tells of a process that has ended; None for any other error."""
    if not isinstance(error, jax.errors.JaxRuntimeError) or not are_joined() or jax.process_count() == 1:
        return None
    own, reason = f"process {jax.process_index()} of {jax.process_count()}", str(error).strip().partition("\n")[0]
    return f"{own}: another has ended ({shown(reason)}); start all again"


def leave(status: int) -> None:
    """End this process where it runs with others: at once after a failure, else after all have come so far.

    The first, which the others watch, goes last; they would take its end for a failure.
    """
    if not are_joined():
        return
    if status == 0:
        try:
            multihost_utils.sync_global_devices("end")
        except jax.errors.JaxRuntimeError as error:
            print(f"coreinfer: error: {lost(error)}", file=sys.stderr)
            status = 2
    time.sleep(FIRST_STAYS if is_first() else 0)
    os._exit(status)


def _results_apart() -> TextIO:
    """Standard output, for results alone: what is printed there from now on, also by libraries, is a message."""
    results = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8", errors="replace")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123 - open as long as the process is
    return results
