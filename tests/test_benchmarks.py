"""The benchmark harness: what it counts, what it writes, and that it says when something is wrong."""

import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

import coreinfer_jax as ci
from benchmarks import (
    continuations,
    decode,
    environment,
    gpu_aims,
    linear_cost,
    linear_fallback,
    linear_neurons,
    linear_votes,
    lossless,
    memory,
    performance,
    profile,
    quality,
    quality_page,
    same_tokens,
    shapes,
    sweeps,
    worker,
)
from benchmarks.__main__ import main
from benchmarks.contenders import predictor
from benchmarks.contenders.trial import Report, Trial
from benchmarks.decode import Plan, ratios, trials_of
from benchmarks.environment import REPOSITORY
from benchmarks.shapes import SHAPES, shape_config, shape_fields, shape_params
from benchmarks.suite import SUITES
from coreinfer_jax.engine.dispatch import bytes_read_per_token
from coreinfer_jax.errors import CoreInferError
from coreinfer_jax.lab.evaluation.settings import described
from coreinfer_jax.model.cache import KVCache
from coreinfer_jax.model.structure import abstract_params
from coreinfer_jax.model.weights import Linear
from coreinfer_jax.sparsity.similarity import Auto
from coreinfer_jax.text.documents import Documents
from tests.support import MODELS, random_model
from tests.test_linear import explained

# Benchmarks start processes of their own.
pytestmark = pytest.mark.slow

TINY = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}

# Weight bytes a dense step reads per token in float32, written out from the published sizes: matrices and biases of
# attention and MLP, norms, the output projection, and one row of each table that is looked up.
HAND_COUNTED = {
    "opt-125m": 4
    * (12 * (4 * 768 * 768 + 4 * 768 + 2 * 3072 * 768 + 3072 + 768 + 4 * 768) + 50272 * 768 + 768 + 2 * 768),
    "opt-350m": 4
    * (
        24 * (4 * 1024 * 1024 + 4 * 1024 + 2 * 4096 * 1024 + 4096 + 1024 + 4 * 1024)
        + 50272 * 512
        + 2 * 512 * 1024
        + 1024
    ),
    "llama-1.1b": 4
    * (22 * (2 * 2048 * 2048 + 2 * 256 * 2048 + 3 * 5632 * 2048 + 2 * 2048) + 32000 * 2048 + 2048 + 2048),
}


def empty_cache(config, capacity, dtype="float32"):
    one = jnp.zeros((1, config.num_kv_heads, capacity, config.head_size), dtype)
    return KVCache(keys=(one,) * config.num_layers, values=(one,) * config.num_layers)


@pytest.mark.parametrize("model", HAND_COUNTED)
def test_bytes_per_token_equal_a_hand_count(model):
    config = shape_config(shape_fields(model, None))
    cache = 2 * 4 * config.num_layers * config.num_kv_heads * config.head_size * 64
    counted = bytes_read_per_token(abstract_params(config, jnp.dtype("float32")), empty_cache(config, 64))
    assert counted == HAND_COUNTED[model] + cache


def test_predictor_bytes_equal_a_hand_count():
    config = shape_config(TINY)
    params = random_model(config)
    trial = Trial("predictor", "float32", 0.5, TINY, 8, 8)
    attention = 2 * 32 * 32 + 2 * 16 * 32
    predicted = 1000 * 32 + 64 * 1000 + 3 * 32 * 32
    weights = 2 * (attention + predicted + 2 * 32) + 32 + 96 * 32 + 32
    cache = 2 * 2 * 2 * 8 * 64
    assert predictor.bytes_per_token(params, predictor._predictors(params), 32, trial) == 4 * (weights + cache)
    given = predictor._given(config, 32)
    without = weights - 2 * (1000 * 32 + 64 * 1000) + 2 * 32  # the indices are read instead
    assert predictor.bytes_per_token(params, given, 32, trial) == 4 * (without + cache)


def test_shapes_are_the_published_ones():
    parameters = {
        "opt-125m": 125_239_296,
        "opt-1.3b": 1_315_758_080,
        "opt-6.7b": 6_658_473_984,
        "llama-2-7b": 6_738_415_616,
        "llama-2-70b": 68_976_648_192,
        "llama-3.1-8b": 8_030_261_248,
        "smollm2-135m": 134_515_008,
    }
    for model, count in parameters.items():
        leaves = shapes.named_leaves(abstract_params(shape_config(SHAPES[model]), jnp.dtype("bfloat16")))
        assert sum(int(np.prod(leaf.shape)) for _, leaf in leaves) == count, model


