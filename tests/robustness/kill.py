"""`kill -9` in the middle of `convert` and of `train`: what is there is whole, and what is begun again ends the same.

    python -m tests.robustness.kill [--seed 0] [--kills 20]

A converted directory must be whole or absent; a training run must end in the weights of a run that was left alone.
What killed processes leave half-written is counted, and must be gone once a later run has succeeded. Exit status 1
tells of violations.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

FIELDS = {
    "model_type": "llama",
    "vocab_size": 8000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
}

# A checkpoint after every step, so that most kills meet one being written.
TRAINING = """
import sys
from coreinfer_jax.lab.training import Recipe, train, trainer
trainer.CHECKPOINT_EVERY, trainer.MEASURE_EVERY = 1, 7
sizes = dict(vocab_size=300, hidden_size=32, mlp_size=64, num_layers=1, num_heads=2)
train(sys.argv[1], sys.argv[2:], Recipe(family="opt", sequence=32, batch=4, steps=40, warmup=5, **sizes))
"""
STEPS = 40

# Checkpoints of 150 MB, one after the other; every weight of checkpoint number n is n.
SAVING = """
import itertools, sys
from pathlib import Path
from coreinfer_jax.lab.training.checkpoints import History, save_state
from tests.robustness.kill import large_state
for number in itertools.count(int(sys.argv[2])):
    save_state(Path(sys.argv[1]), large_state(number), History([0.0] * number, [], 0.0))
"""


class Trials:
    """What was seen, and what should not have been."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.seen: Counter[str] = Counter()
        self.violations: list[str] = []

    def check(self, good: bool, what: str) -> None:
        if not good:
            self.violations.append(what)
            print(f"  VIOLATION: {what}", flush=True)

    def summarise(self, name: str, began: float) -> None:
        seen = ", ".join(f"{count} {what}" for what, count in sorted(self.seen.items()))
        print(f"{name}: {time.monotonic() - began:.0f} s; {seen}; {len(self.violations)} violations", flush=True)


def start(command: list[str], folder: Path) -> subprocess.Popen[bytes]:
    """A process whose compiled programs are kept, so that beginning again takes less time."""
    kept = {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, env=os.environ | {"JAX_PLATFORMS": "cpu"} | kept, **quiet)


def wait_for(process: subprocess.Popen[bytes], event: Callable[[], bool]) -> bool:
    """Wait until `event` or the end of the process; whether it was the event."""
    while process.poll() is None:
        if event():
            return True
        time.sleep(0.005)
    return False


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def leftovers(folder: Path) -> list[Path]:
    """Hidden files and directories, but not what lies in hidden directories."""
    found = [path.relative_to(folder) for path in folder.rglob(".*")]
    return sorted(folder / path for path in found if not any(part.startswith(".") for part in path.parent.parts))


# ---------------------------------------------------------------------------- convert


def write_checkpoint(directory: Path) -> None:
    """A bfloat16 checkpoint of some hundred megabytes."""
    from coreinfer_jax.io.config_json import model_config
    from coreinfer_jax.io.mapping import leaf_shapes, source_names

    directory.mkdir()
    config = model_config(FIELDS)
    pool = np.random.default_rng(0).standard_normal(10**7).astype(ml_dtypes.bfloat16)
    shapes = leaf_shapes(config)
    tensors = {
        name if name == "lm_head.weight" else f"model.{name}": np.resize(np.roll(pool, i), shapes[leaf])
        for i, (leaf, name) in enumerate(source_names(config).items())
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(FIELDS))


