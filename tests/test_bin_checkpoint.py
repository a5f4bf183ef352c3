"""PyTorch's `.bin` checkpoints: the tensors of the safetensors file, and nothing a pickle might run."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import coreinfer_jax as ci
from tests.support import LLAMA, OPT
from tests.test_checkpoint import BFLOAT16, FLOAT16, FLOAT32, assert_leaves, hub_tensors, refusal, weights, write_hub

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch


def torch_tensors(tensors: dict[str, np.ndarray], dtype: np.dtype = FLOAT32) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array.copy()).to(getattr(torch, dtype.name)) for name, array in tensors.items()}


def save_bin(
    tensors: dict[str, np.ndarray], file: Path, dtype: np.dtype = FLOAT32, legacy: bool = False, **more: object
) -> None:
    torch.save(torch_tensors(tensors, dtype) | more, file, _use_new_zipfile_serialization=not legacy)


write_bin = partial(write_hub, stem="pytorch_model", suffix="bin")


@pytest.mark.parametrize(("shards", "index"), [(1, False), (3, True), (3, False)], ids=["whole", "index", "no index"])
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16, BFLOAT16], ids=str)
def test_bin_equals_safetensors(tmp_path, dtype, legacy, shards, index):
    save = partial(save_bin, dtype=dtype, legacy=legacy)
    hub = write_bin(tmp_path / "hub", OPT, hub_tensors(OPT), shards, index, save)
    rounded = {name: array.astype(dtype) for name, array in weights(OPT).items()}
    assert_leaves(ci.load(hub, "float32")[0], rounded)
    converted = ci.convert(hub, tmp_path / "native")
    assert_leaves(ci.load(converted, dtype)[0], rounded, dtype)


def test_tensors_that_share_memory(tmp_path):
    """Old exports tie by saving one storage under two names; views need not be contiguous either."""
    tensors = torch_tensors(hub_tensors(OPT))
    tensors["lm_head.weight"] = tensors["model.decoder.embed_tokens.weight"]
    name = "model.decoder.layers.0.fc1.weight"
    tensors[name] = tensors[name].T.contiguous().T
    hub = write_bin(tmp_path / "hub", OPT, tensors, save=torch.save)
    assert_leaves(ci.load(hub, "float32")[0], weights(OPT))


def test_bin_of_another_pickle_protocol(tmp_path):
    """PyTorch warns of it, though it reads it."""
    save = partial(torch.save, pickle_protocol=3)
    hub = write_bin(tmp_path / "hub", OPT, torch_tensors(hub_tensors(OPT)), save=save)
    assert_leaves(ci.load(hub, "float32")[0], weights(OPT))


def test_safetensors_go_first(tmp_path):
    hub = write_hub(tmp_path / "hub", LLAMA, hub_tensors(LLAMA))
    (hub / "pytorch_model.bin").write_bytes(b"never opened")
    assert_leaves(ci.load(hub, "float32")[0], weights(LLAMA))


class Malicious:
    """Unpickling creates `file`."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable, tuple]:
        return open, (str(self.file), "w")


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_pickles_run_nothing(tmp_path, legacy):
    created = tmp_path / "created"
    save = partial(save_bin, legacy=legacy, malicious=Malicious(created))
    hub = write_bin(tmp_path / "hub", OPT, hub_tensors(OPT), save=save)
    assert "not a PyTorch state dict that loads with weights_only" in refusal(hub)
    assert not created.exists()
    torch.load(hub / "pytorch_model.bin", weights_only=False)["malicious"].close()
    assert created.exists()  # so the file was a danger indeed


@pytest.mark.parametrize("kept", [0, 28, 49, 1000, 6000, 80_000, -1])
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_truncated_bin(tmp_path, legacy, kept):
    hub = write_bin(tmp_path / "hub", OPT, hub_tensors(OPT), save=partial(save_bin, legacy=legacy))
    file = hub / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:kept])
    assert f"{file}: not a PyTorch state dict" in refusal(hub)


def test_corrupt_legacy_bin(tmp_path):
    """A tensor that refers to a storage which is not there."""
    hub = write_bin(tmp_path / "hub", OPT, hub_tensors(OPT), save=partial(save_bin, legacy=True))
    file = hub / "pytorch_model.bin"
    content = file.read_bytes()
    key = re.search(rb"X.\0\0\0(\d{6,})", content, re.DOTALL)
    assert key is not None
    file.write_bytes(content[: key.start(1)] + b"0" + content[key.start(1) + 1 :])
    assert f"{file}: not a PyTorch state dict" in refusal(hub)


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ([1, 2], "holds a list, not a state dict"),
        ({"model.norm.weight": torch.zeros(3, dtype=torch.int8)}, "model.norm.weight is torch.int8"),
        ({"epoch": 3}, "epoch is int"),
    ],
    ids=["list", "int8", "number"],
)
def test_what_is_no_state_dict(tmp_path, state, expected):
    hub = write_bin(tmp_path / "hub", OPT, {}, save=lambda tensors, file: torch.save(state, file))
    assert expected in refusal(hub)
