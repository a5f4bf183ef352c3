"""Models whose MLPs stay on the host make what the same models make with all weights on the device."""

import gc
import os
import threading
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import coreinfer_jax as ci
from coreinfer_jax.engine import streamed
from coreinfer_jax.engine.streamed import StreamedPass, extend_streamed
from coreinfer_jax.io import loading
from coreinfer_jax.io.held import HeldFile
from coreinfer_jax.io.native import write_native
from coreinfer_jax.model import extend, observe_nothing
from coreinfer_jax.model import host as hosting
from coreinfer_jax.model.cache import init_cache
from coreinfer_jax.model.decoder import finish
from coreinfer_jax.model.fingerprint import fingerprint
from coreinfer_jax.model.host import HostArray, one_ahead
from coreinfer_jax.model.weights import named_leaves
from coreinfer_jax.sparsity import narrow as narrowing
from coreinfer_jax.sparsity import stability
from coreinfer_jax.sparsity.moving import NOTHING, moved_bytes, narrow_from_host, rows_of
from coreinfer_jax.sparsity.narrow import narrow, on_device
from tests.support import LLAMA, MODELS, OPT, check_same_core, random_model, with_mlps_on_host
from tests.test_compilation import traced
from tests.test_linear import explained
from tests.test_narrow import random_core

PROMPTS = [np.random.default_rng(0).integers(3, 101, n).tolist() for n in (40, 23)]
CORES = {
    "dense": None,
    "stability": ci.CoreConfig(beta=0.3),
    "votes": ci.CoreConfig.paper(),
    "some-layers": ci.CoreConfig(beta=0.3, layers=(0.3, 0.9)),
    "auto": ci.Auto(beta=0.4),
    "given": ci.CoreNeurons([range(5, 60)] * 3),
}


def write_random(directory: Path) -> Path:
    """The checkpoint of `random_model(OPT)`, for which other tests compile the same programs."""
    leaves = ((name, np.asarray(leaf)) for name, leaf in named_leaves(random_model(OPT)))
    write_native(directory, OPT, np.dtype("float32"), leaves)
    return directory


def check_same(on_host: ci.Params, params: ci.Params, tokens: list[list[int]], core: object, **settings: object):
    """Both generate the same; what was generated on the host's weights."""
    out = ci.generate(on_host, tokens, core, max_new_tokens=10, **settings)
    expected = ci.generate(params, tokens, core, max_new_tokens=10)
    np.testing.assert_array_equal(out.tokens, expected.tokens)
    assert (out.core is None) == (expected.core is None)
    if out.core is not None:
        check_same_core(out.core, expected.core)
    assert expected.stats.moved_bytes == 0
    return out


@pytest.mark.parametrize(
    ("name", "core"),
    [
        pytest.param(name, core, marks=[] if (i + j) % 6 == 0 else [pytest.mark.slow])
        for i, name in enumerate(["opt", "llama", "opt-350m-style"])
        for j, core in enumerate(CORES)
    ],
)
def test_tokens_and_core_neurons_are_the_same(name: str, core: str) -> None:
    params = random_model(MODELS[name])
    check_same(with_mlps_on_host(params), params, PROMPTS[:1], CORES[core])


