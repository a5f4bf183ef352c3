"""Ctrl-C and SIGTERM: every command ends at once, with the usual status and without a traceback."""

import signal
import subprocess
import sys
import time

import pytest

from tests.robustness.signals import PROMPT, complaint, interrupted
from tests.support import half_slow

BOTH = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
ENTRY = "import sys; from coreinfer_command import main"


def ended(script: str, number: int) -> tuple[int, float, str]:
    """Status, seconds and complaints of a Python script that gets a signal once it has said that it is ready."""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        began = time.perf_counter()
        _, told = process.communicate(timeout=60)
        return process.returncode, time.perf_counter() - began, told


@pytest.mark.parametrize(("moment", "number"), half_slow([0.5, 2.0, 4.0], [signal.SIGINT, signal.SIGTERM]))
def test_generate_ends_at_once(moment, number):
    """While it imports, loads, compiles or generates, whichever it does then."""
    arguments = ["generate", PROMPT, "--max-new-tokens", "400"]
    assert complaint(number, *interrupted(arguments, moment, number)) is None


# What stands in the place of the command's own work, and the signal meets.
WORK = {
    "python": "while True: pass",
    "compiled code": "import ctypes; ctypes.CDLL(None).sleep(60)",
    "a callback that lets no exception out": """
class Callback:
    def __del__(self):
        for _ in range(10**9):
            pass
callback = Callback()
del callback
while True:
    pass
""",
    "code that catches everything": """
while True:
    try:
        while True:
            pass
    except BaseException:
        pass
""",
    # As nanobind's modules do where an import within them fails.
    "an import that aborts at an exception": """
import os, pathlib, tempfile
directory = tempfile.mkdtemp()
pathlib.Path(directory, "endless.py").write_text("while True: pass")
sys.path.insert(0, directory)
try:
    import endless
except BaseException:
    os.abort()
""",
}


@pytest.mark.parametrize(("work", "number"), half_slow(WORK, [signal.SIGINT, signal.SIGTERM]))
def test_whatever_a_signal_meets(work, number):
    script = f"""
{ENTRY}
import types
def run(arguments):
    print("ready", flush=True)
    exec({WORK[work]!r}, {{"sys": sys}})
sys.modules["coreinfer_jax.cli"] = types.SimpleNamespace(main=run)
sys.modules["coreinfer_jax"] = types.ModuleType("coreinfer_jax")
sys.exit(main())
"""
    assert complaint(number, *ended(script, number)) is None


@BOTH
def test_what_is_in_progress_is_cleared_away(number, tmp_path):
    script = f"""
{ENTRY}
import coreinfer_jax.files, pathlib, time
from coreinfer_jax.cli import info
def run(options):
    with coreinfer_jax.files.new_directory(pathlib.Path({str(tmp_path / "out")!r})) as partial:
        (partial / "half").write_text("written")
        print("ready", flush=True)
        time.sleep(60)
info._run = run
sys.exit(main(["info", "embedded:opt"]))
"""
    assert complaint(number, *ended(script, number)) is None
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_installed_in_a_process_that_only_imports():
    # A shell may have started the tests with Ctrl-C ignored: what was there before must be there after.
    before, after = "before = signal.getsignal(signal.SIGINT)", "print(signal.getsignal(signal.SIGINT) is before)"
    script = f"import signal; {before}; {ENTRY}; import coreinfer_jax.cli; {after}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == "True\n"
