"""Ctrl-C and SIGTERM at any moment of any command: it ends within a second, with the usual status and no traceback.

    python -m tests.robustness.signals [--times 20] [--commands generate info ...]

Moments are spread evenly over the first seconds of each command, which imports, loads, compiles and generates in them.
Exit status 1 tells of violations.
"""

import argparse
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FIRST, LAST = 0.3, 6.0
# Until a process is gone: the second that a user would wait, and what a busy machine adds.
MOST_SECONDS = 2.0
START = "import sys; from coreinfer_command import main; sys.exit(main())"
NAMES = ("generate", "generate-narrowed", "info", "convert", "eval", "calibrate", "train", "chat")
PROMPT = "Once upon a time there was a king."


def commands(work: Path) -> dict[str, list[str]]:
    """Commands that take longer than the last moment, or end well before it; `work` is an empty directory."""
    texts = work / "texts.txt"
    stories = (f"{PROMPT} He had {number} sons, and all of them went away.\n<|endoftext|>\n" for number in range(400))
    texts.write_text("".join(stories))
    return {
        "generate": ["generate", PROMPT, "--max-new-tokens", "400", "--seed", "1"],
        "generate-narrowed": ["generate", PROMPT, "--model", "embedded:llama", "--beta", "0.37", "--min-p", "0.01"],
        "info": ["info", "embedded:llama"],
        "convert": ["convert", "embedded:llama", str(work / "converted"), "--dtype", "float32"],
        "eval": ["eval", "--data", str(texts), "--texts", "40", "--json"],
        "calibrate": ["calibrate", "embedded:opt", "--data", str(texts), "--out", str(work / "calibrated")],
        "train": ["train", str(work / "run"), str(texts), "--steps", "10000"],
        "chat": ["chat"],
    }


def interrupted(arguments: list[str], seconds: float, number: int) -> tuple[int, float, str]:
    """How a command ends that gets a signal after so many seconds: its status, the seconds it took, what it complained.

    The status is as a shell tells it, also where the signal itself has ended the process.
    """
    with subprocess.Popen(
        [sys.executable, "-c", START, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        time.sleep(seconds)
        process.send_signal(number)
        began = time.perf_counter()
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
        took = time.perf_counter() - began
        assert process.stderr is not None
        status = process.returncode
        return 128 - status if status < 0 else status, took, process.stderr.read()


def complaint(number: int, status: int, took: float, told: str) -> str | None:
    """What is wrong with how a command ended; None where nothing is. It may have been done before the signal came."""
    if status not in (128 + number, 0) or (status == 0 and took > 0.05):
        return f"status {status} after {took:.1f} s"
    if took > MOST_SECONDS:
        return f"ended after {took:.1f} s"
    return "a traceback" if "Traceback" in told or "Exception ignored" in told else None


def main() -> int:
    """Try all, and tell."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--commands", nargs="*", default=[])
    options = parser.parse_args()
    violations = 0
    for name in options.commands or NAMES:
        for number in (signal.SIGINT, signal.SIGTERM):
            if name == "chat" and number == signal.SIGINT:  # which stops a reply, and not the chat
                continue
            violations += tried(name, number, options.times)
    return int(violations > 0)


def tried(name: str, number: signal.Signals, times: int) -> int:
    """How many of so many tries of a command have ended otherwise than they should; all are told."""
    ends, violations = [], 0
    for turn in range(times):
        moment = FIRST + (LAST - FIRST) * turn / max(1, times - 1)
        with tempfile.TemporaryDirectory() as directory:
            status, took, told = interrupted(commands(Path(directory))[name], moment, number)
        ends.append((status, took))
        if wrong := complaint(number, status, took, told):
            violations += 1
            print(f"{name}, {number.name} after {moment:.1f} s: {wrong}\n{told}", flush=True)
    statuses, longest = sorted({status for status, _ in ends}), max(took for _, took in ends)
    print(f"{name}, {number.name}: {times} times, statuses {statuses}, at most {longest:.2f} s", flush=True)
    return violations


if __name__ == "__main__":
    sys.exit(main())
