"""What is too large is refused before any work, with the bytes needed and the bytes there."""

import numpy as np
import pytest

import coreinfer_jax as ci
from coreinfer_jax import device
from coreinfer_jax.cli import main
from coreinfer_jax.engine.generation import make_request
from coreinfer_jax.errors import CoreInferError
from tests.support import LLAMA, OPT, random_model
from tests.test_prediction import AUTO, FUSED, SIMILARITY, groups

PROMPT = [[5, 6, 7, 8]]


def request(params, core, tokens=PROMPT, new=8):
    return make_request(params, tokens, core, {"max_new_tokens": new})


@pytest.mark.parametrize(("config", "per_neuron"), [(OPT, 2 * 32), (LLAMA, 3 * 32)], ids=["opt", "llama"])
def test_bytes_of_a_call_equal_a_hand_count(config, per_neuron):
    params = random_model(config)
    cache = 4 * 2 * 3 * config.num_kv_heads * 8 * 64
    K = int(0.5 * 96)
    assert request(params, None).added_bytes == cache
    assert request(params, ci.CoreConfig(beta=0.5)).added_bytes == cache + 4 * 3 * K * per_neuron
    assert request(params, ci.CoreConfig(beta=0.5, layers=(0.3, 1.0))).added_bytes == cache + 4 * 2 * K * per_neuron
    rows = PROMPT * 2
    assert request(params, ci.CoreConfig(beta=0.5), rows).added_bytes == 2 * (cache + 4 * 3 * K * per_neuron)
    shared = ci.CoreConfig(beta=0.5, per_row=False)
    assert request(params, shared, rows).added_bytes == 2 * cache + 4 * 3 * K * per_neuron
    given = ci.CoreNeurons([np.arange(10), None, np.arange(20)])
    assert request(params, given).added_bytes == cache + 4 * 30 * per_neuron


def test_an_accelerator_says_what_is_left_of_its_limit(monkeypatch):
    class Accelerator:
        platform = "gpu"

        def memory_stats(self):
            return {"bytes_limit": 1000, "bytes_in_use": 400}

    monkeypatch.setattr(device.jax, "local_devices", lambda: [Accelerator()])
    assert device.free_bytes() == 600
    device.check_memory(600, "weights", "take fewer")
    with pytest.raises(CoreInferError, match="weights: 0"):
        device.check_memory(601, "weights", "take fewer")


def test_a_generation_without_room_is_refused_before_it_begins(monkeypatch):
    params = random_model(OPT)
    needed = request(params, None).needed_bytes
    monkeypatch.setattr(device, "free_bytes", lambda: needed)
    ci.generate(params, PROMPT, None, max_new_tokens=8)
    monkeypatch.setattr(device, "free_bytes", lambda: needed - 1)
    with pytest.raises(CoreInferError, match=r"0\.00 GB are free; ask for fewer rows or tokens"):
        ci.stream(params, PROMPT, None, max_new_tokens=8)


def test_a_model_without_room_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(device, "free_bytes", lambda: 1_000_000)
    assert main(["info", "embedded:opt"]) == 0
    assert main(["generate", "Once", "--model", "embedded:opt"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert "as float32: 0.02 GB are needed and 0.00 GB are free; take a 16-bit dtype" in said[0]


def test_memory_that_nobody_tells_is_no_obstacle(monkeypatch, tmp_path):
    monkeypatch.setattr(device, "_MEMORY", tmp_path / "none")
    assert device.free_bytes() is None
    device.check_memory(1 << 60, "anything", "nothing")


def test_free_memory_counts_what_is_available_and_swap(monkeypatch, tmp_path):
    told = tmp_path / "meminfo"
    told.write_text("MemTotal: 9 kB\nMemFree: 1 kB\nMemAvailable:    2000 kB\nSwapFree:  500 kB\n", encoding="ascii")
    monkeypatch.setattr(device, "_MEMORY", told)
    monkeypatch.setattr(device, "_CONTAINER", tmp_path)
    assert device.free_bytes() == 2500 * 1024
    limits = {"memory.current": "900000\n", "memory.stat": "anon 7\nactive_file 1000\ninactive_file 500\n"}
    for name, text in {**limits, "memory.max": "1000000\n"}.items():
        (tmp_path / name).write_text(text, encoding="ascii")
    assert device.free_bytes() == 101_500
    (tmp_path / "memory.max").write_text("max\n", encoding="ascii")
    assert device.free_bytes() == 2500 * 1024


@pytest.mark.parametrize(
    ("core", "compacted", "rows", "gathered"),
    [
        (SIMILARITY, True, 1, 0),  # the group's weights are there
        (SIMILARITY, False, 1, 1),
        (SIMILARITY, True, 2, 2),  # rows of a batch are gathered
        (AUTO, True, 1, 0),
        (FUSED, True, 1, 1),  # the prompt has its say, whatever groups there are
    ],
)
def test_groups_that_are_ready_need_no_room(core, compacted, rows, gathered):
    ready = groups(core, compacted)
    made = make_request(ready.params, PROMPT * rows, core, {"groups": ready, "max_new_tokens": 8})
    cache = rows * 4 * 2 * 3 * OPT.num_kv_heads * 8 * 64
    assert made.added_bytes == cache + gathered * 4 * 3 * 48 * 2 * 32
