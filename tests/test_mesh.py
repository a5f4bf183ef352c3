"""Models over several devices, against the same models on one: 8 processors that JAX makes of this machine's."""

import re
import shutil
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest

import coreinfer_jax as ci
from coreinfer_jax.cli import main
from coreinfer_jax.engine.generation import make_request
from coreinfer_jax.engine.loop import begin
from coreinfer_jax.engine.programs import decode
from coreinfer_jax.engine.running import advance, insert_request, start
from coreinfer_jax.io import parts
from coreinfer_jax.lab.evaluation import calibrate
from coreinfer_jax.model.host import HostArray
from coreinfer_jax.sparsity.choice import Chooser
from coreinfer_jax.sparsity.narrow import gather_core
from tests import test_clusters
from tests.stand_ins import tale
from tests.support import LLAMA, OPT, check_same_core, first_quick, half_slow, one_quick_in, random_model
from tests.test_calibration import SMALL, Numbers, documents
from tests.test_linear import explained
from tests.test_prediction import AUTO, FUSED, SIMILARITY, STEADY, clusters, model, prompt

# Heads for 8 devices, of keys and values fewer than these; a vocabulary that 8 share, and one that they do not.
WIDE_LLAMA = replace(LLAMA, num_layers=2, num_heads=8, num_kv_heads=4, vocab_size=104)
WIDE_OPT = replace(OPT, num_layers=2, num_heads=8, num_kv_heads=8)
CONFIGS = {"llama": WIDE_LLAMA, "opt": WIDE_OPT}
F = 96
ROWS = [[3, 5, 7, 9, 11, 13, 15], [17, 4, 21]]
NEW = 9


@cache
def wide(name: str) -> ci.Params:
    return random_model(CONFIGS[name])


@cache
def over(name: str, devices: int) -> ci.Params:
    return ci.spread(wide(name), ci.make_mesh(devices))


def check_same(one: ci.Generation, spread: ci.Generation) -> None:
    np.testing.assert_array_equal(one.tokens, spread.tokens)
    assert (one.core is None) == (spread.core is None)
    if one.core is not None and spread.core is not None:
        check_same_core(one.core, spread.core)