def test_shape_params_are_random_and_of_the_dtype():
    params = shape_params(shape_config(TINY), "bfloat16")
    assert params.dtype == jnp.bfloat16
    up = np.asarray(params.layers[1].mlp.up.weight, np.float32)
    assert 0.015 < up.std() < 0.025
    assert (np.asarray(params.layers[0].mlp_norm.scale, np.float32) == 1).all()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("shape") / "config.json"
    path.write_text(json.dumps(TINY), encoding="utf-8")
    return str(path)


def test_a_run_measures_every_contender_alike(tiny, tmp_path, capsys):
    out = tmp_path / "results.jsonl"
    contenders = ["coreinfer", "predictor", "gather"]
    arguments = ["--model", tiny, "--contenders", *contenders, "--dtypes", "float32", "--keeps", "0.5"]
    sizes = ["--prompt-tokens", "8", "--new-tokens", "4", "--rounds", "2"]
    assert main(["decode", *arguments, *sizes, "--out", str(out)]) == 0
    results = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    measured = [("coreinfer", None), ("coreinfer", 0.5), ("predictor", 0.5), ("gather", 0.5)]
    assert [(r["contender"], r["keep"], r["rounds"]) for r in results] == [
        (contender, keep, rounds) for rounds in (1, 2) for contender, keep in measured
    ]
    results = results[len(measured) :]
    for result in results:
        assert {"model", "layers", "dtype", "prompt_tokens", "new_tokens", "date", "hardware", "versions"} <= set(
            result
        )
        assert set(result["decode_ms_per_token"]) == {"median", "min", "max"}
        assert len(result["decode_ms_per_token_by_round"]) == 2
        assert result["gb_per_token"] > 0
        assert result["git_revision"]
        assert result["anonymous_gb"] > 0
        assert result["bandwidth_share"]["median"] > 0
    assert "pays_from_tokens" in results[1]
    assert results[1]["compile_cold_seconds"] > 0
    assert {r["run"] for r in results} == {results[0]["run"]}
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 5
    assert printed[2].split()[:3] == ["coreinfer", "float32", "0.5"]


@pytest.mark.torch
@pytest.mark.parametrize("fields", [TINY, SHAPES["opt-125m"] | {"num_hidden_layers": 1}], ids=["llama", "opt"])
def test_transformers_reads_what_the_full_model_reads(fields):
    pytest.importorskip("torch")
    from benchmarks.contenders import hugging_face

    report = hugging_face.run(Trial("transformers-eager", "float32", None, fields, 8, 4, generations=1))
    assert report.made_tokens == [4]
    config = shape_config(fields)
    ours = bytes_read_per_token(abstract_params(config, jnp.dtype("float32")), empty_cache(config, 12))
    one_row_of_a_table = 4 * config.hidden_size  # OPT's position, LLaMA's token, which ours counts
    assert report.bytes_per_token == ours - one_row_of_a_table


def test_gguf_files_hold_the_model(tmp_path):
    gguf = pytest.importorskip("gguf")
    from benchmarks.gguf_file import write_gguf

    for file_type, size in (("F16", 2.0), ("Q8_0", 34 / 32), ("Q4_0", 18 / 32)):
        path = tmp_path / f"{file_type}.gguf"
        write_gguf(path, TINY, file_type)
        tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
        assert len(tensors) == 3 + 2 * 9
        down = tensors["blk.1.ffn_down.weight"]
        assert list(down.shape) == [64, 32]
        assert down.n_bytes == 32 * 64 * size
        values = gguf.quants.dequantize(down.data, down.tensor_type)
        assert 0.01 < float(values.std()) < 0.03


def test_a_contender_that_stops_early_is_refused(monkeypatch):
    short = Report([1.0], [1.0], [3], 0.0, 1.0, 1.0)
    monkeypatch.setattr("benchmarks.contenders.coreinfer.run", lambda trial: short)
    monkeypatch.setattr(worker, "bandwidth", lambda: 1.0)
    with pytest.raises(CoreInferError, match="made 3 tokens and not the 4 asked for"):
        worker.measure(Trial("coreinfer", "float32", None, TINY, 8, 4))


