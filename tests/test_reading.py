"""Files that are read: only regular ones of a possible size, and the same one from beginning to end."""

import json
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import coreinfer_jax as ci
from coreinfer_jax import files
from coreinfer_jax.io import held, loading
from coreinfer_jax.lab.clustering import load_clusters
from coreinfer_jax.lab.clustering.published import read_lists
from coreinfer_jax.model.weights import named_leaves
from coreinfer_jax.text import load_tokenizer
from coreinfer_jax.text.documents import read_documents
from tests.support import LLAMA, OPT
from tests.test_bad_input import refusal
from tests.test_checkpoint import hub_tensors, write_hub
from tests.test_gguf import cache, write  # noqa: F401 - a fixture: no test may write into the user's cache

SECONDS = 60


def in_time(call: Callable[[], object]) -> str:
    """The refusal by `call`, which must not wait for anything."""
    told: list[str] = []
    thread = threading.Thread(target=lambda: told.append(refusal(call)), daemon=True)
    thread.start()
    thread.join(SECONDS)
    assert told, "it waits"
    return told[0]


# ---------------------------------------------------------------------------- what is no regular file


def hub_with(name: str) -> Callable[[Path], Callable[[], object]]:
    """Loading a checkpoint in which a pipe has this name."""

    def prepare(folder: Path) -> Callable[[], object]:
        hub = write_hub(folder / "hub", OPT, hub_tensors(OPT))
        if name == "model.safetensors":
            (hub / name).unlink()
        else:  # otherwise the whole file is taken
            (hub / "model.safetensors").rename(hub / "model-00001-of-00002.safetensors")
        os.mkfifo(hub / name)
        return lambda: ci.load(hub)

    return prepare


def native_with_pipe(folder: Path) -> Callable[[], object]:
    converted = ci.convert(write_hub(folder / "hub", OPT, hub_tensors(OPT)), folder / "native")
    os.mkfifo(converted / "weights-00009-of-00009.safetensors")
    return lambda: ci.load(converted)


def pipe(name: str, read: Callable[[Path], object]) -> Callable[[Path], Callable[[], object]]:
    def prepare(folder: Path) -> Callable[[], object]:
        os.mkfifo(folder / name)
        return lambda: read(folder / name)

    return prepare


PIPES = {
    "weights": hub_with("model.safetensors"),
    "one shard": hub_with("model-00002-of-00002.safetensors"),
    "a native shard": native_with_pipe,
    "a GGUF file": pipe("model.gguf", ci.load),
    "texts": pipe("texts.txt", read_documents),
    "lists": pipe("lists.npz", lambda path: read_lists(path, OPT)),
    "JSON": pipe("config.json", files.read_json),
    "clusters": pipe("clusters.json", lambda path: load_clusters(path.parent)),
}


@pytest.mark.parametrize("prepare", PIPES.values(), ids=PIPES)
def test_a_pipe_is_refused_and_not_waited_for(prepare, tmp_path):
    assert str(tmp_path) in in_time(prepare(tmp_path))


@pytest.mark.parametrize("path", ["/dev/zero", "/proc/self"])
def test_a_device_and_a_directory_are_no_texts(path):
    assert path in in_time(lambda: read_documents(path))


HUGE = {
    "config.json": lambda path: files.read_json(path),
    "tokenizer.json": lambda path: load_tokenizer(path.parent),
    "tokenizer.model": lambda path: load_tokenizer(path.parent),
    "texts.txt": read_documents,
}


@pytest.mark.parametrize(("name", "read"), HUGE.items(), ids=HUGE)
def test_a_file_larger_than_it_can_be_is_not_read(name, read, tmp_path):
    with (tmp_path / name).open("wb") as file:
        file.truncate(1 << 40)  # of holes
    assert f"{tmp_path / name}: {1 << 40} bytes" in refusal(lambda: read(tmp_path / name))


# ---------------------------------------------------------------------------- what changes while it is read


def replaced(file: Path, other: bytes) -> None:
    file.with_name("new").write_bytes(other)
    file.with_name("new").replace(file)


def overwritten(file: Path, other: bytes) -> None:
    time.sleep(0.01)  # a clock tick, which changes the time stamp
    with file.open("r+b") as stream:
        stream.write(other)


def cut_short(file: Path, other: bytes) -> None:
    os.truncate(file, 4096)


def whole_hub(folder: Path) -> Path:
    return write_hub(folder / "hub", LLAMA, hub_tensors(LLAMA)) / "model.safetensors"


def bin_hub(folder: Path) -> Path:
    from tests.test_bin_checkpoint import save_bin, write_bin

    return write_bin(folder / "hub", LLAMA, hub_tensors(LLAMA), save=save_bin) / "pytorch_model.bin"


def gguf_file(folder: Path) -> Path:
    return write(folder / "model.gguf")


def load_while(monkeypatch: pytest.MonkeyPatch, file: Path, change: Callable[[Path, bytes], None]) -> ci.Params:
    """What is loaded while another process changes the file after the third tensor."""
    read, count, other = loading.read_as, iter(range(1000)), bytes(file.stat().st_size)

    def reading(*arguments: object) -> np.ndarray:
        if next(count) == 3:
            change(file, other)
        return read(*arguments)

    monkeypatch.setattr(loading, "read_as", reading)
    return ci.load(file if file.suffix == ".gguf" else file.parent, "float32")[0]


