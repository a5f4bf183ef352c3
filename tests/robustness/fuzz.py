"""Damaged files by the thousand, files that change while they are read, races: all load, or are refused in one line.

    python -m tests.robustness.fuzz [--seed 0] [--cases N] [--kind KIND] [--results FILE]

None may end in a traceback, hang, end the process or take more than 1 GiB. Without `--cases`, each kind has as many as
`CASES` says. A failure is printed with its seed, kind and number; add `--kind KIND --case NUMBER` to replay it alone,
with the traceback. `--results` writes a line of JSON with the counts of each kind. Data is looked for in
COREINFER_DATA, by default ../shared/data beside the repository. Exit status 1 tells of failures. Memory is the peak of
the resident set (VmHWM), which bounds anonymous memory (RssAnon) from above.
"""

import argparse
import json
import os
import re
import select
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, BinaryIO

from benchmarks.environment import environment
from tests.robustness import attempts
from tests.robustness.bases import write_bases
from tests.robustness.mutate import (
    damage_archive,
    damage_bytes,
    damage_gguf,
    damage_json,
    damage_json_lines,
    damage_metadata,
    damage_pipeline,
    damage_safetensors,
    damage_template,
    damage_text,
)

SECONDS_PER_CASE = 30
SECONDS_TO_START = 300
KIB_AT_MOST = 2**20
# What no library may print while a file is read.
COMPLAINT = re.compile(rb"Traceback|panicked|Exception ignored|Warning")

Damage = Callable[[Random, bytes], bytes]
JSON_DAMAGE: tuple[Damage, ...] = (damage_bytes, damage_json, damage_json)
TEXT_DAMAGE: tuple[Damage, ...] = (damage_bytes, damage_text)
# File -> ways to damage it, for each kind; a file is chosen as often as it has ways.
DAMAGES: dict[str, dict[str, tuple[Damage, ...]]] = {
    "config": {"config.json": 3 * JSON_DAMAGE, "generation_config.json": JSON_DAMAGE},
    "safetensors": {
        "model.safetensors": 9 * (damage_safetensors,),
        "model.safetensors.index.json": JSON_DAMAGE,
    },
    "manifest": {"coreinfer.json": JSON_DAMAGE},
    "tokenizer": {
        "tokenizer.json": (*JSON_DAMAGE, damage_pipeline, damage_pipeline),
        "tokenizer_config.json": JSON_DAMAGE,
        "special_tokens_map.json": (damage_json,),
        "tokenizer.model": 4 * (damage_bytes,),
        "vocab.json": JSON_DAMAGE,
        "merges.txt": TEXT_DAMAGE,
    },
    "gguf": {"model.gguf": (damage_gguf,)},
    "bin": {"pytorch_model.bin": (damage_bytes,)},
    "calibration": {"coreinfer-calibration.safetensors": (damage_safetensors, damage_metadata)},
    "lists": {"lists.npz": (damage_bytes, damage_archive, damage_archive)},
    "clusters": {"clusters.json": JSON_DAMAGE, "clusters.safetensors": 2 * (damage_safetensors,)},
    "documents": {
        "lines.txt": TEXT_DAMAGE,
        "separated.txt": TEXT_DAMAGE,
        "table.csv": TEXT_DAMAGE,
        "table.tsv": TEXT_DAMAGE,
        "lines.jsonl": (*TEXT_DAMAGE, damage_json_lines, damage_json_lines),
    },
    "template": {"chat_template.jinja": (damage_template,)},
    "swap": {},
    "race": {},
}
ATTEMPTS: dict[str, Callable[[Path, Random], object]] = {
    "config": attempts.load_whole_weights,
    "safetensors": attempts.load_model,
    "manifest": attempts.load_whole_weights,
    "tokenizer": attempts.use_tokenizer,
    "gguf": attempts.load_gguf,
    "bin": attempts.load_model,
    "calibration": attempts.read_calibration,
    "lists": attempts.read_lists,
    "clusters": attempts.load_clusters,
    "documents": attempts.read_documents,
    "template": attempts.render_template,
    "swap": attempts.swap,
    "race": attempts.race,
}
# As many of each kind as make a run of half an hour, which are more of those that take less.
CASES = {
    "config": 2500,
    "safetensors": 2500,
    "manifest": 1000,
    "tokenizer": 1500,
    "gguf": 1000,
    "bin": 1000,
    "calibration": 3000,
    "lists": 3000,
    "clusters": 1500,
    "documents": 3000,
    "template": 1000,
    "swap": 300,
    "race": 200,
}
KINDS = tuple(DAMAGES)