def test_a_contender_that_fails_says_why(tiny):
    with pytest.raises(CoreInferError, match="float13"):
        decode.in_process(Trial("coreinfer", "float13", None, TINY, 8, 4))


def test_a_failure_costs_the_others_nothing(monkeypatch, tmp_path):
    trials = [Trial("coreinfer", "float32", None, TINY, 8, 4), Trial("predictor", "float32", 0.5, TINY, 8, 4)]
    turns = []

    def fake(trial):
        turns.append(trial.contender)
        if trial.contender == "predictor":
            raise CoreInferError("no memory")
        return {"of": trial.contender}

    monkeypatch.setattr(decode, "in_process", fake)
    *_, (measured, failures) = decode._rounds(trials, 3, tmp_path)
    assert measured == [[{"of": "coreinfer"}] * 3, []]
    assert failures == ["predictor keep 0.5 float32: no memory"]
    assert turns == ["coreinfer", "predictor", "coreinfer", "coreinfer"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "opt-1t"], "--model 'opt-1t': give a config.json, or one of opt-125m"),
        (["--model", "opt-125m", "--layers", "13"], "--layers 13: opt-125m has 12; give 1 to 12"),
        (["--model", "opt-125m", "--contenders", "vllm"], "--contenders vllm: give some of coreinfer"),
        (
            ["--model", "opt-125m", "--dtypes", "float32", "--keeps", "1.5"],
            "--keeps=1.5: give a share above 0 and at most 1",
        ),
        (
            ["--model", "opt-350m", "--contenders", "predictor"],
            "--contenders predictor is measured for one row, of models",
        ),
        (
            ["--model", "opt-125m", "--out", "no/such/place.jsonl"],
            "--out no/such/place.jsonl: No such file or directory",
        ),
        (["--model", "opt-125m", "--rounds", "0"], "--rounds, --rows and --prompt-tokens are at least 1"),
        (["--model", "opt-125m", "--prompt-tokens", "2048"], "exceed the model's 2048 positions"),
    ],
)
def test_mistakes_get_one_line(arguments, said):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "decode", *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("benchmarks: ")
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_run_without_a_complete_round_ends_with_ctrl_c(monkeypatch, tmp_path, capsys):
    def stopped(trial):
        raise KeyboardInterrupt

    monkeypatch.setattr(decode, "in_process", stopped)
    assert main(["decode", "--model", "opt-125m", "--layers", "1", "--out", str(tmp_path / "none.jsonl")]) == 130
    assert "benchmarks: stopped; the results that were written stay\n" in capsys.readouterr().err


