"""The suite: its order, its budget, what is written when it is cut off, and all of a GPU's measurements, tiny."""

import _thread
import json
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from threading import Thread
from time import sleep

import jax
import jax.numpy as jnp
import pytest

from benchmarks import decode, gpu_aims, kernels, performance, suite, sweeps, worker
from benchmarks.__main__ import _parser, main
from benchmarks.contenders import coreinfer
from benchmarks.contenders.trial import Trial
from benchmarks.environment import REPOSITORY
from benchmarks.shapes import shape_config, shape_fields
from coreinfer_jax.errors import CoreInferError
from tests.test_benchmarks import TINY

# Benchmarks start processes of their own.
pytestmark = pytest.mark.slow


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(TINY | {"num_hidden_layers": 1}), encoding="utf-8")
    return str(path)


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_gpu_measures_the_aims_first():
    items = suite.SUITES["gpu"]
    assert [(item[0], item[2]) for item in items[:3]] == [
        ("decode", "llama-3.1-8b"),
        ("decode", "opt-6.7b"),
        ("kernels", "llama-3.1-8b"),
    ]
    assert {item[0] for item in items} == {"decode", "kernels", "sweep"}
    assert {item[-1] for item in items if item[0] == "sweep"} == set(sweeps.AXES)
    assert suite.BUDGETS["gpu"] == 25 * 60


def test_suites_name_measurements_that_there_are():
    for items in suite.SUITES.values():
        for item in items:
            options = _parser().parse_args(item)
            assert 1 <= shape_fields(options.model, options.layers)["num_hidden_layers"] <= 32


# What stands for a GPU's options in a rehearsal.
SMALL = {"--layers": "1", "--prompt-tokens": "8", "--new-tokens": "4", "--rounds": "2"}


def rehearsed(item, model):
    """`item` with the tiny model, and of the contenders ours alone."""
    words = [word for word in item if word not in decode.CONTENDERS or word == "coreinfer"]
    for option, value in (SMALL | {"--model": model}).items():
        if option in words:
            words[words.index(option) + 1] = value
    return words


@pytest.fixture
def one_process(monkeypatch):
    """Contenders measured in this process, and the memory's speed not at all."""

    def measured(trial):
        return json.loads(json.dumps(worker.measure(replace(trial, cache=None))))

    monkeypatch.setattr(decode, "in_process", measured)
    for module in (worker, kernels):
        monkeypatch.setattr(module, "bandwidth", lambda: 1e9)
    monkeypatch.setattr(kernels, "MOST_WEIGHTS", 2)
    monkeypatch.setitem(kernels.CALL_BYTES, "cpu", 1 << 14)


def test_a_gpus_suite_is_rehearsed(tiny, tmp_path, one_process, monkeypatch, capsys):
    for over, (name, values, settings) in list(sweeps.AXES.items()):
        monkeypatch.setitem(sweeps.AXES, over, (name, values[:1], settings))
    out = tmp_path / "results.jsonl"

    def run(item, left):
        assert left > 0
        assert main([*rehearsed(item, tiny), "--out", str(out)]) == 0

    suite.run_all(suite.SUITES["gpu"], 600.0, run)
    results = lines_of(out)
    decoded = [r for r in results if r["benchmark"] == "decode"]
    # Of both models three keep ratios after each of two rounds.
    assert [(r["keep"], r["rounds"]) for r in decoded] == 2 * [(k, n) for n in (1, 2) for k in (None, 0.4, 0.2)]
    assert all(r["device_needed_gb"] > 0 and r["prefill_seconds"]["median"] > 0 for r in decoded)
    assert [r["over"] for r in results if r["benchmark"] == "sweep"] == [
        item[-1] for item in suite.SUITES["gpu"] if item[0] == "sweep"
    ]
    forms = [set(r["forms"]) for r in results if r["benchmark"] == "kernels"]
    assert forms == 2 * 7 * [{"as decoding", "matrix product"}]
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "9 measurements in at most 10 minutes, the most important first:"
    assert said[1].startswith("  1. decode --model llama-3.1-8b")
    assert sum(" took " in line for line in said) == 9