@pytest.mark.parametrize(
    ("name", "devices"),
    [("llama", 8), ("opt", 4)]
    + [pytest.param(*case, marks=pytest.mark.slow) for case in (("llama", 2), ("llama", 4), ("opt", 8))],
)
def test_tokens_are_those_of_one_device(name: str, devices: int) -> None:
    full = {"core": None, "max_new_tokens": NEW}
    check_same(ci.generate(wide(name), ROWS, **full), ci.generate(over(name, devices), ROWS, **full))
    for per_row in (True, False):
        one = ci.generate(wide(name), ROWS, ci.CoreConfig(shards=devices, per_row=per_row), max_new_tokens=NEW)
        spread = ci.generate(over(name, devices), ROWS, ci.CoreConfig(per_row=per_row), max_new_tokens=NEW)
        check_same(one, spread)
        assert one.core is not None
        for kept in one.core.layers:
            if kept is not None:
                shares = np.atleast_2d(kept) // (F // devices)
                assert all((np.bincount(row, minlength=devices) == len(row) // devices).all() for row in shares)


def test_weights_lie_where_they_are_used() -> None:
    """A device holds its share of heads, neurons and vocabulary; of key/value heads, of which there are fewer, one."""
    spread = over("llama", 8)
    layer = spread.layers[0]
    shapes = {
        "query": layer.attention.query.weight,
        "key": layer.attention.key.weight,
        "out": layer.attention.out.weight,
        "up": layer.mlp.up.weight,
        "down": layer.mlp.down.weight,
        "embedding": spread.token_embedding,
    }
    D, H = 32, 8
    assert {name: array.addressable_shards[3].data.shape for name, array in shapes.items()} == {
        "query": (H, D),
        "key": (H, D),
        "out": (D, H),
        "up": (12, D),
        "down": (D, 12),
        "embedding": (13, D),
    }
    # Device 3 has query head 3, which reads key/value head 1.
    np.testing.assert_array_equal(
        layer.attention.key.weight.addressable_shards[3].data, wide("llama").layers[0].attention.key.weight[8:16]
    )
    assert over("opt", 8).token_embedding.sharding.is_fully_replicated  # 101 tokens


@pytest.mark.parametrize("rule", half_slow(["votes", "random", "griffin", "norm"]))
def test_every_kind_of_rule_ranks_as_on_one_device(rule: str) -> None:
    one = ci.generate(wide("opt"), ROWS, ci.CoreConfig(rule=rule, shards=4), max_new_tokens=2)
    check_same(one, ci.generate(over("opt", 4), ROWS, ci.CoreConfig(rule=rule), max_new_tokens=2))


def test_each_share_keeps_its_own_best() -> None:
    """Against NumPy: of neurons cut into equal parts, those of each part that the rule ranks highest."""
    params, rule = wide("opt"), ci.CoreConfig(beta=0.4, rule="norm", allocation="equal")
    for n in (2, 8):
        core = ci.generate(params, ROWS[:1], replace(rule, shards=n), max_new_tokens=1).core
        for layer, own in zip(params.layers, core.layers, strict=True):
            norms = np.linalg.norm(np.asarray(layer.mlp.down.weight), axis=0).reshape(n, -1)
            best = np.argsort(-norms, axis=1)[:, : F * 4 // 10 // n]
            np.testing.assert_array_equal(own, (np.sort(best, axis=1) + F // n * np.arange(n)[:, None]).ravel())


@pytest.mark.parametrize(("core", "compacted"), one_quick_in(4, [SIMILARITY, FUSED, AUTO, STEADY], [True, False]))
def test_groups_choose_as_on_one_device(core: Chooser, compacted: bool) -> None:
    rows = [prompt(40, 0), prompt(9, 1)]
    spread = ci.spread(model(), ci.make_mesh(4))
    for own in (core, replace(core, per_row=False)):
        cut = replace(own, shards=4)
        one, many = (
            ci.generate(params, rows, chooser, groups=ready, max_new_tokens=NEW)
            for params, chooser, ready in (
                (model(), cut, ci.prepare_groups(model(), clusters(), cut, compacted=compacted)),
                (spread, own, ci.prepare_groups(spread, clusters(), own, compacted=compacted)),
            )
        )
        check_same(one, many)
        assert one.stats.choices == many.stats.choices


@pytest.mark.parametrize("core", half_slow([FUSED, SIMILARITY, STEADY]), ids=lambda core: core.method)
def test_groups_have_linear_neurons_as_on_one_device(core: Chooser) -> None:
    rows, known = [prompt(40, 0), prompt(9, 1)], explained(model())
    spread, cut = ci.spread(known, ci.make_mesh(4)), replace(core, shards=4)
    one, many = (
        ci.generate(params, rows, own, groups=ci.prepare_groups(params, clusters(), own), max_new_tokens=NEW)
        for params, own in ((known, cut), (spread, core))
    )
    check_same(one, many)
    assert all(many.core.linear)


def test_given_neurons_may_lie_anywhere() -> None:
    """All of one layer's on one device; of another none on some; with sets of each row."""
    first, spaced = np.arange(20), np.arange(0, F, 7)
    for layers in ([first, spaced], [None, np.stack([first, first + 40])]):
        core = ci.CoreNeurons(layers)
        options = {"core": core, "max_new_tokens": NEW}
        check_same(ci.generate(wide("llama"), ROWS, **options), ci.generate(over("llama", 8), ROWS, **options))
        one, many = (
            ci.forward(params, [row * 2 for row in ROWS[1:] * 2], core) for params in (wide("llama"), over("llama", 8))
        )
        np.testing.assert_allclose(one, many, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", first_quick(CONFIGS))
def test_linear_neurons_are_shared_out_too(name: str) -> None:
    known = explained(wide(name))
    spread = ci.spread(known, ci.make_mesh(4))
    core = ci.CoreConfig(beta=0.6)
    one = ci.generate(known, ROWS, replace(core, shards=4), max_new_tokens=NEW)
    many = ci.generate(spread, ROWS, core, max_new_tokens=NEW)
    assert any(many.core.linear)
    check_same(one, many)
    shared = ci.generate(spread, ROWS, replace(core, per_row=False), max_new_tokens=NEW)
    check_same(ci.generate(known, ROWS, replace(core, per_row=False, shards=4), max_new_tokens=NEW), shared)


@pytest.mark.parametrize(
    "options",
    [
        {"lossless": True, "temperature": 0.9, "top_k": 20, "key": 3},
        {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.3, "key": 5},
        pytest.param({"lossless": True}, marks=pytest.mark.slow),
    ],
    ids=["lossless drawn", "drawn", "lossless"],
)
@pytest.mark.usefixtures("drafts_always")
def test_all_ways_to_draw(options: dict[str, object]) -> None:
    one = ci.generate(wide("llama"), ROWS, ci.CoreConfig(shards=4), max_new_tokens=20, **options)
    many = ci.generate(over("llama", 4), ROWS, ci.CoreConfig(), max_new_tokens=20, **options)
    check_same(one, many)
    if "lossless" in options:
        assert many.stats.drafting.verifications > 5


def test_streams_conversations_and_scores() -> None:
    one, many = wide("llama"), over("llama", 4)
    cut = ci.CoreConfig(shards=4)
    chunks = [
        np.concatenate([chunk.tokens for chunk in ci.stream(params, ROWS, core, max_new_tokens=NEW)], axis=1)
        for params, core in ((one, cut), (many, ci.CoreConfig()))
    ]
    np.testing.assert_array_equal(*chunks)
    turns = []
    for params, core in ((one, cut), (many, ci.CoreConfig())):
        past: ci.Conversation | None = None
        text: list[int] = []
        for question in ([3, 5, 7], [9, 11]):
            text += question
            chunks = list(ci.converse(params, text, past, core, max_new_tokens=5))
            text += [int(token) for chunk, _ in chunks for token in chunk.tokens[0, : chunk.lengths[0]]]
            past = chunks[-1][1]
        assert chunks[-1][0].stats.cached_tokens[0] > 0
        turns.append(text)
    assert turns[0] == turns[1]
    scores = [
        ci.score_continuations(params, ROWS, [[8, 6], [4, 2, 9]], core)
        for params, core in ((one, cut), (many, ci.CoreConfig()))
    ]
    for a, b in zip(scores[0].logprobs, scores[1].logprobs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_requests_come_and_go_as_on_one_device() -> None:
    found = []
    for params, core in ((wide("opt"), ci.CoreConfig(shards=4)), (over("opt", 4), ci.CoreConfig())):
        begun = [begin(make_request(params, [row], core, {"max_new_tokens": NEW})) for row in ROWS]
        state = start(params, 2, 64, begun[0].chosen.kept(params.config), begun[0].chosen.core.linear)
        for row, own in enumerate(begun):
            state = insert_request(state, row, own)
        _, tokens, lengths = advance(state, NEW)
        found.append(tokens[:, : lengths.min()])
    np.testing.assert_array_equal(*found)


def test_many_prompts_finish_as_on_one_device() -> None:
    found = []
    for params, core in ((wide("opt"), ci.CoreConfig(shards=4)), (over("opt", 4), ci.CoreConfig())):
        made = ci.generate_many(params, [*ROWS, ROWS[0][::-1]], core, rows=2, max_new_tokens=NEW)
        found.append({one.prompt.index: one.tokens.tolist() for one in made})
    assert found[0] == found[1]


def test_given_neurons_of_rows_that_come_and_go_lie_evenly() -> None:
    even, uneven = (ci.CoreNeurons([own] * 2) for own in (np.arange(0, F, 3), np.arange(32)))
    [made] = ci.generate_many(over("opt", 4), ROWS[:1], even, max_new_tokens=NEW)
    alone = ci.generate(wide("opt"), ROWS[:1], even, max_new_tokens=NEW)
    assert made.tokens.tolist() == alone.tokens[0].tolist()
    with pytest.raises(ci.CoreInferError, match="lie unevenly on the devices"):
        list(ci.generate_many(over("opt", 4), ROWS[:1], uneven, max_new_tokens=NEW))


def test_a_batch_does_not_go_on_over_other_devices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Which keep other neurons."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Once upon a time"}\n', encoding="utf-8")
    command = ["batch", "--input", str(prompts), "--output", str(tmp_path / "out.jsonl"), "--beta", "0.5"]
    command += ["--model", "embedded:llama", "--max-new-tokens", "2", "--rows", "1"]
    assert main([*command, "--mesh", "tensor=3"]) == 0
    written = (tmp_path / "out.jsonl").read_bytes()
    capsys.readouterr()
    assert main(command) == 2
    assert "shards" in capsys.readouterr().err
    assert (tmp_path / "out.jsonl").read_bytes() == written


COLLECTIVES = r" (all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all)(?:-start)?\("


@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_has_two_sums_over_devices_per_layer(name: str) -> None:
    """One more where the vocabulary is shared: of its embedding, and there logits are joined. Gathering has none."""
    params = over(name, 8)
    begun = begin(make_request(params, ROWS[:1], ci.CoreConfig(), {"max_new_tokens": NEW}))
    program = decode.lower(begun.chosen.weights(params), begun.rows, np.int32(4)).compile()
    shared = name == "llama"
    expected = {"all-reduce": 2 * 2 + shared} | ({"all-gather": 1} if shared else {})
    assert Counter(re.findall(COLLECTIVES, program.as_text())) == expected
    arrays = [[own for own in per_layer if own is not None] for per_layer in begun.chosen.arrays]
    mlps = [layer.mlp for layer in params.layers][-len(arrays[0]) :]
    gather = gather_core.lower(mlps, *arrays, [None] * len(mlps), multiple=1, mesh=params.mesh).compile()
    assert not re.findall(COLLECTIVES, gather.as_text())


@pytest.mark.parametrize("model", first_quick(["embedded:llama", "embedded:opt"]))
def test_a_checkpoint_is_loaded_as_it_is_spread(model: str) -> None:
    """Weights, and what a calibration knows of neurons; a device holds no more than its share."""
    mesh = ci.make_mesh(3)
    loaded, spread = ci.load(model, mesh=mesh)[0], ci.spread(ci.load(model)[0], mesh)
    for one, other in zip(jax.tree.leaves(loaded), jax.tree.leaves(spread), strict=True):
        np.testing.assert_array_equal(one, other)
        if isinstance(one, jax.Array):
            assert one.sharding == other.sharding
    text = ci.generate(loaded, ROWS, max_new_tokens=NEW)
    np.testing.assert_array_equal(text.tokens, ci.generate(spread, ROWS, max_new_tokens=NEW).tokens)


@pytest.mark.parametrize("by_rows", [True, False])
def test_a_process_reads_its_own_parts(by_rows: bool) -> None:
    """Rows, columns, and the one of 2 heads that each of 4 devices holds; nothing else is read of rows."""
    values = np.arange(8 * 6, dtype=np.float32).reshape(8, 6)
    read: list[tuple[int, int]] = []

    def read_rows(begin: int, end: int) -> np.ndarray:
        read.append((begin, end))
        return values[begin:end]

    array = HostArray(values.shape, values.dtype, lambda: values, read_rows if by_rows else None)
    every = slice(None)
    np.testing.assert_array_equal(parts.part_of(array, 2, 1)((slice(2, 4), every)), values[2:4])
    assert read == [(2, 4)] * by_rows
    np.testing.assert_array_equal(parts.part_of(array, 2, 1)((every, slice(3, 6))), values[:, 3:])
    np.testing.assert_array_equal(parts.part_of(array, 2, 1)((every, every)), values)
    for device, head in enumerate((0, 0, 1, 1)):
        part = parts.part_of(array, 2, 2)((slice(4 * device, 4 * device + 4), every))
        np.testing.assert_array_equal(part, values[4 * head : 4 * head + 4])


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "stories.txt"
    path.write_text("\n".join(tale(number) for number in range(40)), encoding="utf-8")
    return path


def test_a_calibration_is_that_of_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """On which each half of the neurons keeps its own, as each of 2 devices does."""
    texts = documents(count=28)  # enough tokens for linear neurons
    many = calibrate(over("llama", 2), Numbers(), texts, None, SMALL).calibration
    monkeypatch.setattr(Chooser, "shards_of", lambda *_: 2)
    one = calibrate(wide("llama"), Numbers(), texts, None, SMALL).calibration
    for own, other in zip(jax.tree.leaves(one.prior), jax.tree.leaves(many.prior), strict=True):
        np.testing.assert_allclose(own, other, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(one.gains, many.gains, rtol=1e-2, atol=1e-4)
    assert one.linear is not None
    assert one.linear.up_to == many.linear.up_to
    for own, other in zip(one.linear.fits, many.linear.fits, strict=True):
        slopes = [np.asarray(fit.slopes, np.float64).T @ np.asarray(fit.directions, np.float64) for fit in (own, other)]
        np.testing.assert_allclose(*slopes, rtol=1e-2, atol=1e-2)


def test_groups_are_those_of_one_device(tmp_path: Path) -> None:
    """Texts of random letters, by their labels: shares of tokens, and the neurons that decide."""
    letters = test_clusters.documents(labels=test_clusters.LABELS)
    one, many = (
        test_clusters.build(tmp_path / name, letters, params=params)
        for name, params in (("one", wide("llama")), ("many", over("llama", 2)))
    )
    np.testing.assert_array_equal(one.frequencies, many.frequencies)
    np.testing.assert_array_equal(one.centroids, many.centroids)
    assert one.fingerprint == many.fingerprint


def test_calibrations_and_groups_are_of_devices_that_fit(
    shallow: dict[str, Path], stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (["calibrate"], ["clusters", "build", "--out", str(tmp_path / "groups")]):
        options = ["--model", str(shallow["llama"]), "--data", str(stories), "--mesh", "tensor=2"]
        assert main([*command, *options]) == 2
        assert "2 devices cannot share 3 query heads" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_calibrates_over_devices(
    shallow: dict[str, Path], stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(shallow["llama"], tmp_path / "llama")
    sizes = ["--texts", "4", "--prompt-tokens", "16", "--continuation", "16"]
    assert main(["calibrate", "--model", str(model), "--data", str(stories), *sizes, "--mesh", "tensor=3"]) == 0
    capsys.readouterr()
    assert main(["info", str(model)]) == 0
    assert "float32 on 3 x cpu" in capsys.readouterr().out
    core = ci.load(model)[0].calibration.core
    assert ci.load(model, mesh=ci.make_mesh(3))[0].calibration.core == core


def test_evaluation_gives_the_numbers_of_one_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(tale(number) for number in range(3)), encoding="utf-8")
    options = ["--data", str(texts), "--texts", "2", "--prompt-tokens", "16", "--continuation", "8", "--beta", "0.5"]
    shown = []
    for further in ([], ["--mesh", "tensor=1"]):
        assert main(["eval", "--model", "embedded:llama", *options, *further]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]


def test_the_command_line_spreads_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "generate",
        "Once upon a time",
        "--model",
        "embedded:llama",
        "--method",
        "dense",
        "--max-new-tokens",
        "5",
    ]
    texts = []
    for further in ([], ["--mesh", "tensor=3"]):
        assert main([*command, *further]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--mesh", "tensor=2"], "2 devices cannot share 3 query heads and 3 key/value heads equally"),
        (["--mesh", "tensor=2"], "can be spread over 1, 3"),
        (["--mesh", "tensor=99"], "tensor=99: of cpu devices there are 8"),
        (["--mesh", "data=2"], "--mesh 'data=2': give tensor=N"),
        (["--mesh", "tensor=3", "--device-memory", "1GiB"], "leave out --device-memory"),
    ],
)
def test_mistakes_get_one_line(options: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "Once", "--model", "embedded:llama", *options]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1


def test_mistakes_in_python() -> None:
    other = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    for mesh, told in ((other, "has axes data"), (2, "give what make_mesh returns")):
        with pytest.raises(ci.CoreInferError, match=told):
            ci.spread(wide("opt"), mesh)
    with pytest.raises(ci.CoreInferError, match="shards=5: does not divide the model's 96 neurons"):
        ci.generate(wide("opt"), ROWS, ci.CoreConfig(shards=5), max_new_tokens=1)
    with pytest.raises(ci.CoreInferError, match="shards=2: the model is spread over 4 devices"):
        ci.generate(over("opt", 4), ROWS, ci.CoreConfig(shards=2), max_new_tokens=1)
    narrowed = ci.compact(wide("opt"), ci.CoreNeurons([np.arange(16)] * 2))
    for params, told in ((narrowed, "narrowed to core neurons already"), (over("opt", 4), "over 4 devices already")):
        with pytest.raises(ci.CoreInferError, match=told):
            ci.spread(params, ci.make_mesh(2))
    with pytest.raises(ci.CoreInferError, match="mlps_on_host=True: is of one device"):
        ci.load("embedded:opt", mlps_on_host=True, mesh=ci.make_mesh(3))