def kill_conversions(folder: Path, seed: int, kills: int) -> Trials:
    trials, began = Trials(seed), time.monotonic()
    source, target = folder / "source", folder / "kept" / "converted"
    target.parent.mkdir()
    write_checkpoint(source)
    size = (source / "model.safetensors").stat().st_size
    command = [sys.executable, "-m", "convert", str(source), str(target), "--dtype", "float32"]

    process, writing_since = start(command, folder), 0.0
    if wait_for(process, lambda: bool(leftovers(target.parent))):
        writing_since = time.monotonic()
    trials.check(process.wait() == 0, "a conversion that nobody disturbed failed")
    duration = time.monotonic() - writing_since
    whole = digests(target)
    print(f"convert: {size / 1e6:.0f} MB of bfloat16 to float32, {duration:.1f} s of writing", flush=True)

    for number in range(kills):
        if target.exists():
            for file in target.iterdir():
                file.unlink()
            target.rmdir()
        before = set(leftovers(target.parent))
        process = start(command, folder)
        # The directory being written is new; the one a killed process left is removed first.
        wait_for(process, lambda before=before: bool(set(leftovers(target.parent)) - before))
        time.sleep(trials.random.uniform(0, 1.1 * duration))
        process.kill()
        process.wait()
        left = leftovers(target.parent)
        trials.check(len(left) <= 1, f"conversion {number}: {len(left)} half-written directories at once")
        trials.seen["kills that left a half-written directory"] += len(left)
        trials.seen["destinations whole" if target.exists() else "destinations absent"] += 1
        trials.check(not target.exists() or digests(target) == whole, f"conversion {number}: destination not whole")

    if not target.exists():
        trials.check(start(command, folder).wait() == 0, "the conversion after the last kill failed")
    trials.check(digests(target) == whole, "the conversion after the last kill is another one")
    trials.summarise(f"convert, {kills} kills", began)
    return trials


# ---------------------------------------------------------------------------- train


def write_text(path: Path, seed: int) -> Path:
    random = Random(seed)
    words = ["".join(random.choices("abcdefghijklmnopqrstuvwxyz", k=random.randint(2, 8))) for _ in range(300)]
    told = (" ".join(random.choices(words, k=40)) + "\n<|endoftext|>\n" for _ in range(150))
    path.write_text("".join(told))
    return path