# ---------------------------------------------------------------------------- one case, in a worker process


def damaged_copy(kind: str, seed: int, case: int, bases: Path, folder: Path) -> Random:
    """Write case number `case`: a base with one file damaged, if it has files to damage. All follows from `Random`."""
    random = Random(f"{seed}/{kind}/{case}")
    base = random.choice(sorted(path for path in (bases / kind).iterdir()))
    shutil.rmtree(folder, ignore_errors=True)
    ways = [(name, way) for name, found in DAMAGES[kind].items() for way in found if (base / name).is_file()]
    if not ways:
        shutil.copytree(base, folder)
        return random
    shutil.copytree(base, folder, copy_function=os.link)  # which nothing writes to
    name, way = random.choice(ways)
    (folder / name).unlink()
    (folder / name).write_bytes(way(random, (base / name).read_bytes()))
    return random


def outcome(kind: str, folder: Path, random: Random) -> tuple[str, str]:
    """`loaded`, `refused`, `not_run` or `failed`, and what there is to say."""
    from coreinfer_jax.errors import CoreInferError

    try:
        ATTEMPTS[kind](folder, random)
    except CoreInferError as error:
        message = str(error)
        short = "\n" not in message and len(message) < 10_000 + message.count(str(folder)) * len(str(folder))
        return ("refused", "") if short else ("failed", f"a message of several lines or too long: {message[:300]!r}")
    except attempts.MayHaveNoEndError:
        return "not_run", ""
    except BaseException as error:  # panics of Rust code are no Exceptions
        return "failed", f"{type(error).__name__}: {str(error)[:300]!r} at {place(error)}"
    return "loaded", ""


def place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames[:-6:-1])


def work(kind: str, seed: int, first: int, last: int, bases: Path) -> None:
    """Report each of the cases first .. last - 1 in a line of JSON."""
    from transformers import AutoConfig

    # Imports should not count as a case's time: this one is that of a field of config.json that nobody knows.
    AutoConfig.for_model("llama")
    for base in sorted((bases / kind).iterdir()) if DAMAGES[kind] else ():
        ATTEMPTS[kind](base, Random(0))  # what is whole must load
    with tempfile.TemporaryDirectory() as scratch, captured_stderr(Path(scratch) / "told") as told:
        report({"ready": True})
        for case in range(first, last):
            folder = Path(scratch) / "case"
            random = damaged_copy(kind, seed, case, bases, folder)
            Path("/proc/self/clear_refs").write_text("5")  # the peak of this case alone
            began = time.perf_counter()
            result, detail = outcome(kind, folder, random)
            if complaint := next((line for line in told.read().splitlines() if COMPLAINT.search(line)), None):
                result, detail = "failed", f"on standard error: {complaint.decode(errors='replace')[:300]}"
            report(
                {
                    "case": case,
                    "outcome": result,
                    "detail": detail,
                    "seconds": time.perf_counter() - began,
                    "kib": peak_kib(),
                }
            )


@contextmanager
def captured_stderr(path: Path) -> Iterator[BinaryIO]:
    """A file to read, from where it was read last, what anything in this process has written to standard error."""
    with path.open("wb") as written, path.open("rb") as told:
        os.dup2(written.fileno(), sys.stderr.fileno())
        yield told


def peak_kib() -> int:
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def report(line: dict[str, object]) -> None:
    os.write(3, (json.dumps(line) + "\n").encode())  # stdout is left to whatever libraries print


# ---------------------------------------------------------------------------- all cases, watched from outside