def test_what_does_not_fit_the_budget_is_left_out(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(suite, "perf_counter", lambda: clock[0])
    costs = {"long": 60.0, "short": 15.0, "endless": 1e9}
    ran = []

    def run(item, left):
        ran.append((*item, left))
        clock[0] += min(costs[item[0]], left)
        if costs[item[0]] > left:
            raise suite.CutOffError

    items = [("long", "a"), ("short", "b"), ("long", "c"), ("short", "d"), ("endless", "e"), ("short", "f")]
    suite.run_all(items, 100.0, run)
    # After 75 s a second long one does not fit any more, a second short one does. The endless one takes what is left.
    assert ran == [("long", "a", 100.0), ("short", "b", 40.0), ("short", "d", 25.0), ("endless", "e", 10.0)]
    said = capsys.readouterr().out
    assert "left out for want of time: 3. long c; 6. short f\n" in said
    assert "5. was cut off; the results that it had written stay\n" in said


def test_a_failure_costs_the_others_nothing(capsys):
    def run(item, left):
        assert left is None
        if item[0] == "bad":
            raise CoreInferError("no memory")

    with pytest.raises(CoreInferError, match=r"^1\. no memory; 3\. no memory$"):
        suite.run_all([("bad",), ("good",), ("bad",), ("good",)], None, run)
    assert [line.partition(" took ")[0] for line in capsys.readouterr().out.splitlines() if "took" in line] == [
        "2.",
        "4.",
    ]


def test_complete_rounds_are_written_before_the_next_begins(tiny, tmp_path, monkeypatch, one_process):
    out = tmp_path / "results.jsonl"
    measured, calls = decode.in_process, []

    def cut_off(trial):
        calls.append(trial.name)
        if len(calls) == 4:
            assert [(r["keep"], r["rounds"]) for r in lines_of(out)] == [(None, 1), (0.5, 1)]
            raise KeyboardInterrupt
        return measured(trial)

    monkeypatch.setattr(decode, "in_process", cut_off)
    sizes = ["--dtypes", "float32", "--keeps", "0.5", "--prompt-tokens", "8", "--new-tokens", "4", "--rounds", "3"]
    assert main(["decode", "--model", tiny, "--contenders", "coreinfer", *sizes, "--out", str(out)]) == 0
    assert len(lines_of(out)) == 2


def test_of_a_run_the_last_complete_rounds_are_shown(monkeypatch):
    common = {"model": "m", "layers": 1, "model_layers": 1, "hardware": "h", "run": "r"}
    written = [common | {"rounds": n, "contender": c} for n in (1, 2) for c in ("a", "b") if (n, c) != (2, "b")]
    monkeypatch.setattr(performance, "read_results", lambda name: written)
    assert performance.decode_runs() == {"m shape; h": [common | {"rounds": 2, "contender": "a"}]}


@pytest.fixture
def heeds_interrupts():
    """Workers of pytest-xdist ignore them, and so would what they start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_measurement_that_is_stopped_leaves_its_results_and_no_process(tiny, tmp_path, heeds_interrupts):
    out = tmp_path / "results.jsonl"
    sizes = ("--dtypes", "float32", "--keeps", "0.5", "--prompt-tokens", "8", "--new-tokens", "4", "--rounds", "1000")
    item = ("decode", "--model", tiny, "--contenders", "gather", *sizes, "--out", str(out))

    def stop_after_a_round():
        while not out.is_file() or not out.read_text(encoding="utf-8"):
            sleep(0.1)
        _thread.interrupt_main()

    Thread(target=stop_after_a_round, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        suite.in_process(item, 300.0)
    assert [r["rounds"] for r in lines_of(out)][:1] == [1]
    assert not [command for command in running() if tiny.encode() in command]
    with pytest.raises(suite.CutOffError):
        suite.in_process(item, 0.1)


def running():
    """The command lines of all processes there are, as Linux shows them."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended since
            yield path.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--device", "tpu9"], "--device tpu9: give cpu or gpu"),
        (["--device", "gpu"], "--device gpu: JAX finds no GPU here, but cpu; pip install '.[cuda]'"),
        (["--budget", "0"], "--budget 0: give more than 0 seconds"),
    ],
)
def test_mistakes_get_one_line_before_anything_runs(arguments, said):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "suite", *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"benchmarks: {said}\n"


def test_contenders_that_are_not_installed_are_left_out_of_the_plan(monkeypatch):
    monkeypatch.setattr(suite, "missing", lambda name: "torch")
    items, absent = suite._plan(suite.SUITES["gpu"])
    assert absent == ["transformers-eager", "transformers-compiled"]
    assert items[0][-2:] == ("--contenders", "coreinfer")
    assert items[1][-3:] == ("coreinfer", "predictor", "gather")


