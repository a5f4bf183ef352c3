"""Damaged files by the thousand, files that change while they are read, races: all load, or are refused in one line.

    python -m tests.robustness.fuzz [--seed 0] [--cases N] [--kind KIND] [--results FILE]

None may end in a traceback, hang, end the process or take more than 1 GiB. Without `--cases`, each kind has as many as
`CASES` says. A failure is printed with its seed, kind and number; add `--kind KIND --case NUMBER` to replay it alone,
with the traceback. `--results` adds a line of JSON with the counts of each kind. Data is looked for in
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
from collections.abc import Callable, Iterator, Mapping
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
# As many of each kind as make a run of half an hour on a busy computer: more of those that take less.
CASES = {
    "documents": 5500,
    "clusters": 5500,
    "lists": 4000,
    "config": 1000,
    "safetensors": 1000,
    "manifest": 600,
    "gguf": 600,
    "calibration": 1000,
    "tokenizer": 600,
    "bin": 300,
    "template": 200,
    "swap": 80,
    "race": 80,
}
KINDS = tuple(CASES)


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


def work(seed: int, counts: Mapping[str, int], first: int, bases: Path) -> None:
    """Report each of so many cases of each kind in a line of JSON, from the `first` of the first kind on."""
    from transformers import AutoConfig

    # Imports should not count as a case's time: this one is that of a field of config.json that nobody knows.
    AutoConfig.for_model("llama")
    with tempfile.TemporaryDirectory() as scratch, captured_stderr(Path(scratch) / "told") as told:
        for kind, count in counts.items():
            for base in sorted((bases / kind).iterdir()) if DAMAGES[kind] else ():
                ATTEMPTS[kind](base, Random(0))  # what is whole must load
            report({"ready": kind})
            for case in range(first, count):
                report({"kind": kind, "case": case, **measured(kind, seed, case, bases, Path(scratch) / "case", told)})
            first = 0


def measured(kind: str, seed: int, case: int, bases: Path, folder: Path, told: BinaryIO) -> dict[str, object]:
    """What became of a case, its seconds and its peak of memory; `told` is what goes to standard error."""
    random = damaged_copy(kind, seed, case, bases, folder)
    Path("/proc/self/clear_refs").write_text("5")  # the peak of this case alone
    began = time.perf_counter()
    result, detail = outcome(kind, folder, random)
    if complaint := next((line for line in told.read().splitlines() if COMPLAINT.search(line)), None):
        result, detail = "failed", f"on standard error: {complaint.decode(errors='replace')[:300]}"
    return {"outcome": result, "detail": detail, "seconds": time.perf_counter() - began, "kib": peak_kib()}


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
    seconds: float = 0.0

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


def run(seed: int, counts: Mapping[str, int], bases: Path) -> Iterator[tuple[str, Tally]]:
    """What became of so many cases of each kind; the worker is started again where one has died or hangs."""
    tallies = {kind: Tally() for kind in counts}
    left, case = dict(counts), 0
    while left:
        kind, began = next(iter(left)), time.perf_counter()
        for line in lines_of_worker(seed, left, case, bases):
            if "case" in line:
                tallies[kind].add(line)
                case = line["case"] + 1
            elif "ended" in line and left:
                tallies[kind].fail(case, str(line["ended"]))
                case += 1
            if left and case >= left[kind]:
                del left[kind]
                tallies[kind].seconds += time.perf_counter() - began
                yield kind, tallies[kind]
                kind, case, began = next(iter(left), kind), 0, time.perf_counter()


def lines_of_worker(seed: int, counts: Mapping[str, int], first: int, bases: Path) -> Iterator[dict[str, Any]]:
    """What a worker reports, closed by how it `ended`: by itself, by a signal, or because a case took too long."""
    read, write = os.pipe()
    command = [sys.executable, "-m", "tests.robustness.fuzz", "--worker", json.dumps(counts), str(first), str(bases)]
    process = subprocess.Popen(
        ["sh", "-c", 'exec "$@" 3>&' + str(write), "sh", *command, "--seed", str(seed)],
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
    parser.add_argument("--results", type=Path, help="file to add the counts to, a line of JSON for each kind")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        counts, first, bases = options.worker
        work(options.seed, json.loads(counts), int(first), Path(bases))
        return 0
    made = environment()
    with tempfile.TemporaryDirectory() as folder:
        write_bases(Path(folder))
        if options.case is not None:
            return replay(options.kind, options.seed, options.case, Path(folder))
        kinds = KINDS if options.kind is None else (options.kind,)
        counts = {kind: options.cases or CASES[kind] for kind in kinds}
        failed = 0
        for kind, tally in run(options.seed, counts, Path(folder)):
            line = summary(kind, options.seed, counts[kind], tally)
            print(json.dumps(line), flush=True)
            failed += line["failed"]
            if options.results is not None:
                with options.results.open("a") as results:
                    results.write(json.dumps(made | line) + "\n")
    return int(failed > 0)


def summary(kind: str, seed: int, cases: int, tally: Tally) -> dict[str, Any]:
    """What became of the cases of one kind, as a line of the results has it."""
    seconds, slowest = tally.slowest
    return {
        "kind": kind,
        "seed": seed,
        "cases": cases,
        **{name: tally.outcomes[name] for name in ("loaded", "refused", "not_run")},
        "failed": len(tally.failures),
        "slowest_seconds": round(seconds, 2),
        "slowest_case": slowest,
        "most_mebibytes": tally.kib // 1024,
        "seconds": round(tally.seconds),
    }


if __name__ == "__main__":
    sys.exit(main())