KINDS = pytest.mark.parametrize(
    "make", [whole_hub, pytest.param(bin_hub, marks=pytest.mark.torch), gguf_file], ids=["safetensors", "bin", "gguf"]
)


@KINDS
def test_weights_replaced_meanwhile_are_those_that_were_opened(make, tmp_path, monkeypatch):
    file = make(tmp_path)
    before = dict(named_leaves(ci.load(file if file.suffix == ".gguf" else file.parent, "float32")[0]))
    for name, leaf in named_leaves(load_while(monkeypatch, file, replaced)):
        np.testing.assert_array_equal(leaf, before[name], err_msg=name)


@KINDS
@pytest.mark.parametrize("change", [overwritten, cut_short])
def test_weights_written_to_meanwhile_are_refused(make, change, tmp_path, monkeypatch):
    file = make(tmp_path)
    told = refusal(lambda: load_while(monkeypatch, file, change))
    assert f"{file}: changed while it was read" in told


def test_every_type_and_shape_is_read_as_safetensors_reads_it(tmp_path):
    draw = np.random.default_rng(0)
    arrays = {kind: draw.integers(0, 2, (3, 4)).astype(kind) for kind in held._ALL.values() if kind != "bfloat16"}
    arrays |= {"none": np.zeros((0, 5), np.float32), "a number": np.full((), 7.0, np.float64)}
    save_file(arrays, tmp_path / "all.safetensors")
    metadata, tensors = held.open_safetensors_file(tmp_path / "all.safetensors")
    expected = load_file(tmp_path / "all.safetensors")
    assert (metadata, tensors.keys()) == ({}, expected.keys())
    for name, array in expected.items():
        np.testing.assert_array_equal(tensors[name].read(), array, strict=True)
        if array.size > 1:
            np.testing.assert_array_equal(tensors[name].read_rows(1, 2), array[1:2], strict=True)


# ---------------------------------------------------------------------------- which of two sets of weights


def test_a_whole_file_is_taken_where_an_index_names_shards_that_are_not_there(tmp_path):
    hub = write_hub(tmp_path / "hub", OPT, hub_tensors(OPT))
    index = {"weight_map": dict.fromkeys(hub_tensors(OPT), "model-00001-of-00002.safetensors")}
    (hub / "model.safetensors.index.json").write_text(json.dumps(index))
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(hub).state_dict()
    ours = dict(named_leaves(ci.load(hub, "float32")[0]))
    embedding = theirs["model.decoder.embed_tokens.weight"].numpy()
    np.testing.assert_array_equal(ours["token_embedding"], embedding)


def test_an_error_lists_as_many_names_as_a_line_has_room_for(tmp_path):
    further = {f"z{i}": np.zeros(0, np.float32) for i in range(5000)}
    told = refusal(lambda: ci.load(write_hub(tmp_path / "hub", OPT, hub_tensors(OPT) | further)))
    assert "and 4970 more" in told
    assert len(told) < 10_000


# ---------------------------------------------------------------------------- races


def test_a_new_directory_that_another_process_takes_for_a_leftover_is_made_again(tmp_path, monkeypatch):
    make, races = files.tempfile.mkdtemp, iter([True, True])

    def raced(**named: object) -> str:
        made = make(**named)
        if next(races, False):
            files.remove_leftovers(tmp_path / "x")  # as another process does, before the lock is held
        return made

    monkeypatch.setattr(files.tempfile, "mkdtemp", raced)
    with files.new_file(tmp_path / "x") as partial:
        files.remove_leftovers(tmp_path / "x")  # now it is held
        partial.write_text("whole")
    assert (tmp_path / "x").read_text() == "whole"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def write_for(seconds: float, path: Path) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with files.new_file(path) as partial:
            partial.write_text("x" * 100)


def test_writers_of_one_file_do_not_remove_each_others_work(tmp_path):
    """Threads are as apart as processes here: each holds its locks by descriptors of its own."""
    with ThreadPoolExecutor(4) as writers:
        for written in [writers.submit(write_for, 2, tmp_path / "x") for _ in range(4)]:
            written.result()
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_text() == "x" * 100


def test_of_two_that_work_in_one_directory_the_second_is_told(tmp_path):
    with files.alone(tmp_path, "calibration"):
        told = refusal(lambda: files.alone(tmp_path, "calibration").__enter__())
    assert f"{tmp_path}: another calibration is at work here" in told


def test_what_its_own_reader_refuses_does_not_take_its_place(tmp_path):
    from coreinfer_jax.lab.training.checkpoints import History, save_state
    from tests.test_bad_input import blank_state, tiny

    told = refusal(lambda: save_state(tmp_path / "state", blank_state(tiny()), History([5.5, 5.4], [], 1.0)))
    assert f"{tmp_path / 'state'}: not written" in told
    assert not list(tmp_path.iterdir())


def test_a_model_that_is_held_open_keeps_no_descriptor_behind(tmp_path):
    hub = write_hub(tmp_path / "hub", OPT, hub_tensors(OPT))
    before = len(list(Path("/dev/fd").iterdir()))
    for _ in range(5):
        ci.load(hub)
    assert len(list(Path("/dev/fd").iterdir())) <= before + 1
