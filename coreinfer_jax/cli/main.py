"""Parsing, and what every subcommand shares: one-line errors and exit statuses."""

import argparse
import errno
import io
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import NoReturn

import jax

from coreinfer_jax.cli import (
    analyze,
    batch,
    calibrate,
    chat,
    clusters,
    convert_checkpoint,
    evaluate,
    generate,
    info,
    plan,
    processes,
    train,
)
from coreinfer_jax.errors import CoreInferError, one_line, shown, shown_name

COMMANDS = {
    "generate": generate,
    "chat": chat,
    "batch": batch,
    "info": info,
    "plan": plan,
    "clusters": clusters,
    "analyze": analyze,
    "eval": evaluate,
    "calibrate": calibrate,
    "convert": convert_checkpoint,
    "train": train,
}


class _Messages(io.TextIOWrapper):
    """Standard error that a command does not depend on: what cannot be written, as on a full disk, is left out."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except BrokenPipeError:
            raise
        except OSError:
            self._leave_out()
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except BrokenPipeError:
            raise
        except OSError:
            self._leave_out()

    def _leave_out(self) -> None:
        """Send this and all that follows nowhere."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)


class _Parser(argparse.ArgumentParser):
    """argparse with mistakes reported like all others: one line, status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {one_line(message)} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit status: 0; 2 for a mistake or an output that cannot be written, reported in one line; 130 after Ctrl-C;
        141 where the reader of the output has gone.
    """
    _open_closed_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character shows a question mark
    if type(sys.stderr) is io.TextIOWrapper:  # nothing that a caller has put in its place
        encoding = sys.stderr.encoding
        sys.stderr = _Messages(sys.stderr.detach(), encoding, "backslashreplace", line_buffering=True)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # as for arguments; `check_text` tells the user
    status = _ended(arguments)
    processes.leave(status)
    return status


def _ended(arguments: Sequence[str] | None) -> int:
    try:
        status = _run(arguments)
        # Here, because at its exit Python could only complain.
        sys.stdout.flush()
        sys.stderr.flush()
    except BrokenPipeError:  # the reader went away, as `head` does
        _discard_output()
        return 141
    except OSError as error:
        _discard_output()
        print(f"coreinfer: error: {_told(error)}", file=sys.stderr)
        return 2
    return status


def _run(arguments: Sequence[str] | None) -> int:
    try:
        options = _parser().parse_args(arguments)
        options.run(options)
    except SystemExit as end:  # argparse has said what there is to say
        return int(end.code or 0)
    except CoreInferError as error:
        print(f"coreinfer: error: {one_line(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except (MemoryError, RuntimeError, AssertionError) as error:
        mistake = _mistake_about_devices(error) or processes.lost(error)
        if mistake is None:
            raise
        print(f"coreinfer: error: {mistake}", file=sys.stderr)
        return 2
    return 0


def _mistake_about_devices(error: Exception) -> str | None:
    """What an error tells of a device that is too small, or of one that is not there; None for any other error."""
    text = str(error)
    if isinstance(error, MemoryError) or text.startswith("RESOURCE_EXHAUSTED"):
        return f"out of memory ({shown(text)}); take a smaller model or batch, or a 16-bit --dtype"
    try:
        jax.devices()
    except (RuntimeError, AssertionError):  # JAX asserts that it has found one
        named = os.environ.get("JAX_PLATFORMS", "")
        return f"JAX_PLATFORMS={named}: JAX finds no such device here; unset it, or install JAX's plugin for the device"
    return None


def _open_closed_streams() -> None:
    """Let standard streams that were closed be empty ones; Python has None for them, which nothing expects."""
    sys.stdin = sys.stdin or open(os.devnull)  # noqa: SIM115, PTH123 - open as long as the process is
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115, PTH123
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115, PTH123


def _discard_output() -> None:
    """Send what broken streams still hold nowhere; otherwise Python would complain once more at exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _told(error: OSError) -> str:
    if error.filename is not None:
        return f"{shown_name(str(error.filename))}: {error.strerror}; name another path, or make this one usable"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EBADF):
        return f"the output cannot be written: {error.strerror}; free some space, or send it elsewhere"
    return f"{error.strerror or error}; try again, or elsewhere"


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="coreinfer", description="Generate with only the MLP neurons a prompt needs.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"coreinfer {version('coreinfer_jax')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    for name, command in COMMANDS.items():
        command.add_options(commands.add_parser(name, help=command.HELP, description=command.HELP, allow_abbrev=False))
    return parser
