"""Names of the Hugging Face hub: what they mean, on a cache as the hub's client keeps it, without a network."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError

import coreinfer_jax as ci
from coreinfer_jax.cli import main
from coreinfer_jax.io.calibration_file import CALIBRATION
from coreinfer_jax.io.hub import fetch, looks_like_hub_id, needed_files, needed_parts
from coreinfer_jax.io.loading import model_path
from tests.test_bad_input import refusal
from tests.test_checkpoint import listing
from tests.test_gguf import byte_pairs, tensors, write

PROMPT = [[5, 6, 7]]


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty cache of the hub's client, which is offline, and one of ours; nothing is remembered of other tests."""
    home = tmp_path_factory.mktemp("caches")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "ours"))
    fetch.cache_clear()
    return home / "hub"


def publish(cache: Path, repository: str, source: Path) -> Path:
    """Put the files of a folder into the client's cache as a download does: the folder of its revision."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    revision = hashlib.sha1(repository.encode()).hexdigest()
    snapshot = folder / "snapshots" / revision
    for part in ("refs", "blobs"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text(revision)
    for file in source.rglob("*"):
        if file.is_file():
            blob = folder / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
            blob.write_bytes(file.read_bytes())
            link = snapshot / file.relative_to(source)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


def halves(folder: Path) -> None:
    """The small LLaMA of the GGUF tests in two files."""
    folder.mkdir(parents=True, exist_ok=True)
    for which in (0, 1):

        def weights(writer, which: int = which) -> None:
            for name, array in list(tensors())[which::2]:
                writer.add_tensor(name, array)

        write(folder / f"model-0000{which + 1}-of-00002.gguf", weights=weights)


def test_every_way_to_name_a_model_takes_a_hub_id(shallow, cache: Path, capsys, tmp_path: Path) -> None:
    snapshot = publish(cache, "some/llama", shallow["llama"])
    assert model_path("some/llama") == snapshot
    expected = ci.forward(ci.load(shallow["llama"])[0], PROMPT)
    np.testing.assert_array_equal(ci.forward(ci.load("some/llama")[0], PROMPT), expected)
    converted = ci.convert("some/llama", tmp_path / "converted")
    np.testing.assert_array_equal(ci.forward(ci.load(converted)[0], PROMPT), expected)
    assert main(["generate", "Once upon a time", "--model", "some/llama", "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["converted"]


def test_the_clients_own_switches_rule(shallow, cache: Path) -> None:
    """In a process of its own, which reads them from its environment."""
    publish(cache, "some/opt", shallow["opt"])

    def info(model: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-c", "from coreinfer_jax.cli import main; exit(main())", "info", model]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)

    done = info("some/opt")
    assert (done.returncode, done.stderr) == (0, "")
    assert "opt, relu" in done.stdout
    refused = info("some/other")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.count("\n") == 1
    assert "some/other: " in refused.stderr
    assert "HF_HUB_OFFLINE" in refused.stderr


def test_what_is_here_wins(shallow, cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    publish(cache, "some/opt", shallow["llama"])
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "opt").symlink_to(shallow["opt"])
    monkeypatch.chdir(tmp_path)
    assert ci.load("some/opt")[0].config.family == "opt"


def test_a_path_is_never_looked_for_elsewhere(shallow, cache: Path) -> None:
    publish(cache, "some/opt", shallow["opt"])
    assert "no such directory" in refusal(lambda: ci.load(Path("some/opt")))


@pytest.mark.parametrize(
    "call",
    [ci.load, lambda model: ci.convert(model, "there"), lambda model: main(["info", model]) or pytest.fail("passed")],
    ids=["load", "convert", "info"],
)
def test_offline_and_not_cached_is_one_line(call: Callable, monkeypatch, capsys, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for model in ("some/opt", "some/llama:model.gguf"):
        try:
            call(model)
            told = capsys.readouterr().err
        except ci.CoreInferError as error:
            told = str(error)
        assert f"{model}: " in told
        assert "unset that, or give a local directory or file" in told
        assert told.strip().count("\n") == 0
    assert list(tmp_path.iterdir()) == []


def test_a_calibration_lies_beside_the_links_and_harms_no_cache(shallow, cache: Path, capsys, tmp_path: Path) -> None:
    snapshot = publish(cache, "some/opt", shallow["opt"])
    (snapshot / CALIBRATION).unlink(missing_ok=True)
    stories = tmp_path / "stories.txt"
    stories.write_text("Once upon a time there was a little girl who liked to play in the garden.\n" * 8)
    lengths = ("--prompt-tokens", "4", "--continuation", "4", "--texts", "2")
    assert main(["calibrate", "--model", "some/opt", "--data", str(stories), "--max-kl", "9", *lengths]) == 0
    capsys.readouterr()
    assert not (snapshot / CALIBRATION).is_symlink()
    assert ci.load("some/opt")[0].calibration is not None
    scanned = huggingface_hub.scan_cache_dir(cache)
    assert not scanned.warnings
    scanned.delete_revisions(snapshot.name).execute()
    assert not snapshot.exists()


def test_a_gguf_file_of_a_repository(cache: Path, tmp_path: Path) -> None:
    halves(tmp_path / "whole" / "parts")
    whole = write(tmp_path / "whole" / "small.Q8.gguf")
    snapshot = publish(cache, "some/files", tmp_path / "whole")
    expected = ci.forward(ci.load(whole)[0], PROMPT)
    for file in ("small.Q8.gguf", "parts/model-00001-of-00002.gguf"):
        np.testing.assert_array_equal(ci.forward(ci.load(f"some/files:{file}")[0], PROMPT), expected)
    assert "not on this disk" in refusal(lambda: ci.load("some/files:other.gguf"))
    (snapshot / "parts" / "model-00002-of-00002.gguf").unlink()
    told = refusal(lambda: ci.load("some/files:parts/model-00001-of-00002.gguf"))
    assert "missing model-00002-of-00002.gguf" in told


def test_a_gguf_file_that_was_moved_in_the_cache_is_unpacked_anew(cache: Path, tmp_path: Path) -> None:
    """Another revision has another folder; that of the one before may be gone."""
    (tmp_path / "whole").mkdir()
    write(tmp_path / "whole" / "small.gguf")
    snapshot = publish(cache, "some/files", tmp_path / "whole")
    first = model_path("some/files:small.gguf")
    snapshot.rename(snapshot.with_name("0" * 40))
    (cache / "models--some--files" / "refs" / "main").write_text("0" * 40)
    fetch.cache_clear()
    assert model_path("some/files:small.gguf") != first
    ci.load("some/files:small.gguf")


def online(monkeypatch: pytest.MonkeyPatch, cache: Path, available: Path) -> list[list[str]]:
    """The hub holds the files of a folder under any name; what is downloaded of them, a list for each call."""
    calls: list[list[str]] = []

    def info(api: object, repository: str) -> SimpleNamespace:
        return listing(sorted(str(file.relative_to(available)) for file in available.rglob("*") if file.is_file()))

    def download(repository: str, allow_patterns: list[str]) -> str:
        calls.append(allow_patterns)
        return str(publish(cache, repository, available))

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return calls


def test_parts_are_downloaded_together(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    halves(tmp_path / "repository")
    write(tmp_path / "repository" / "other.gguf", lambda writer: byte_pairs(writer, "gpt-2"))
    calls = online(monkeypatch, cache, tmp_path / "repository")
    ci.load("some/files:model-00001-of-00002.gguf")
    assert calls == [["model-00001-of-00002.gguf", "model-00002-of-00002.gguf"]]
    told = refusal(lambda: ci.load("some/files:absent.gguf"))
    assert "absent.gguf is not in the repository; there are model-00001-of-00002.gguf, other.gguf" in told
    told = refusal(lambda: ci.load("some/files"))
    assert "name one behind a colon: model-00001-of-00002.gguf, other.gguf" in told


def test_a_process_asks_the_hub_once(shallow, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    calls = online(monkeypatch, cache, shallow["opt"])
    assert main(["generate", "Once", "--model", "some/opt", "--max-new-tokens", "2"]) == 0
    capsys.readouterr()
    assert len(calls) == 1
    assert {"config.json", "model.safetensors"} <= set(calls[0])


def test_a_failing_hub_leaves_what_was_downloaded_before(shallow, cache: Path, monkeypatch) -> None:
    def fail(api: object, repository: str) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
    publish(cache, "some/opt", shallow["opt"])
    assert ci.load("some/opt")[0].config.family == "opt"
    assert "(no route to host)" in refusal(lambda: ci.load("some/other"))


def test_a_repository_that_is_not_there_or_gated(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(api: object, repository: str) -> None:
        response = SimpleNamespace(headers={}, request=None, status_code=401)
        raise GatedRepoError("401 Client Error.\n\nRepository Not Found", response=response)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
    assert "run 'hf auth login'" in refusal(lambda: ci.load("some/secret"))


@pytest.mark.parametrize("name", ["some--thing/opt", "some/..opt", "x" * 100 + "/opt", "some/opt.git"])
def test_names_that_the_hub_does_not_allow(name: str) -> None:
    assert name in refusal(lambda: ci.load(name))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("org/name:FILE.gguf", True),
        ("org/name:Q4/FILE-00001-of-00002.gguf", True),
        ("org/name:FILE.bin", False),
        ("org/name:", False),
        ("name:FILE.gguf", False),
        ("org/name:a:b.gguf", False),
        ("org/name:\0.gguf", False),
        ("package:org/name.gguf", False),
    ],
)
def test_what_looks_like_a_file_of_the_hub(source: str, expected: bool) -> None:
    assert looks_like_hub_id(source) == expected


def test_needed_files() -> None:
    files = ["README.md", "a.gguf", *(f"b-0000{i}-of-00003.gguf" for i in (1, 2, 3)), "mmproj.bin"]
    assert needed_parts(files, "a.gguf") == ["a.gguf"]
    assert needed_parts(files, "b-00002-of-00003.gguf") == files[2:5]
    many = [f"{i:02d}.gguf" for i in range(20)]
    assert refusal(lambda: needed_files(many)).endswith("07.gguf and 12 more")
    assert refusal(lambda: needed_parts(["README.md"], "a.gguf")).endswith("there are no GGUF files")