def test_memory_that_is_needed_equals_a_hand_count():
    attention, norms = 2 * 32 * 32 + 2 * 16 * 32, 2 * 32
    weights = 2 * (attention + norms + 3 * 64 * 32) + 32 + 2 * 96 * 32
    cache = 2 * 2 * 2 * 8 * 64
    dense, narrowed = (
        coreinfer.run(Trial("coreinfer", "float32", keep, TINY, 8, 4, generations=1)).device_needed_bytes
        for keep in (None, 0.5)
    )
    assert dense == 4 * (weights + cache)
    # Three matrices per layer of half the neurons, and the mean output of those left out.
    assert narrowed == 4 * (weights + cache + 2 * (3 * 32 * 32 + 32))


def test_memory_at_its_peak_is_judged():
    result = {"contender": "coreinfer", "keep": None, "dtype": "bfloat16", "decode_ms_per_token": {"median": 1.0}}
    judged = [
        gpu_aims._memory(gpu_aims.DENSE, [result | {"device_gb": peak, "device_needed_gb": 10.0}])
        for peak in (10.9, 11.1)
    ]
    assert judged == ["met: x 1.09, 10.9 GB", "missed: x 1.11, 11.1 GB"]
    assert gpu_aims._memory(gpu_aims.DENSE, [result]) == ""


def test_every_weight_of_a_step_is_multiplied_by():
    config = shape_config(shape_fields("llama-3.1-8b", None))
    found = kernels.shapes(config, "bfloat16", 0.25)
    counts = {shape: (n["matrices_all"], n["matrices_kept"]) for shape, n in found.items()}
    assert (
        sum(out * size * n for (out, size), (n, _) in counts.items())
        == 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096) + 128256 * 4096
    )
    assert (
        sum(out * size * n for (out, size), (_, n) in counts.items())
        == 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 3584 * 4096) + 128256 * 4096
    )


def test_forms_make_every_product_anew_and_agree_with_numpy():
    x = jax.random.normal(jax.random.key(0), (1, 48), jnp.bfloat16)
    weights = [jax.random.normal(jax.random.key(key), (32, 48), jnp.bfloat16) for key in (1, 2)]
    before = [jnp.full((1, 32), jnp.nan)] * 2
    for name, form in kernels.FORMS.items():
        if name != "Mosaic GPU":  # tests/test_mosaic.py
            made = kernels.program(form)(x, weights, before, 2)
            kernels._check(x, weights, made)
            with pytest.raises(CoreInferError, match="differs from NumPy"):
                kernels._check(x, weights[::-1], made)


def test_a_form_that_fails_costs_the_others_nothing(tiny, one_process, monkeypatch):
    monkeypatch.setitem(kernels.FORMS, "wrong", kernels.Form(lambda x, w: 1.001 * kernels._two_rows(x, w), on_cpu=True))
    monkeypatch.setitem(kernels.FORMS, "none", kernels.Form(kernels._two_rows, {"xla_no": 1}, on_cpu=True))
    results = []
    with pytest.raises(CoreInferError, match=r"64 x 32, wrong: differs from NumPy by .*; 64 x 32, none: .*xla_no"):
        results.extend(kernels.measure(tiny, None, "bfloat16", 0.5, 1))
    # Kept neurons make the MLP's weights as large as attention's.
    assert len(results) == 5
    assert {name for result in results for name in result["forms"]} == {"as decoding", "matrix product"}


def test_kernels_are_shown_by_shape_and_added_up_to_a_step(monkeypatch):
    def result(shape, number, kept, speeds):
        forms = {
            name: {"gb_per_second": {"median": speed}, "bandwidth_share": {"median": speed / 1000}}
            for name, speed in speeds.items()
        }
        own = {"shape": shape, "matrices_all": number, "matrices_kept": kept, "forms": forms, "bytes_per_weight": 10**7}
        made = {"model": "m", "layers": 2, "dtype": "bfloat16", "keep": 0.2, "rounds": 7, "hardware": "a card"}
        versions = {"versions": {}, "git_revision": "abc", "date": "today"}
        return own | made | versions | {"plain_gb_per_second": 1000.0}

    both = [result("8 x 4", 2, 0, {"a": 500.0, "b": 800.0}), result("2 x 4", 0, 2, {"a": 400.0})]
    monkeypatch.setattr(kernels, "read_results", lambda name: both)
    lines = kernels.table().splitlines()
    assert lines[2:6] == [
        "| 8 x 4 | 2 | 0 | 1000 | 500, 50% | 800, 80% |",
        "| 2 x 4 | 0 | 2 | 1000 | 400, 40% |  |",
        "| all products of a step, all neurons: ms |  |  |  | 0.04 | 0.03 |",
        "| all products of a step, keep 0.2: ms |  |  |  | 0.05 |  |",
    ]
    monkeypatch.setattr(kernels, "read_results", lambda name: [])
    assert kernels.table() == "Nothing was measured on a GPU yet."