@dataclass
class Tally:
    """What became of the cases of one kind."""

    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[int, str]] = field(default_factory=list)
    slowest: tuple[float, int] = (0.0, -1)
    kib: int = 0

    def add(self, line: dict[str, object]) -> None:
        self.outcomes[line["outcome"]] += 1
        self.slowest = max(self.slowest, (line["seconds"], line["case"]))
        self.kib = max(self.kib, line["kib"])
        if line["outcome"] == "failed":
            self.fail(line["case"], line["detail"])
        if line["kib"] > KIB_AT_MOST:
            self.fail(line["case"], f"{line['kib'] // 1024} MiB of memory")

    def fail(self, case: int, detail: str) -> None:
        self.failures.append((case, detail))
        print(f"  case {case}: {detail}", flush=True)


def run_kind(kind: str, seed: int, cases: int, bases: Path) -> Tally:
    """All cases of one kind, in a worker that is started again where one dies or hangs."""
    tally, case = Tally(), 0
    while case < cases:
        for line in lines_of_worker(kind, seed, case, cases, bases):
            if "ended" in line:
                if case < cases:
                    tally.outcomes["failed"] += 1
                    tally.fail(case, str(line["ended"]))
                    case += 1
            elif "case" in line:
                tally.add(line)
                case = line["case"] + 1
    return tally


def lines_of_worker(kind: str, seed: int, first: int, last: int, bases: Path) -> Iterator[dict[str, object]]:
    """What a worker reports, closed by how it `ended`: by itself, by a signal, or because a case took too long."""
    read, write = os.pipe()
    command = [sys.executable, "-m", "tests.robustness.fuzz", "--worker", str(first), str(last), str(bases)]
    process = subprocess.Popen(
        ["sh", "-c", 'exec "$@" 3>&' + str(write), "sh", *command, "--kind", kind, "--seed", str(seed)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=[write],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    os.close(write)
    pending, limit, ended = b"", SECONDS_TO_START, ""
    while True:
        ready, _, _ = select.select([read], [], [], limit)
        if not ready:
            ended = f"took more than {limit} s"
            break
        received = os.read(read, 1 << 16)
        if not received:
            break
        *whole, pending = (pending + received).split(b"\n")
        yield from map(json.loads, whole)
        limit = SECONDS_PER_CASE
    process.kill() if ended else None
    os.close(read)
    yield {"ended": ended or f"the process ended with status {process.wait()}"}
    process.wait()


def replay(kind: str, seed: int, case: int, bases: Path) -> int:
    """One case in this process, with its traceback."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "case"
        result, detail = outcome(kind, folder, damaged_copy(kind, seed, case, bases, folder))
        print(f"{kind} case {case} of seed {seed}: {result} {detail}")
        try:
            ATTEMPTS[kind](folder, damaged_copy(kind, seed, case, bases, folder))
        except BaseException:
            traceback.print_exc()
    return result == "failed"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, help="of each kind; default: as many as CASES says")
    parser.add_argument("--kind", choices=KINDS)
    parser.add_argument("--case", type=int, help="replay this one, of --kind")
    parser.add_argument("--results", type=Path, help="file to write the counts to, a line of JSON for each kind")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        first, last, bases = options.worker
        work(options.kind, options.seed, int(first), int(last), Path(bases))
        return 0
    made = environment()
    with tempfile.TemporaryDirectory() as folder:
        write_bases(Path(folder))
        if options.case is not None:
            return replay(options.kind, options.seed, options.case, Path(folder))
        kinds = KINDS if options.kind is None else (options.kind,)
        lines = [summarise(kind, options.seed, options.cases or CASES[kind], Path(folder)) for kind in kinds]
    if options.results is not None:
        options.results.write_text("".join(json.dumps(made | line) + "\n" for line in lines))
    return int(any(line["failed"] for line in lines))


def summarise(kind: str, seed: int, cases: int, bases: Path) -> dict[str, Any]:
    """Run the cases of one kind, and say what became of them."""
    began = time.perf_counter()
    tally = run_kind(kind, seed, cases, bases)
    seconds, slowest = tally.slowest
    line = {
        "kind": kind,
        "seed": seed,
        "cases": cases,
        **{name: tally.outcomes[name] for name in ("loaded", "refused", "not_run")},
        "failed": len(tally.failures),
        "slowest_seconds": round(seconds, 2),
        "slowest_case": slowest,
        "most_mebibytes": tally.kib // 1024,
        "seconds": round(time.perf_counter() - began),
    }
    print(json.dumps(line), flush=True)
    return line


if __name__ == "__main__":
    sys.exit(main())