def test_a_suite_goes_on_after_a_failure(monkeypatch, capsys):
    monkeypatch.setitem(SUITES, "cpu", (("decode", "--model", "none"), ("decode", "--model", "neither")))
    assert main(["suite", "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert "1. decode --model none failed; its reason is above; " in said
    assert "2. decode --model neither failed; its reason is above" in said


def test_every_contender_runs_in_every_type_it_has(monkeypatch):
    monkeypatch.setattr(decode, "missing", lambda name: None)
    fields = shape_fields("llama-1.1b", None)
    names = [trial.name for trial in trials_of(Plan("llama-1.1b"), fields)]
    assert names[:3] == ["coreinfer float32", "coreinfer keep 0.4 float32", "coreinfer keep 0.2 float32"]
    assert "predictor keep 0.2 bfloat16" in names
    assert names[-3:] == ["llama.cpp F16", "llama.cpp Q8_0", "llama.cpp Q4_0"]
    opt = trials_of(Plan("opt-350m"), shape_fields("opt-350m", None))
    assert {trial.contender for trial in opt} == {"coreinfer", "transformers-eager", "transformers-compiled"}


def test_a_profile_accounts_for_every_matrix_of_a_step(tiny, monkeypatch):
    monkeypatch.setattr(profile, "bandwidth", lambda: 1e9)
    config = shape_config(TINY)
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        result = profile.measure(tiny, None, dtype, 0.375)
        read = {p["shape"]: p for p in result["products"]}
        matrices = {"96 x 32": 1, "32 x 32": 4, "16 x 32": 4, "24 x 32": 4, "32 x 24": 2}
        assert {name: p["matrices"] for name, p in read.items()} == matrices
        assert read["24 x 32"]["gb"] == 4 * 24 * 32 * size / 1e9
        assert all(p["ms"] > 0 for p in read.values())
        assert sum(p["ms"] for p in read.values()) < result["step_ms"]
        assert result["layers"] == config.num_layers


def test_the_weights_an_operation_reads_are_its_largest_matrix():
    program = """
  %w = bf16[8,32]{1,0} parameter(0)
  %row = f32[1,32]{1,0} fusion(%w), kind=kLoop
  ROOT %fused.1 = f32[8]{0} fusion(%row, %w), kind=kLoop, calls=%c
"""
    assert profile._weights_read(program) == {"row": "bf16[8,32]", "fused.1": "bf16[8,32]"}


def test_a_sweep_measures_every_point_under_every_setting(tiny, monkeypatch):
    monkeypatch.setitem(sweeps.AXES, "rows", ("rows", (1, 2), (sweeps.DENSE, sweeps.CORE, sweeps.SHARED)))
    result = sweeps.measure("rows", tiny, None, "float32", 2)
    points = {(point["rows"], point["setting"]): point for point in result["points"]}
    assert len(points) == len(result["points"]) == 6
    config, K = shape_config(TINY), int(0.4 * 64)
    attention = 2 * 32 * 32 + 2 * 16 * 32 + 2 * 32
    fixed, cache = 32 + 96 * 32, 2 * 2 * config.num_kv_heads * config.head_size * 128
    for (rows, setting), point in points.items():
        mlps = {sweeps.DENSE: 64, sweeps.CORE: rows * K, sweeps.SHARED: K}[setting] * 3 * 32
        offsets = {sweeps.DENSE: 0, sweeps.CORE: rows, sweeps.SHARED: 1}[setting] * 32
        step = 2 * (attention + mlps + offsets) + fixed + rows * 32
        assert point["bytes_per_token"] == 4 * (step / rows + cache)
        assert point["decode_ms_per_step"]["min"] > 0
        assert point["prefill_temporary_bytes"] > 0


def test_a_sweep_of_layers_stays_within_the_model(tiny):
    result = sweeps.measure("layers", tiny, None, "float32", 1)
    assert [point["layers"] for point in result["points"]] == [1, 1, 2, 2]


def test_when_narrowing_pays():
    first, later = (
        {name: {"median": value} for name, value in zip(names, values, strict=True)}
        for names in [("first_token_seconds", "compaction_seconds", "decode_ms_per_token")]
        for values in [(1.0, 0.0, 100.0), (1.1, 0.4, 60.0)]
    )
    # 500 ms later, 40 ms less for each token after the first: done sooner from 13 such tokens, 14 new ones.
    assert decode._pays_from(later, first) == 14
    assert decode._pays_from(first, later) is None


def test_ratios_pair_the_rounds():
    fast, slow = (
        {"decode_ms_per_token_by_round": [10.0, 20.0, 10.0]},
        {"decode_ms_per_token_by_round": [20.0, 80.0, 30.0]},
    )
    assert ratios(fast, slow) == {"median": 3.0, "min": 2.0, "max": 4.0}


def decode_result(contender, run, dtype="float32", keep=None, ms=(100.0, 110.0)):
    return {
        "contender": contender,
        "run": run,
        "dtype": dtype,
        "keep": keep,
        "model": "llama-1.1b",
        "layers": 2,
        "model_layers": 22,
        "rows": 1,
        "rounds": len(ms),
        "hardware": "a cpu",
        "decode_ms_per_token": {"median": min(ms), "min": min(ms), "max": max(ms)},
        "decode_ms_per_token_by_round": list(ms),
        "bandwidth_share": {"median": 0.7, "min": 0.6, "max": 0.8},
    }


@pytest.fixture
def committed(tmp_path, monkeypatch):
    def write(results):
        (tmp_path / "decode.jsonl").write_text(
            "".join(json.dumps(result) + "\n" for result in results), encoding="utf-8"
        )

    monkeypatch.setattr(environment, "RESULTS", tmp_path)
    return write


def test_only_results_of_one_run_stand_beside_each_other(committed):
    committed([decode_result("coreinfer", "first"), decode_result("llama.cpp", "second"), decode_result("x", "second")])
    runs = performance.decode_runs()
    assert {title: [r["contender"] for r in run] for title, run in runs.items()} == {
        "llama-1.1b shape, 2 of 22 layers; a cpu": ["llama.cpp", "x"]
    }


def test_aims_are_met_or_missed_by_the_median_of_rounds(committed):
    theirs = [decode_result("transformers-eager", "r", ms=(200.0, 190.0, 171.0))]
    theirs.append(decode_result("transformers-compiled", "r", ms=(300.0, 300.0, 300.0)))
    committed([decode_result("coreinfer", "r", ms=(100.0, 100.0, 100.0)), *theirs])
    rows = performance._targets().splitlines()
    assert rows[2].endswith("| met: x 1.90 (1.71 .. 2.00), float32 to float32 |")
    assert rows[7].endswith("| missed: 70% (60% .. 80%) |")


def test_memory_is_told_apart():
    with memory.watched() as peak:
        block = np.ones(50_000_000, np.uint8)
    assert peak.anonymous > block.nbytes
    assert peak.file > 0
    assert memory.read_bandwidth(1, repeats=1) > 0


def test_copies_are_all_made_and_nothing_is_allocated_for_them(monkeypatch):
    monkeypatch.setattr(memory, "COPY_BYTES", 1 << 12)
    assert memory.copy_bandwidth(repeats=1) > 0
    array = jnp.zeros(8, jnp.bfloat16)
    assert memory._copies(array).tolist() == [memory.COPIES] * 8
    assert array.is_deleted()


def quality_result(model, switched):
    """KL divergences that fall with the keep ratio, of the paper's votes half of chance, of all others a quarter."""

    def share(setting, calibrated):
        key = quality_page.key_of(described(setting) | {"calibrated": calibrated})
        return {quality_page.RANDOM: 1.0, quality_page.PAPER: 0.5}.get(key, 0.25)

    settings = [
        (one := described(setting))
        | {"prompt_tokens": n, "agreement": {"mean": 0.5}, "calibrated": calibrated, "kl_by_position": [0.1] * 4}
        | {"kl": {"mean": (kl := share(setting, calibrated) * (1.1 - one["keep"])), "ci95": [0.9 * kl, 1.1 * kl]}}
        for n in quality.TEXTS.prompt_tokens
        for calibrated, variants in ((False, quality.UNCALIBRATED), (True, quality.CALIBRATED))
        for setting in quality.settings(variants)
    ]
    one = {"rule": "votes", "kl": {"mean": 0.25}, "bytes_per_token": 2e6}
    swept = [one | {"alpha": 0.4, "layers": [0.0, 1.0]}, one | {"alpha": 0.4, "layers": [0.5, 1.0]}]
    made_on = {"hardware": "a machine", "versions": {}, "git_revision": "abc", "date": "today"}
    read = {str(keep): int(1e6 * keep) for keep in quality.KEEPS}
    sizes = {"texts": 9, "continuation": 64, "tokens_of_prior": 5, "bytes_per_token": 3e6, "mlp_bytes_per_token": read}
    return made_on | sizes | {"model": model, "switched": switched, "settings": settings, "swept": swept}


def test_the_quality_page_compares_with_the_papers_votes_and_with_chance(monkeypatch, tmp_path):
    results = [quality_result("tiny", switched) for switched in (False, True)]
    monkeypatch.setattr(quality_page, "read_results", lambda name: results)
    monkeypatch.setattr(quality_page, "PICTURE", tmp_path / "rules.png")
    sections = quality_page.sections()
    rules, switched, lengths = (sections[f"quality {name}"]() for name in ("rules", "switched", "lengths"))
    assert "| votes | 0.450, 100% | 0.350, 100% | 0.250, 100% | 0.150, 100% | 50.0% |" in rules
    assert "| random | 0.900, 200% \\* |" in rules
    assert "| energy | 0.225, 50% \\* |" in rules
    assert "no better than chance" not in rules
    assert "| votes | 0.450, 100% |" in switched
    calibrated = "contribution, 50% of mean, prior 256, measured layers"
    assert f"| {calibrated} | " + " | ".join(["50%"] * 12) + " |" in lengths
    positions, swept = sections["quality positions"](), sections["quality sweeps"]()
    assert "| 1 to 16 | 17 to 32 | 33 to 48 | 49 to 64 |" in positions
    assert f"| tiny, {calibrated} | 0.100 | 0.100 | 0.100 | 0.100 |" in positions
    assert "| votes, alpha 0.4 | 0.250, 2.0 |" in swept
    assert "| votes, layers 0.5 to 1 of depth | 0.250, 2.0 |" in swept
    results[0]["settings"] = [
        s | {"kl": {"mean": 2.0, "ci95": [1.9, 2.1]}} if s["rule"] == "norm" else s for s in results[0]["settings"]
    ]
    assert quality_page.sections()["quality rules"]().count("(no better than chance)") == 4
    assert "| tiny, 20% | 0.450, 50% | 0.225, 50% | 0.225, 50% |" in sections["quality"]()
    assert quality_page.megabytes(results[0]) == pytest.approx({0.2: 2.2, 0.4: 2.4, 0.6: 2.6, 0.8: 2.8})
    quality_page.draw()
    assert (tmp_path / "rules.png").stat().st_size > 10_000


def test_a_quality_result_has_four_digits_of_what_is_shown():
    found = {"kl": {"mean": 0.123456, "ci95": [0.1, 1.23456]}, "agreement_by_position": [1.0], "too_short": 0}
    assert quality._short(found | {"texts": 3}) == {"kl": {"mean": 0.1235, "ci95": [0.1, 1.235]}, "texts": 3}


def test_passages_are_whole_lines_of_at_least_their_size(monkeypatch):
    monkeypatch.setattr(quality, "PASSAGE", 10)
    assert quality._passages("12345\n6789\nabcdefghijkl\nrest\n") == ["12345\n6789\n", "abcdefghijkl\n"]


def gpu_result(contender, keep, milliseconds, share=0.9):
    spread = {"median": 1.0, "min": 1.0, "max": 1.0}
    return {
        "contender": contender,
        "keep": keep,
        "dtype": "bfloat16",
        "model": "opt-6.7b",
        "layers": 32,
        "prompt_tokens": 512,
        "decode_ms_per_token": {"median": milliseconds},
        "decode_ms_per_token_by_round": [milliseconds],
        "bandwidth_share": spread | {"median": share},
        "prefill_seconds": spread | {"median": 1.0 if keep is None else 1.2},
        "compaction_seconds": spread | {"median": 0.03},
        "compile_cold_seconds": 50.0,
        "compile_warm_seconds": spread | {"median": 11.0},
    }


def test_aims_on_a_gpu_are_judged(monkeypatch):
    results = [
        gpu_result("coreinfer", None, 5.0),
        gpu_result("coreinfer", 0.2, 2.5, share=0.8),
        gpu_result("transformers-eager", None, 30.0),
    ]
    monkeypatch.setattr(gpu_aims, "decode_runs", lambda: {"opt-6.7b shape; a card, cuda": results, "x; cpu": []})
    lines = gpu_aims.section().splitlines()[2:]
    assert [line.split(" | ")[1].removesuffix(" |") for line in lines] == [
        "met: 90%",
        "missed: 80%",
        "met: x 2.00 of 1.8",
        "met: x 12.00 of 10.33",
        "",
        "missed: x 1.20, 512 tokens",
        "missed: 6.0 steps",
        "missed: 50 s, again 11.0 s, 32 layers",
        "",
        "",
    ]
    monkeypatch.setattr(gpu_aims, "decode_runs", lambda: {"x; cpu": results})
    assert "Nothing was measured on a GPU" in gpu_aims.section()


def test_free_running_is_measured_and_shown(monkeypatch, tinystories, data):
    params, tokenizer = ci.load(tinystories)
    lines = (data / "text" / "tinystories_val.txt").read_text(encoding="utf-8").splitlines()
    documents = Documents("stories", "", tuple(line for line in lines if len(line) > 400)[:2])
    monkeypatch.setattr(continuations, "subjects", lambda texts, models: [("tiny", params, tokenizer, documents, None)])
    monkeypatch.setattr(continuations, "NEW", 4)
    [result] = continuations.measure(None, None)
    assert [(s["rule"], s["keep"]) for s in result["settings"]] == [
        (rule, keep) for rule in ("votes", "contribution") for keep in quality.KEEPS
    ]
    monkeypatch.setattr(quality_page, "read_results", lambda name: [result] if name == "free-running" else [])
    shown = quality_page.sections()["free running"]()
    assert "| all neurons | 4.0 (4.0 .. 4.0) |" in shown
    assert shown.count("contribution, keep") == 4


def test_rows_that_differ_are_not_counted_as_the_same(monkeypatch):
    params = random_model(MODELS["llama"])
    prompts = [[5, 9, 11], [7, 3], [12, 30, 31]]
    monkeypatch.setattr(same_tokens, "NEW_TOKENS", 6)
    assert same_tokens.compared(params, prompts)["same"] == 3
    made = ci.generate

    def other_second_row(*arguments, **options):
        out = made(*arguments, **options)
        return replace(out, tokens=out.tokens + (np.arange(3) == 1)[:, None]) if "lossless" in options else out

    monkeypatch.setattr(ci, "generate", other_second_row)
    found = same_tokens.compared(params, prompts)
    assert (found["prompts"], found["same"]) == (3, 2)
    assert found["tokens_per_pass"] >= 1


def test_settings_with_and_without_linear_neurons_read_as_much():
    params = explained(random_model(MODELS["llama"]))
    found = linear_cost.compared(params, [3, 4, 5, 6], 0.5, rounds=2)
    read = found["bytes_per_token"]
    assert read["with"] == pytest.approx(read["without"], rel=0.05)
    assert set(found["phases"]) == set(linear_cost.PHASES)


def test_what_linear_neurons_take_is_compared_round_by_round(monkeypatch):
    taken = iter([1.0, 1.0, 2.0, 3.0, 4.0, 8.0])  # the first pair compiles

    def generated(*arguments, **options):
        took = next(taken)
        stats = {"selection_seconds": took, "compaction_seconds": took, "decode_seconds": 2 * took, "decode_steps": 2}
        return SimpleNamespace(stats=SimpleNamespace(**stats, bytes_read_per_token=1.0))

    monkeypatch.setattr(ci, "generate", generated)
    found = linear_cost.compared(random_model(MODELS["llama"]), [3], 0.5, rounds=2)["phases"]["step"]
    assert (found["without"]["max"], found["with"]["max"]) == (4000, 8000)
    assert (found["times"]["min"], found["times"]["max"]) == (1.5, 2.0)


def test_the_table_of_linear_neurons_has_each_keep_ratio(monkeypatch):
    def one(name, keep):
        return {"name": name, "keep": keep, "texts": 48, "linear_layers": 3} | {
            "kl": {"mean": keep if name == linear_neurons.OURS else 2 * keep},
            "agreement": {"mean": 1 - keep},
        }

    settings = [one(name, keep) for name in linear_neurons.WAYS for keep in linear_neurons.KEEPS]
    made = {"versions": {}, "hardware": "", "git_revision": "", "date": ""}
    results = [
        {"kinds": {}} | made | {"model": "old"},
        {"model": "a", "prompt_tokens": 64, "settings": settings} | made,
    ]
    monkeypatch.setattr(linear_neurons, "read_results", lambda name: results)
    _, _, *rows = linear_neurons.table().partition("\n\n")[0].splitlines()
    assert [row.split("|")[1].strip() for row in rows] == [f"a, {keep:.0%}" for keep in linear_neurons.KEEPS]
    assert "| a, 20% | 0.400, 80% | 0.400, 80% | 0.200, 80% | 3 |" in rows


def test_fits_of_a_prompt_are_its_regression_where_they_have_all_directions():
    """Against least squares, for directions of both kinds; with a large ridge they foretell the mean."""
    layer, rng = random_model(MODELS["llama"]).layers[0], np.random.default_rng(0)
    x, a = rng.normal(size=(200, 32)), rng.normal(size=(200, 96))
    tokens = linear_fallback.weighted(layer, x, a)
    root = np.sqrt(tokens[2] / tokens[2].sum())[:, None]
    design = np.concatenate([x, np.ones((200, 1))], axis=1)
    expected = design @ np.linalg.lstsq(design * root, a * root, rcond=None)[0]
    given = linear_fallback.leading(layer, 32)
    for ridge, foretold in ((1e-6, expected), (1e6, np.broadcast_to((root**2 * a).sum(axis=0), a.shape))):
        for found in (
            linear_fallback.of_prompt(layer, tokens, 32, ridge),
            linear_fallback.onto(layer, tokens, given, ridge),
        ):
            np.testing.assert_allclose(found.expected(jnp.asarray(x[None], jnp.float32))[0], foretold, atol=2e-2)


def test_the_table_of_fallbacks_has_every_way(monkeypatch):
    def one(name, keep):
        figures = {"kl": {"mean": keep, "ci95": [0.1, 0.9]}, "agreement": {"mean": 0.5}, "bytes_per_token": 3e6}
        return {"name": name, "keep": keep} | figures

    names = (linear_fallback.TODAY, f"{linear_fallback.WEIGHTS}, 32")
    settings = [one(name, keep) for name in names for keep in linear_fallback.KEEPS]
    made = {"versions": {}, "hardware": "", "git_revision": "", "date": "", "texts": 6, "prompt_tokens": 128}
    monkeypatch.setattr(linear_fallback, "read_results", lambda name: [made | {"settings": settings}])
    _, _, *rows = linear_fallback.table().partition("\n\n")[0].splitlines()
    cells = "0.40 (0.10 .. 0.90), 50%, 3 MB | 0.80 (0.10 .. 0.90), 50%, 3 MB"
    assert rows == [
        f"| {linear_fallback.TODAY} | {cells} |",
        f"| 32 linear neurons, directions from the weights | {cells} |",
    ]


def test_directions_of_weights_are_what_gate_and_up_read_most():
    layer = random_model(MODELS["llama"]).layers[0]
    direction = np.random.default_rng(0).normal(size=32)
    up, gate = (np.outer(np.arange(1, 97), direction) for _ in range(2))
    mlp = replace(layer.mlp, up=Linear(jnp.asarray(up, jnp.float32)), gate=Linear(jnp.asarray(gate, jnp.float32)))
    scale = np.asarray(layer.mlp_norm.scale, np.float64)
    [found] = linear_fallback.leading(replace(layer, mlp=mlp), 1) * scale
    read = direction * scale
    assert abs(found @ read) / np.linalg.norm(read) == pytest.approx(1, abs=1e-6)


def test_drafted_tokens_are_counted_by_place_over_all_texts():
    def drafts(*counts):
        accepted, reached = ({"core": own, "lookup": [9, 9]} for own in counts)
        return {"drafts": {"accepted": accepted, "reached": reached}}

    unlike = drafts([7, 7], [8, 8])
    results = [
        {"ways": {"lookup": unlike, "both": drafts([1, 0], [3, 1])}},
        {"ways": {"lookup": unlike, "both": drafts([2, 1], [2, 2])}},
    ]
    assert lossless.accepted_by_place(results, "core neurons") == [(3, 5), (1, 3)]
    assert lossless.accepted_by_place(results, "earlier words") == [(18, 18), (18, 18)]


def test_voted_neurons_are_scored_with_and_without_linear_ones(monkeypatch):
    params = explained(random_model(MODELS["llama"]))
    for name, value in {"PROMPT": 6, "CONTINUATION": 5, "KEEPS": (0.5,), "ROWS": 2}.items():
        monkeypatch.setattr(linear_votes, name, value)
    rows = np.random.default_rng(0).integers(3, 60, (3, 11))
    result = {"model": "a"} | linear_votes.of_model(params, rows)
    for own in result["settings"]:
        losses = [
            [-ci.score_continuations(params, [row[:6]], [row[6:]], core).logprobs[0].mean() for row in rows.tolist()]
            for core in (Auto(beta=0.5, linear=linear_votes.WAYS[own["name"]]), None)
        ]
        assert own["lost"]["mean"] == pytest.approx(np.mean(losses[0]) - np.mean(losses[1]), abs=1e-5)
    result |= {"versions": {}, "hardware": "", "git_revision": "", "date": ""}
    monkeypatch.setattr(linear_votes, "read_results", lambda name: [result])
    assert linear_votes.table().splitlines()[2].startswith("| a, 50% | ")
