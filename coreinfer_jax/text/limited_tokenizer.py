"""Tokenizers that may have no end, each in a process of its own."""

import json
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from coreinfer_jax.errors import CoreInferError
from coreinfer_jax.text import tokenizer_process
from coreinfer_jax.text.template_process import ONE_THREAD
from coreinfer_jax.text.tokenizer_files import check_text

# That a process has for an answer, on a busy machine; for its first one, its start counts.
_SECONDS_TO_OPEN, _SECONDS_TO_ANSWER = 180, 60


class LimitedTokenizer:
    """A tokenizer of which nobody knows what it takes: `TransformersTokenizer`, in a process with limits.

    The process starts with the object, which takes some seconds, and again after it has met its limits. It ends with
    the object, or with this process.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._turn = threading.Lock()
        self._start()

    @property
    def description(self) -> str:
        """See `Tokenizer.description`."""
        return f"{self._about['description']}, in a process of its own"

    @property
    def has_chat_template(self) -> bool:
        """See `Tokenizer.has_chat_template`."""
        return bool(self._about["has_chat_template"])

    @property
    def eos_id(self) -> int | None:
        """See `Tokenizer.eos_id`."""
        number = self._about["eos_id"]
        return None if number is None else int(number)

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer.encode`."""
        check_text(text)
        return list(self._ask("encode", text))

    def special_id(self, text: str) -> int | None:
        """See `Tokenizer.special_id`."""
        number = self._ask("special_id", text)
        return None if number is None else int(number)

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """See `Tokenizer.encode_chat`."""
        return list(self._ask("encode_chat", [dict(message) for message in messages]))

    def render_chat(self, messages: Sequence[Mapping[str, str]], begin_answer: bool) -> str:
        """See `Tokenizer.render_chat`."""
        return str(self._ask("render_chat", [dict(message) for message in messages], begin_answer))

    def decode(self, ids: Sequence[int]) -> str:
        """See `Tokenizer.decode`."""
        return str(self._ask("decode", [int(i) for i in ids]))

    def _ask(self, *question: Any) -> Any:
        with self._turn:
            if self._process.poll() is not None:
                self._end()
                self._start()
            return self._answer(_SECONDS_TO_ANSWER, json.dumps(question) + "\n")

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", tokenizer_process.__file__, str(self._directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            env=os.environ | ONE_THREAD,
            start_new_session=True,  # Ctrl-C is for this process
        )
        self._end = weakref.finalize(self, _end, self._process)
        try:
            self._about = self._answer(_SECONDS_TO_OPEN)
        except CoreInferError:
            self._end()
            raise

    def _answer(self, seconds: float, question: str = "") -> Any:
        """What the process says to a line within so many seconds, after which it is ended.

        Raises:
            CoreInferError: what the tokenizer refuses, or that the process has met its limits.
        """
        line = self._line(seconds, question)
        if not line:
            self._end()  # now, so that the next question starts another
            raise CoreInferError(self._no_answer("to open" if not question else "for a text"))
        told = json.loads(line)
        if "error" in told:
            raise CoreInferError(told["error"])
        return told["value"]

    def _no_answer(self, asked: str) -> str:
        seconds = tokenizer_process.SECONDS_TO_OPEN if asked == "to open" else tokenizer_process.SECONDS
        allowed = f"{seconds} s or {tokenizer_process.BYTES >> 20} MiB"
        return (
            f"{self._directory}: its tokenizer takes more than {allowed} {asked}, or ended by itself; give another "
            "text, or take another model"
        )

    def _line(self, seconds: float, question: str) -> str:
        """The line that the process says to another; empty where it has ended."""
        timer = threading.Timer(seconds, self._process.kill)
        timer.daemon = True
        timer.start()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(question)
            self._process.stdin.flush()
            return self._process.stdout.readline()
        except BrokenPipeError:
            return ""
        except BaseException:  # an interrupt, after which the answer would be taken for that to the next question
            self._process.kill()
            raise
        finally:
            timer.cancel()


def _end(process: subprocess.Popen[str]) -> None:
    """Let a process end, and wait for it."""
    process.kill()
    for pipe in (process.stdin, process.stdout):
        with suppress(BrokenPipeError):  # of a question that was not sent in whole
            assert pipe is not None
            pipe.close()
    process.wait()
