"""The first steps of the `coreinfer` command: Ctrl-C and SIGTERM end it at once, also while it imports the rest.

This package stands beside `coreinfer_jax` because importing that takes seconds, in which a signal may come.
"""

import os
import signal
import sys
import time
from collections.abc import Sequence
from threading import Thread
from types import FrameType
from typing import NoReturn

# After a signal, for what is in progress to be cleared away.
GRACE_SECONDS = 0.3
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit status of `coreinfer_jax.cli.main`; 128 and the number of the signal where one has ended it.
    """
    received = _end_on_signals()
    try:
        from coreinfer_jax.cli import main as run

        status = run(arguments)
    except BaseException:
        # Whatever code that is not ours made of the interruption.
        if not received:
            raise
    finally:
        # While Python ends there is nothing left to clear away.
        for number in SIGNALS:
            signal.signal(number, _end)
    return 128 + received[0] if received else status


def _end(number: int, _: FrameType | None) -> NoReturn:
    os._exit(128 + number)


def _end_on_signals() -> list[int]:
    """Let the first of `SIGNALS` interrupt the main thread, and end the process soon after in any case.

    Python runs handlers between two steps of the main thread, which may be long in compiled code, and an exception may
    come up in a callback that JAX lets none out of. So a second thread watches as well. A command that handles a signal
    in its own way puts its own handler in the place of this one.

    Returns:
        A list that holds the number of the signal, once there was one.
    """
    received: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        if received:
            return
        if _is_importing(frame):
            _end(number, frame)
        received.append(number)
        sys.unraisablehook = lambda _: None
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    # Also where a shell has started the command in the background with Ctrl-C ignored: `kill -INT` is meant for it.
    for number in SIGNALS:
        signal.signal(number, interrupt)
    Thread(target=_end_after_grace, args=(reading, interrupt), daemon=True).start()
    return received


def _is_importing(frame: FrameType | None) -> bool:
    """Whether the main thread imports a module: compiled modules that import others may abort at an exception."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def _end_after_grace(reading: int, handler: object) -> None:
    """End the process some time after a signal that is `handler`'s; the numbers of signals come through `reading`."""
    while True:
        number = os.read(reading, 1)[0]
        if signal.getsignal(number) is handler:
            time.sleep(GRACE_SECONDS)
            os._exit(128 + number)
