"""One model over several processes, each with a device of its own, that meet over the loopback interface."""

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from coreinfer_jax.cli import main
from tests.stand_ins import tale
from tests.test_signals import ENTRY

REPOSITORY = Path(__file__).resolve().parents[1]
PROMPT = "Once upon a time, there was a little"
PROCESSES = 3  # as embedded:llama has heads
# Within which the others end after one was killed.
SECONDS = 60


GENERATE = ("generate", PROMPT, "--model", "embedded:llama")


def begun(directory: Path, *arguments: str) -> list[subprocess.Popen[bytes]]:
    """A command in so many processes, whose output goes to files of `directory`."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-c", f"{ENTRY}; sys.exit(main())", *arguments, "--mesh", f"tensor={PROCESSES}"]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(REPOSITORY)}
    processes = []
    for i in range(PROCESSES):
        own = [*command, "--distributed", f"localhost:{port},{PROCESSES},{i}"]
        with (directory / f"{i}.out").open("wb") as out, (directory / f"{i}.err").open("wb") as err:
            processes.append(subprocess.Popen(own, stdout=out, stderr=err, env=environment))
    return processes


def check_ends_like_one(directory: Path, command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """What the first process prints is what one over as many devices does; the others print nothing."""
    assert [process.wait(300) for process in begun(directory, *command)] == [0] * PROCESSES
    assert main([*command, "--mesh", f"tensor={PROCESSES}"]) == 0
    assert (directory / "0.out").read_text() == capsys.readouterr().out
    assert [(directory / f"{i}.out").read_bytes() for i in range(1, PROCESSES)] == [b""] * (PROCESSES - 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [[], ["--lossless", "--temperature", "0.8", "--seed", "4"]], ids=["core", "lossless"]
)
def test_processes_say_together_what_one_says(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*GENERATE, "--beta", "0.5", "--max-new-tokens", "48", *options]
    check_ends_like_one(tmp_path, command, capsys)
    told = (tmp_path / "0.err").read_text()
    assert "ms/token" in told
    assert not options or re.search(r"lossless: [1-9]\d* of", told)
    assert all("ms/token" not in (tmp_path / f"{i}.err").read_text() for i in range(1, PROCESSES))


@pytest.mark.slow
def test_processes_evaluate_together_as_one_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(tale(number) for number in range(3)), encoding="utf-8")
    command = ["eval", "--model", "embedded:llama", "--data", str(texts), "--texts", "2", "--beta", "0.5"]
    command += ["--prompt-tokens", "16", "--continuation", "8"]
    check_ends_like_one(tmp_path, command, capsys)


@pytest.mark.slow
def test_after_one_is_killed_the_others_end_with_a_line(tmp_path: Path) -> None:
    processes = begun(tmp_path, *GENERATE, "--beta", "0.5", "--max-new-tokens", "900")
    while not (tmp_path / "0.out").read_text().removeprefix(PROMPT):  # the first token comes
        assert all(process.poll() is None for process in processes)
        time.sleep(0.1)
    processes[1].kill()
    assert [process.wait(SECONDS) for process in processes] == [2, -9, 2]
    for i in (0, 2):
        told = (tmp_path / f"{i}.err").read_text()
        assert re.search(rf"^coreinfer: error: process {i} of {PROCESSES}: another has ended", told, re.MULTILINE)
        assert "Traceback" not in told


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--distributed"], "says nothing without --mesh"),
        (["--mesh", "tensor=3", "--distributed", "here"], "--distributed 'here': give HOST:PORT,PROCESSES,NUMBER"),
        (["--mesh", "tensor=3", "--distributed", "a:1,2,2"], "of 2 processes the last is 1"),
    ],
)
def test_mistakes_get_one_line(options: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "Once", "--model", "embedded:llama", *options]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
