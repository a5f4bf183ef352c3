"""Damaged checkpoints by the thousand: each one loads, or is refused in one line; none hangs, crashes or eats memory.

    python -m tests.robustness.fuzz [--seed 0] [--cases 10000] [--kind config|safetensors|manifest|tokenizer|gguf]

A failure is printed with its seed, kind and number; add `--kind KIND --case NUMBER` to replay it alone, with the
traceback. Data is looked for in COREINFER_DATA, by default ../shared/data beside the repository. Exit status 1 tells of
failures. Memory is the peak of the resident set (VmHWM), which bounds anonymous memory (RssAnon) from above.
"""

import argparse
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random

from tests.conftest import DATA
from tests.robustness.mutate import damage_bytes, damage_gguf, damage_json, damage_safetensors, damage_text

SECONDS_PER_CASE = 10
SECONDS_TO_START = 120
KIB_AT_MOST = 2**20

TEXTS = ("Once upon a time, there was a little girl.", "  two  spaces\n\n\tand 123 \N{GRINNING FACE} caf\xe9\0", "")

Damage = Callable[[Random, bytes], bytes]
JSON_DAMAGE: tuple[Damage, ...] = (damage_bytes, damage_json, damage_json)
# File -> ways to damage it, for each kind; a file is chosen as often as it has ways.
DAMAGES: dict[str, dict[str, tuple[Damage, ...]]] = {
    "config": {"config.json": 3 * JSON_DAMAGE, "generation_config.json": JSON_DAMAGE},
    "safetensors": {
        "model.safetensors": 9 * (damage_safetensors,),
        "model.safetensors.index.json": JSON_DAMAGE,
    },
    "manifest": {"coreinfer.json": JSON_DAMAGE},
    "tokenizer": {
        "tokenizer.json": JSON_DAMAGE,
        "tokenizer_config.json": JSON_DAMAGE,
        "special_tokens_map.json": (damage_json,),
        "tokenizer.model": 4 * (damage_bytes,),
        "vocab.json": JSON_DAMAGE,
        "merges.txt": (damage_bytes, damage_text),
    },
    "gguf": {"model.gguf": (damage_gguf,)},
}
KINDS = tuple(DAMAGES)


# ---------------------------------------------------------------------------- what is damaged


def write_bases(folder: Path) -> None:
    """Whole checkpoints and tokenizers, folder/KIND/NAME: real ones, and small ones of the configs in tests.support."""
    from coreinfer_jax import convert

    write_models(folder / "config")
    shutil.copytree(folder / "config", folder / "safetensors")
    for directory in (folder / "safetensors").iterdir():
        header = (directory / "model.safetensors").read_bytes()
        names = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])
        index = {"weight_map": {name: "model.safetensors" for name in names if name != "__metadata__"}}
        if directory.name != "llama":  # one without an index
            (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "manifest").mkdir()
    for directory in (folder / "config").iterdir():
        convert(directory, folder / "manifest" / directory.name)
    write_tokenizers(folder / "tokenizer")
    write_ggufs(folder / "gguf")


def write_ggufs(folder: Path) -> None:
    from tests.test_gguf import byte_pairs, pieces, quantised_tensors, write

    for name in ("plain", "pairs", "pieces", "quantised"):
        (folder / name).mkdir(parents=True)
    write(folder / "plain" / "model.gguf")
    write(folder / "pairs" / "model.gguf", lambda writer: byte_pairs(writer, "gpt-2"))
    write(folder / "pieces" / "model.gguf", pieces)
    write(folder / "quantised" / "model.gguf", weights=quantised_tensors, theta=500_000.0)


def write_models(folder: Path) -> None:
    import numpy as np

    from coreinfer_jax.io.export import write_hugging_face
    from coreinfer_jax.model.config import Rope
    from coreinfer_jax.model.structure import abstract_params
    from coreinfer_jax.model.weights import named_leaves, with_leaves
    from tests.support import LLAMA, MODELS

    scaled = {"llama3": Rope(5e5, "llama3", 8.0, 1.0, 4.0, 64), "linear": Rope(1e4, "linear", 2.0)}
    for name, config in (MODELS | {name: replace(LLAMA, rope=rope) for name, rope in scaled.items()}).items():
        (folder / name).mkdir(parents=True)
        params = abstract_params(replace(config, num_layers=2), np.dtype(np.float32))
        shapes = {leaf: shape.shape for leaf, shape in named_leaves(params)}
        draw = np.random.default_rng(0).standard_normal
        weights = with_leaves(params, lambda leaf, shapes=shapes, draw=draw: draw(shapes[leaf], np.float32))
        write_hugging_face(folder / name, weights, np.dtype(np.float32))
    real = DATA / "models" / "tinystories-656k"
    (folder / real.name).mkdir()
    for file in ("config.json", "generation_config.json", "model.safetensors"):
        shutil.copyfile(real / file, folder / real.name / file)


def write_tokenizers(folder: Path) -> None:
    real = DATA / "models" / "tinystories-656k"
    bases = {name: folder / name for name in ("fast", "sentencepiece", "both", "bytes")}
    for base in bases.values():
        base.mkdir(parents=True)
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        for name in ("fast", "both"):
            shutil.copyfile(real / file, bases[name] / file)
    pieces = first_pieces((DATA / "tokenizers" / "llama2.model").read_bytes(), 1200)
    for name in ("sentencepiece", "both"):
        (bases[name] / "tokenizer.model").write_bytes(pieces)
    write_first_merges(DATA / "tokenizers" / "opt", bases["bytes"], 800)