def kill_training(folder: Path, seed: int, kills: int) -> Trials:
    trials, began = Trials(seed), time.monotonic()
    texts = [str(write_text(folder / f"{name}.txt", number)) for number, name in enumerate(("first", "second"))]
    (folder / "runs").mkdir()

    def command(run: Path) -> list[str]:
        return [sys.executable, "-c", TRAINING, str(run), *texts]

    alone, run = folder / "runs" / "alone", folder / "runs" / "killed"
    trials.check(start(command(alone), folder).wait() == 0, "a run that nobody disturbed failed")
    since, process = time.monotonic(), start(command(folder / "runs" / "again"), folder)
    wait_for(process, lambda: (folder / "runs" / "again" / "checkpoint.safetensors").exists())
    first = time.monotonic() - since
    trials.check(process.wait() == 0, "a second run that nobody disturbed failed")
    each = (time.monotonic() - since - first) / STEPS
    trials.check(same_weights(alone, folder / "runs" / "again"), "two runs that nobody disturbed differ")
    print(f"train: {first:.1f} s until the first checkpoint, {each:.2f} s from one to the next", flush=True)

    for number in range(kills):
        process = start(command(run), folder)
        if number >= kills // 4:  # the others are killed while they start or prepare
            before = stamp(run)
            wait_for(process, lambda before=before: stamp(run) != before)
        time.sleep(trials.random.uniform(0, first if number < kills // 4 else 2 * each))
        process.kill()
        trials.seen["runs that ended before the kill" if process.wait() == 0 else "runs killed"] += 1
        trials.seen["kills that left something half-written"] += bool(leftovers(run.parent))
        check_run(trials, run, number)
    trials.check(start(command(run), folder).wait() == 0, "the run after the last kill failed")
    trials.check(same_weights(alone, run), "the run after the last kill ended in other weights")
    trials.check(not leftovers(run.parent), f"half-written files are left: {leftovers(run.parent)}")
    trials.summarise(f"train, {kills} kills", began)
    return trials


def stamp(run: Path, name: str = "checkpoint.safetensors") -> int:
    """Changes with every checkpoint."""
    try:
        return (run / name).stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def check_run(trials: Trials, run: Path, number: int) -> None:
    """Whatever has its final name is whole."""
    trials.seen["kills before the run's directory was there"] += not run.exists()
    for name in ("tokens.safetensors", "checkpoint.safetensors", "model/model.safetensors"):
        if (run / name).exists():
            with safe_open(run / name, framework="numpy") as file:
                for tensor in file.keys():  # noqa: SIM118 - not a dict
                    file.get_tensor(tensor)
    for name in ("settings.json", "loss.json", "model/training.json"):
        if (run / name).exists():
            json.loads((run / name).read_text())
    trials.check(not run.exists() or (run / "settings.json").exists(), f"run {number}: there without its settings")
    model = run / "model"
    trials.check(not model.exists() or (model / "training.json").exists(), f"run {number}: its model is not whole")
    if stamp(run):
        with safe_open(run / "checkpoint.safetensors", framework="numpy") as file:
            trials.seen["checkpoints met"] += 1
            losses = json.loads(file.metadata()["history"])["losses"]
            trials.check(len(losses) == file.get_tensor(".step"), f"run {number}: history and step disagree")


def same_weights(first: Path, second: Path) -> bool:
    def equal(name: str) -> bool:
        ours, theirs = load_file(first / name), load_file(second / name)
        return ours.keys() == theirs.keys() and all(ours[leaf].tobytes() == theirs[leaf].tobytes() for leaf in ours)

    losses = [json.loads((run / "loss.json").read_text())["losses"] for run in (first, second)]
    return losses[0] == losses[1] and equal("checkpoint.safetensors") and equal("model/model.safetensors")


# ---------------------------------------------------------------------------- the file of a checkpoint


def large_state(number: int) -> Any:
    """A training state of 150 MB after `number` steps, every float of it `number`."""
    import jax

    from coreinfer_jax.lab.training.recipe import Recipe, initial_params, initial_state, model_config

    recipe = Recipe(family="opt", hidden_size=512, mlp_size=2048, num_layers=3, num_heads=8)
    shapes = jax.eval_shape(lambda: initial_state(recipe, initial_params(model_config(recipe), 0)))
    return jax.tree.map(lambda leaf: np.full(leaf.shape, number, leaf.dtype), shapes)


def kill_saving(folder: Path, seed: int, kills: int) -> Trials:
    """A checkpoint that is being replaced is the one before or the one after."""
    import jax

    from coreinfer_jax.lab.training.checkpoints import load_state

    trials, began = Trials(seed), time.monotonic()
    like, path, number = large_state(0), folder / "checkpoint.safetensors", 0
    for kill in range(kills):
        process = start([sys.executable, "-c", SAVING, str(path), str(number + 1)], folder)
        before = stamp(folder)
        wait_for(process, lambda before=before: stamp(folder) != before)
        time.sleep(trials.random.uniform(0, 3))
        process.kill()
        trials.check(process.wait() != 0, f"kill {kill}: the process had ended")
        trials.seen["kills that left a half-written file"] += bool(leftovers(folder))
        state, history = load_state(path, like)
        trials.check(len(history.losses) > number, f"kill {kill}: an older checkpoint is back")
        number = len(history.losses)
        whole = all((np.asarray(leaf) == number).all() for leaf in jax.tree.leaves(state))
        trials.check(whole, f"kill {kill}: a mixture of checkpoints")
    trials.check(len(leftovers(folder)) <= 1, "half-written files pile up")
    trials.seen["checkpoints written"] += number
    trials.summarise(f"one checkpoint of {path.stat().st_size / 1e6:.0f} MB replaced, {kills} kills", began)
    return trials


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=20, help="of each command")
    parser.add_argument("--command", choices=("convert", "train", "save"), help="default: all")
    options = parser.parse_args()
    commands = {"convert": kill_conversions, "train": kill_training, "save": kill_saving}
    chosen = list(commands) if options.command is None else [options.command]
    with tempfile.TemporaryDirectory() as folder:
        violations = []
        for name in chosen:
            (Path(folder) / name).mkdir()
            violations += commands[name](Path(folder) / name, options.seed, options.kills).violations
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
