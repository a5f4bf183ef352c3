"""What is done with what was damaged, swapped or raced for: it works, or is refused; what loads must be whole.

Each function takes the folder of a case and a `random.Random`, and raises `CoreInferError` or nothing.
"""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

from tests.robustness.bases import WEIGHTS

TEXTS = ("Once upon a time, there was a little girl.", "  two  spaces\n\n\tand 123 \N{GRINNING FACE} caf\xe9\0", "")
# What patterns repeat, of which tries in vain at every character show.
RUNS = (5000 * "a", 5000 * " ", 2500 * "ab")
NAMED = {"bos_token": "<s>", "eos_token": "</s>"}
CONVERSATION = [{"role": "user", "content": "One two"}, {"role": "assistant", "content": "three."}]
# One of so many tokenizers and templates that may have no end is run in its process, whose start takes seconds; the
# others are known for what they are, and not run.
APART_ONCE_IN = 40


class MayHaveNoEndError(Exception):
    """What may have no end, and is not run."""


def load_model(folder: Path, random: Random) -> Any:
    import coreinfer_jax as ci
    from coreinfer_jax.io.generation_config import read_recommended

    params, _ = ci.load(folder, "float32")
    hash(params.config)
    read_recommended(folder, params.config)
    return params


def load_whole_weights(folder: Path, random: Random) -> None:
    """Where the weights are whole, what fits the config must be them."""
    import jax
    import numpy as np
    import safetensors.numpy

    params = load_model(folder, random)
    stored = list(safetensors.numpy.load_file(next(folder.glob("*.safetensors"))).values())
    for leaf in jax.tree.leaves(params):
        assert any(leaf.shape == array.shape and np.array_equal(leaf, array) for array in stored)


def use_tokenizer(folder: Path, random: Random) -> None:
    from coreinfer_jax.text import load_tokenizer
    from coreinfer_jax.text.tokenizer_cost import is_plain

    if (folder / "tokenizer.json").is_file() and not is_plain(folder) and random.randrange(APART_ONCE_IN):
        raise MayHaveNoEndError
    tokenizer = load_tokenizer(folder)
    for text in (*TEXTS, *RUNS) if tokenizer is not None else ():
        assert isinstance(tokenizer.decode(tokenizer.encode(text)), str)


def load_gguf(folder: Path, random: Random) -> None:
    import coreinfer_jax as ci

    os.environ["XDG_CACHE_HOME"] = str(folder)
    params, tokenizer = ci.load(folder / "model.gguf", "float32")
    hash(params.config)
    for text in TEXTS if tokenizer is not None else ():
        tokenizer.encode(text)


def read_calibration(folder: Path, random: Random) -> None:
    from coreinfer_jax.io import calibration_file
    from coreinfer_jax.io.config_json import read_model_config

    config = read_model_config(folder)
    assert calibration_file.read_facts(folder, config, lambda: "") is not None
    metadata, _ = calibration_file.load_arrays(folder / calibration_file.CALIBRATION)
    assert calibration_file.read_calibration(folder, config, lambda: metadata["model"]) is not None


def read_lists(folder: Path, random: Random) -> None:
    import numpy as np

    from coreinfer_jax.io.config_json import read_model_config
    from coreinfer_jax.lab.clustering.published import read_lists

    config = read_model_config(folder)
    for group in read_lists(folder / "lists.npz", config):
        assert len(group) == config.num_layers
        assert all(np.isin(neurons, np.arange(config.mlp_size)).all() for neurons in group)


def load_clusters(folder: Path, random: Random) -> None:
    from coreinfer_jax.lab.clustering import load_clusters

    assert len(load_clusters(folder).names) > 0


def read_documents(folder: Path, random: Random) -> None:
    import coreinfer_jax as ci

    (file,) = folder.iterdir()
    columns = {".csv": ("text", "label"), ".jsonl": ("text", "label"), ".tsv": (0, 1)}.get(file.suffix, (None, None))
    documents = ci.read_documents(file, *columns)
    assert all(text.strip() and text.encode() for text in documents.texts)
    assert documents.labels is None or len(documents.labels) == len(documents.texts)


def render_template(folder: Path, random: Random) -> None:
    from coreinfer_jax.text.template_cost import is_plain
    from coreinfer_jax.text.tokenizer_files import read_chat_template
    from coreinfer_jax.text.with_transformers import render_chat

    template = read_chat_template(folder)
    if not is_plain(str(template)) and random.randrange(APART_ONCE_IN):
        raise MayHaveNoEndError
    assert isinstance(render_chat(template, NAMED, CONVERSATION, folder, begin_answer=True), str)