def first_pieces(model: bytes, count: int) -> bytes:
    """A sentencepiece model with the first `count` pieces of another: fields number 1 of its protocol buffer."""
    kept, position, pieces = b"", 0, 0
    while position < len(model):
        tag = model[position]
        assert tag & 7 == 2, "every field of the model has a length"
        size, shift, end = 0, 0, position + 1
        while True:
            size |= (model[end] & 127) << shift
            shift += 7
            end += 1
            if model[end - 1] < 128:
                break
        if tag != 10 or pieces < count:
            kept += model[position : end + size]
        pieces += tag == 10
        position = end + size
    return kept


def write_first_merges(source: Path, target: Path, count: int) -> None:
    """A byte-level BPE tokenizer with the first `count` merges of another."""
    lines = (source / "merges.txt").read_text().splitlines()[: count + 1]
    merged = {line.replace(" ", "") for line in lines[1:]}
    vocabulary = json.loads((source / "vocab.json").read_text())
    kept = [token for token in vocabulary if len(token) == 1 or token in merged or token.startswith("<")]
    (target / "merges.txt").write_text("\n".join(lines) + "\n")
    (target / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(kept)}))
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(source / file, target / file)


# ---------------------------------------------------------------------------- one case, in a worker process


def damaged_copy(kind: str, seed: int, case: int, bases: Path, folder: Path) -> Path:
    """Write case number `case`: a base with one file damaged. A function of its arguments only."""
    random = Random(f"{seed}/{kind}/{case}")
    base = random.choice(sorted(path for path in (bases / kind).iterdir()))
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(base, folder)
    ways = [(name, way) for name, found in DAMAGES[kind].items() for way in found if (folder / name).is_file()]
    name, way = random.choice(ways)
    (folder / name).write_bytes(way(random, (folder / name).read_bytes()))
    return folder


def attempt(kind: str, folder: Path) -> None:
    """Load what `folder` holds; what loads must work."""
    import jax
    import numpy as np

    import coreinfer_jax as ci
    from coreinfer_jax.io.generation_config import read_recommended
    from coreinfer_jax.text import load_tokenizer

    if kind == "tokenizer":
        tokenizer = load_tokenizer(folder)
        for text in TEXTS if tokenizer is not None else ():
            assert isinstance(tokenizer.decode(tokenizer.encode(text)), str)
        return
    if kind == "gguf":
        os.environ["XDG_CACHE_HOME"] = str(folder)
        params, tokenizer = ci.load(folder / "model.gguf", "float32")
        hash(params.config)
        for text in TEXTS if tokenizer is not None else ():
            tokenizer.encode(text)
        return
    params, _ = ci.load(folder, "float32")
    hash(params.config)
    read_recommended(folder, params.config)
    if kind in ("config", "manifest"):  # the weights are whole, so what fits the config must be them
        import safetensors.numpy

        stored = list(safetensors.numpy.load_file(next(folder.glob("*.safetensors"))).values())
        for leaf in jax.tree.leaves(params):
            assert any(leaf.shape == array.shape and np.array_equal(leaf, array) for array in stored)


def outcome(kind: str, folder: Path) -> tuple[str, str]:
    """`loaded`, `refused` or `failed`, and what there is to say."""
    from coreinfer_jax.errors import CoreInferError

    try:
        attempt(kind, folder)
    except CoreInferError as error:
        message = str(error)
        short = "\n" not in message and len(message) < 10_000 + message.count(str(folder)) * len(str(folder))
        return ("refused", "") if short else ("failed", f"a message of several lines or too long: {message[:300]!r}")
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
    for base in sorted((bases / kind).iterdir()):
        attempt(kind, base)  # what is whole must load
    with tempfile.TemporaryDirectory() as scratch:
        report({"ready": True})
        for case in range(first, last):
            folder = damaged_copy(kind, seed, case, bases, Path(scratch) / "case")
            Path("/proc/self/clear_refs").write_text("5")  # the peak of this case alone
            began = time.perf_counter()
            result, detail = outcome(kind, folder)
            report(
                {
                    "case": case,
                    "outcome": result,
                    "detail": detail,
                    "seconds": time.perf_counter() - began,
                    "kib": peak_kib(),
                }
            )


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
        folder = damaged_copy(kind, seed, case, bases, Path(scratch) / "case")
        result, detail = outcome(kind, folder)
        print(f"{kind} case {case} of seed {seed}: {result} {detail}")
        try:
            attempt(kind, folder)
        except BaseException:
            traceback.print_exc()
    return result == "failed"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=10_000, help="of each kind")
    parser.add_argument("--kind", choices=KINDS)
    parser.add_argument("--case", type=int, help="replay this one, of --kind")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        first, last, bases = options.worker
        work(options.kind, options.seed, int(first), int(last), Path(bases))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        write_bases(Path(folder))
        if options.case is not None:
            return replay(options.kind, options.seed, options.case, Path(folder))
        kinds = KINDS if options.kind is None else (options.kind,)
        return max(summarise(kind, options.seed, options.cases, Path(folder)) for kind in kinds)


def summarise(kind: str, seed: int, cases: int, bases: Path) -> int:
    began = time.perf_counter()
    tally = run_kind(kind, seed, cases, bases)
    seconds, slowest = tally.slowest
    print(
        f"{kind}, seed {seed}: {cases} cases in {time.perf_counter() - began:.0f} s: "
        f"{tally.outcomes['loaded']} loaded, {tally.outcomes['refused']} refused, {tally.outcomes['failed']} failed; "
        f"slowest {seconds:.2f} s (case {slowest}); peak {tally.kib / 1024:.0f} MiB",
        flush=True,
    )
    return 1 if tally.failures else 0


if __name__ == "__main__":
    sys.exit(main())