@pytest.mark.parametrize("per_row", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_batches(per_row: bool) -> None:
    params = random_model(OPT)
    check_same(with_mlps_on_host(params), params, PROMPTS, ci.CoreConfig(beta=0.3, per_row=per_row))


def test_linear_neurons_and_a_calibration() -> None:
    params = explained(random_model(OPT))
    on_host = with_mlps_on_host(params)
    core = ci.CoreConfig(beta=0.5, allocation="equal")
    out = check_same(on_host, params, PROMPTS[:1], core)
    assert all(out.core.linear)
    check_same(on_host, params, PROMPTS[1:], core, device_rows=out.device_rows)


def test_long_prompts_are_read_in_the_same_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    params = random_model(replace(OPT, max_positions=1100))
    tokens = [np.random.default_rng(1).integers(3, 101, 700).tolist()]
    out = check_same(with_mlps_on_host(params), params, tokens, ci.CoreConfig(beta=0.3))
    whole = sum(hosting.mlp_bytes(layer.mlp) for layer in params.layers)
    narrowed = moved_bytes(params, out.core.layers)
    assert out.stats.moved_bytes == whole + narrowed  # whatever the number of pieces


def test_a_pass_over_several_tokens_moves_each_mlp_once() -> None:
    params = random_model(LLAMA)
    tokens, start = jnp.asarray([PROMPTS[1][:5]] * 2), jnp.asarray([0, 3])
    empty = init_cache(params.config, 2, 64, params.dtype)
    expected, cache, _ = jax.jit(lambda *args: extend(*args, observe_nothing))(params, tokens, empty, start)
    reading = StreamedPass(with_mlps_on_host(params), tokens, jnp.asarray([5, 5]), start)
    made, streamed, _ = extend_streamed(reading, init_cache(params.config, 2, 64, params.dtype))
    np.testing.assert_allclose(finish(params, made), expected, rtol=1e-5, atol=1e-5)
    for one, other in zip(jax.tree.leaves(streamed), jax.tree.leaves(cache), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_conversations_go_on_and_use_rows_again() -> None:
    params = random_model(OPT)
    on_host, past, before = with_mlps_on_host(params), None, None
    tokens: list[int] = []
    for turn in (PROMPTS[1], [7, 8, 9]):
        tokens += turn
        settings = {"max_new_tokens": 10, "device_memory": "1GiB"}
        chunks = list(ci.converse(on_host, tokens, past, ci.CoreConfig(beta=0.3), **settings))
        reply = np.concatenate([chunk.tokens[0] for chunk, _ in chunks]).tolist()
        fresh = ci.generate(params, [tokens], ci.CoreConfig(beta=0.3), max_new_tokens=10)
        assert reply == fresh.tokens[0].tolist()
        last, past = chunks[-1]
        check_same_core(last.core, fresh.core)
        tokens += reply
        moved, before = last.stats.moved_bytes, before or last.stats.moved_bytes
    assert moved < before


@pytest.mark.parametrize(
    ("name", "multiple"), [("opt", 20), ("llama", 1), pytest.param("opt", 1, marks=pytest.mark.slow)]
)
def test_only_rows_that_are_not_there_are_moved(name: str, multiple: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a gather on the device, whatever overlaps; and no row is read of the host that is there already."""
    monkeypatch.setattr(narrowing, "width_multiple", lambda weight: multiple)  # as on accelerators, which pad
    params = random_model(replace(MODELS[name], mlp_bias=name == "opt"))
    on_host, linear = with_mlps_on_host(params), (False,) * 3
    earlier, before = NOTHING, None
    for seed, kept in ((0, 48), (1, 48), (1, 48), (2, 32)):
        core = random_core(params.config, kept, seed)
        indices, offsets = on_device(params, core)
        moved = moved_bytes(on_host, indices, earlier)
        made = narrow_from_host(on_host, indices, offsets, linear, earlier)
        expected = narrow(params, indices, offsets)
        jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(made), jax.tree.leaves(expected))
        row = hosting.mlp_bytes(params.layers[0].mlp) / params.config.mlp_size
        missing = [
            kept if before is None else len(set(own.tolist()) - set(there.tolist()))
            for own, there in zip(core.layers, before or core.layers, strict=True)
        ]
        assert sum(missing) * row <= moved <= (sum(missing) + 3 * max(1, kept // 16)) * row + 3
        earlier, before = rows_of(on_host, made, indices), core.layers
    earlier.release(0)
    with pytest.raises(ci.CoreInferError, match="another call has gone on"):
        ci.generate(on_host, PROMPTS, ci.CoreConfig(), max_new_tokens=9, device_rows=earlier)


def test_no_more_than_two_mlps_are_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    params = with_mlps_on_host(random_model(replace(OPT, num_layers=6, mlp_size=128)))
    sizes = {leaf.shape for leaf in jax.tree.leaves(params.layers[0].mlp) if leaf.ndim == 2}
    had = {id(array) for array in jax.live_arrays()}
    seen, put = [], hosting.put

    def counted(mlp):
        made = put(mlp)
        seen.append(sum(a.shape in sizes for a in jax.live_arrays() if id(a) not in had))
        return made

    monkeypatch.setattr(hosting, "put", counted)
    ci.generate(params, PROMPTS[:1], None, max_new_tokens=3)
    assert max(seen) == 2 * len(sizes)


def test_arrays_of_the_host_are_read_by_rows_and_columns() -> None:
    array = np.random.default_rng(0).normal(size=(50, 30)).astype(np.float32)
    read = []

    def rows(begin: int, end: int) -> np.ndarray:
        read.append((begin, end))
        return array[begin:end].copy()

    held = HostArray(array.shape, array.dtype, array.copy, rows)
    indices = np.array([0, 1, 2, 8, 11, 30, 49])
    np.testing.assert_array_equal(held.take(indices, axis=0), array[indices])
    assert read == [(0, 3), (8, 12), (30, 31), (49, 50)]
    np.testing.assert_array_equal(held.take(indices[:4], axis=-1), array[:, indices[:4]])
    whole = HostArray(array.shape, array.dtype, array.copy)  # of a file that is not read by rows
    np.testing.assert_array_equal(whole.take(indices, axis=0), array[indices])
    np.testing.assert_array_equal(whole.take(indices[:4], axis=-1), array[:, indices[:4]])


def test_the_next_is_made_while_the_last_is_in_use_and_failures_are_told() -> None:
    made = []

    def make(i: int) -> int:
        made.append(i)
        return 10 // (3 - i)

    items = one_ahead(make, range(5))
    assert next(items) == 3
    assert next(items) == 5
    assert made[:2] == [0, 1]
    assert next(items) == 10
    with pytest.raises(ZeroDivisionError):
        next(items)


def open_weights(directory: Path) -> list[str]:
    """Files of a directory that this process holds open, one entry for each time."""
    descriptors = (os.path.realpath(one) for one in Path("/proc/self/fd").iterdir())
    return sorted(name for name in descriptors if name.startswith(os.path.realpath(directory)))


@pytest.mark.usefixtures("drafts_always")
@pytest.mark.parametrize(
    ("core", "cancel_at", "lossless"),
    [("dense", 5, False), ("stability", 11, True)]
    + [pytest.param(*case, marks=pytest.mark.slow) for case in (("dense", 2, False), ("stability", 2, False))],
)
def test_a_call_that_is_cancelled_leaves_nothing_behind(
    core: str, cancel_at: int, lossless: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a prefill, of a step that moves all MLPs, or of a pass that verifies drafts."""
    params, _ = ci.load(write_random(tmp_path), "float32", mlps_on_host=True)
    settings = {"max_new_tokens": 12 if lossless else 4, "lossless": lossless}
    expected = ci.generate(params, PROMPTS[:1], CORES[core], **settings).tokens
    through, calls = streamed.through_layer, []

    def cancelled(*arguments, **static):
        calls.append(1)
        if len(calls) == cancel_at:
            assert not lossless or arguments[2].shape[1] > 1  # drafts are verified
            raise KeyboardInterrupt
        return through(*arguments, **static)

    gc.collect()
    live, files, threads = len(jax.live_arrays()), open_weights(tmp_path), threading.active_count()
    assert files
    monkeypatch.setattr(streamed, "through_layer", cancelled)
    with pytest.raises(KeyboardInterrupt):
        ci.generate(params, PROMPTS[:1], CORES[core], **settings)
    gc.collect()
    assert len(jax.live_arrays()) <= live
    assert (open_weights(tmp_path), threading.active_count()) == (files, threads)
    monkeypatch.undo()
    np.testing.assert_array_equal(ci.generate(params, PROMPTS[:1], CORES[core], **settings).tokens, expected)
    del params
    gc.collect()
    assert open_weights(tmp_path) == []


def test_the_keep_ratio_is_shared_out_as_often_for_many_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    shared_out, counts = stability.allocate, []
    monkeypatch.setattr(stability, "allocate", lambda *arguments: counts.append(1) or shared_out(*arguments))
    often = []
    for layers in (3, 5):
        counts.clear()
        params = with_mlps_on_host(random_model(replace(OPT, num_layers=layers)))
        ci.generate(params, PROMPTS[:1], CORES["stability"], max_new_tokens=1)
        often.append(len(counts))
    assert often[0] == often[1]


def test_another_prompt_traces_nothing() -> None:
    params = with_mlps_on_host(random_model(OPT))
    settings = {"max_new_tokens": 10, "device_memory": "1GiB"}
    for core in (None, ci.CoreConfig(beta=0.3)):
        ci.generate(params, PROMPTS[:1], core, **settings)
        with traced() as messages:
            ci.generate(params, PROMPTS[1:], core, **settings)
        assert messages == []


def test_a_checkpoint_is_read_as_it_was_opened(tmp_path: Path) -> None:
    """Cut short or written to while it streams it is refused in one line; replaced under its name it is read on."""
    params, directory = random_model(OPT), write_random(tmp_path)
    on_host, _ = ci.load(directory, "float32", mlps_on_host=True)
    assert fingerprint(on_host) == fingerprint(params)
    core = ci.CoreConfig(beta=0.3)
    expected = check_same(on_host, params, PROMPTS[:1], core)
    weights = directory / "weights-00001-of-00001.safetensors"
    content = weights.read_bytes()
    weights.rename(directory / "old")
    weights.write_bytes(b"another file")
    np.testing.assert_array_equal(ci.generate(on_host, PROMPTS[:1], core, max_new_tokens=10).tokens, expected.tokens)
    (directory / "old").write_bytes(content[: len(content) // 2])
    gc.collect()
    live = len(jax.live_arrays())
    for _ in range(2):
        with pytest.raises(ci.CoreInferError, match=r"weights-.*\.safetensors: .*let nothing write to it"):
            ci.generate(on_host, PROMPTS[:1], core, max_new_tokens=10)
    gc.collect()
    assert len(jax.live_arrays()) <= live  # nothing of the calls that failed
    weights.write_bytes(content)
    again, _ = ci.load(directory, "float32", mlps_on_host=True)
    out = ci.generate(again, PROMPTS[:1], core, max_new_tokens=10)
    np.testing.assert_array_equal(out.tokens, expected.tokens)


def test_weights_that_are_pinned_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU whose host has the memory; a CPU has the same kinds of memory."""
    params, directory = random_model(OPT), write_random(tmp_path)
    pinned = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    monkeypatch.setattr(loading, "pinned_memory", lambda size: pinned)
    on_host, _ = ci.load(directory, "float32", mlps_on_host=True)
    leaves = jax.tree.leaves(on_host.layers[0].mlp)
    assert {leaf.pinned.sharding.memory_kind for leaf in leaves} == {"pinned_host"}
    monkeypatch.setattr(HeldFile, "read", None)
    check_same(on_host, params, PROMPTS[:1], None)


def test_rows_of_another_model_are_refused() -> None:
    model, core = random_model(OPT), ci.CoreConfig(beta=0.3)
    one, other = with_mlps_on_host(model), with_mlps_on_host(model)
    rows = ci.generate(one, PROMPTS[:1], core, max_new_tokens=3).device_rows
    for params in (other, model):
        with pytest.raises(ci.CoreInferError, match="device_rows: are of another model"):
            ci.generate(params, PROMPTS[:1], core, max_new_tokens=3, device_rows=rows)
    with pytest.raises(ci.CoreInferError, match="device_rows='x': give the device_rows of an earlier Generation"):
        ci.generate(one, PROMPTS[:1], core, max_new_tokens=3, device_rows="x")


def test_what_needs_all_weights_says_so() -> None:
    params = with_mlps_on_host(random_model(OPT))
    calls = [
        lambda: ci.compact(params, random_core(OPT, 10)),
        lambda: ci.forward(params, [PROMPTS[0]]),
        lambda: ci.score_continuations(params, PROMPTS[:1], [[5, 6]]),
    ]
    for call in calls:
        with pytest.raises(ci.CoreInferError, match="needs all weights on the device"):
            call()
