"""Memory of this process while it works, and how fast plain reads of it are."""

import ctypes
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event, Thread
from time import perf_counter

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from coreinfer_jax.device import usable_cores

READ_BYTES = 1 << 30
COPY_BYTES = 1 << 31
COPIES = 20
_STATUS = Path("/proc/self/status")
_LIBC = ctypes.CDLL(None)


@dataclass
class Peak:
    """Most resident bytes seen: anonymous ones (RssAnon) and those of mapped files (RssFile); 0 where unknown."""

    anonymous: int = 0
    file: int = 0

    def look(self) -> None:
        """Note what is resident now."""
        if not _STATUS.is_file():
            return
        lines = dict(line.split(":", 1) for line in _STATUS.read_text(encoding="ascii").splitlines())
        self.anonymous = max(self.anonymous, 1024 * int(lines["RssAnon"].split()[0]))
        self.file = max(self.file, 1024 * int(lines["RssFile"].split()[0]))


@contextmanager
def watched(seconds: float = 0.02) -> Iterator[Peak]:
    """The peak of what happens inside, looked at every so many seconds."""
    peak, stop = Peak(), Event()

    def watch() -> None:
        while not stop.wait(seconds):
            peak.look()

    watcher = Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        stop.set()
        watcher.join()
        peak.look()


def bandwidth() -> float:
    """Bytes per second that JAX's device gives: plain reads of a CPU's memory, copies on an accelerator."""
    if jax.default_backend() == "cpu":
        return read_bandwidth(usable_cores())
    return copy_bandwidth()


def read_bandwidth(threads: int, repeats: int = 5) -> float:
    """Bytes per second of plain reads by `threads` threads, the best of several; other load lowers it."""
    parts = [np.ones(READ_BYTES // threads, np.uint8) for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        return max(_timed_reads(pool, parts) for _ in range(repeats))


def _timed_reads(pool: ThreadPoolExecutor, parts: list[np.ndarray]) -> float:
    began = perf_counter()
    list(pool.map(_read, parts))
    return sum(part.nbytes for part in parts) / (perf_counter() - began)


def _read(part: np.ndarray) -> None:
    # C's search for a byte that is not there reads at full width and does nothing else, without Python's lock.
    _LIBC.memchr(ctypes.c_void_p(part.ctypes.data), 2, ctypes.c_size_t(part.nbytes))


def copy_bandwidth(repeats: int = 5) -> float:
    """Bytes per second, read and written, of copies on the accelerator: the best of several.

    One program copies an array onto itself many times, with 1 added so that no copy can be left out. It is given the
    array's memory, so that nothing is allocated, and what its start and end take is shared by all copies.
    """
    array, _ = _timed_copies(jnp.zeros(COPY_BYTES // 2, jnp.bfloat16))  # compiles
    best = 0.0
    for _ in range(repeats):
        array, speed = _timed_copies(array)
        best = max(best, speed)
    return best


@partial(jax.jit, donate_argnums=0)
def _copies(array: jax.Array) -> jax.Array:
    # The number is known to the compiler, so that a GPU need not ask after each copy whether there is another one.
    return lax.fori_loop(0, COPIES, lambda _, array: array + jnp.ones((), array.dtype), array)


def _timed_copies(array: jax.Array) -> tuple[jax.Array, float]:
    began = perf_counter()
    array = _copies(array).block_until_ready()
    return array, 2 * array.nbytes * COPIES / (perf_counter() - began)