# ---------------------------------------------------------------------------- files that change while they are read


def swap(folder: Path, random: Random) -> None:
    """Load weights of which another process changes the file after some reads: the old ones, or the new ones, whole."""
    import coreinfer_jax as ci
    from coreinfer_jax.io.held import HeldFile

    file = next(folder / name for name in WEIGHTS if (folder / name).is_file())
    wholes = [leaves_of(folder), leaves_of(folder, file, folder / "other")]
    change, moment = random.choice(CHANGES), random.randrange(60)
    check, count = HeldFile.check, iter(range(10**6))

    def checked(held: HeldFile) -> None:
        if next(count) == moment:
            change(file, folder / "other")
        check(held)

    with mock.patch.object(HeldFile, "check", checked):
        params, _ = ci.load(folder, "float32")
    assert any(same(leaves(params), whole) for whole in wholes), "a mixture of two files"


def leaves_of(folder: Path, file: Path | None = None, other: Path | None = None) -> list[Any]:
    """The weights that load from a folder, with `other` in place of one of its files."""
    import coreinfer_jax as ci

    if file is None or other is None:
        return leaves(ci.load(folder, "float32")[0])
    aside = file.rename(folder / "aside")
    other.rename(file)
    found = leaves(ci.load(folder, "float32")[0])
    file.rename(other)
    aside.rename(file)
    return found


def leaves(params: Any) -> list[Any]:
    import jax
    import numpy as np

    return [np.asarray(leaf) for leaf in jax.tree.leaves(params)]


def same(one: list[Any], other: list[Any]) -> bool:
    import numpy as np

    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def replaced(file: Path, other: Path) -> None:
    other.replace(file)


def overwritten(file: Path, other: Path) -> None:
    time.sleep(0.01)  # a clock tick, which changes the time stamp
    with file.open("r+b") as stream:
        stream.write(other.read_bytes())


def cut_short(file: Path, other: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def emptied(file: Path, other: Path) -> None:
    os.truncate(file, 0)


def removed(file: Path, other: Path) -> None:
    file.unlink()


def made_a_pipe(file: Path, other: Path) -> None:
    file.unlink()
    os.mkfifo(file)


CHANGES = (replaced, overwritten, cut_short, emptied, removed, made_a_pipe)


# ---------------------------------------------------------------------------- two writers of one path


def race(folder: Path, random: Random) -> None:
    """Two threads write the same path at nearly the same moment: one wins and the other is told, or both in turn."""
    write, check, most = random.choice(RACES)
    told = both(lambda: write(folder), random.random() * 0.02)
    assert len(told) <= most, f"nobody wrote it: {told}"
    check(folder)
    left = [path.name for path in folder.iterdir() if ".partial-" in path.name]
    assert not left, f"left half-written: {left}"


def both(write: Callable[[], object], seconds: float) -> list[str]:
    """What two threads, of which one waits for so many seconds, are refused with; other errors of theirs are raised."""
    from coreinfer_jax.errors import CoreInferError

    ready, told, failed = threading.Barrier(2), [], []

    def run(wait: float) -> None:
        ready.wait()
        time.sleep(wait)
        try:
            write()
        except CoreInferError as error:
            told.append(str(error))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(wait,)) for wait in (0.0, seconds)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return told


def convert(folder: Path) -> None:
    import coreinfer_jax as ci

    ci.convert(folder, folder / "converted")


def converted_is_whole(folder: Path) -> None:
    import coreinfer_jax as ci

    params, _ = ci.load(folder / "converted", "float32")
    assert same(leaves(params), leaves_of(folder))


def import_lists(folder: Path) -> None:
    import coreinfer_jax as ci

    ci.import_published(folder / "lists.npz", folder / "clusters", folder)


def clusters_are_whole(folder: Path) -> None:
    load_clusters(folder / "clusters", Random(0))


def write_file(folder: Path) -> None:
    from coreinfer_jax.files import new_file

    with new_file(folder / "file") as partial:
        partial.write_bytes(str(threading.get_ident()).encode() * 10_000)


def file_is_whole(folder: Path) -> None:
    content = (folder / "file").read_bytes()
    assert content == content[: len(content) // 10_000] * 10_000


# What is written, what must be there then, and how many of the two may be refused.
RACES = ((convert, converted_is_whole, 1), (import_lists, clusters_are_whole, 1), (write_file, file_is_whole, 1))
