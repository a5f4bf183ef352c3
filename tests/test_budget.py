"""What a plan says of a call's memory is what the call takes, and what cannot work is refused with what would."""

import gc
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

import coreinfer_jax as ci
from coreinfer_jax import device
from coreinfer_jax.checks import parse_bytes
from coreinfer_jax.cli import arguments as cli_arguments
from coreinfer_jax.cli import main
from coreinfer_jax.engine import budget as budgeting
from coreinfer_jax.engine import dispatch, loop, streamed, streamed_verification
from coreinfer_jax.engine.budget import Part, Plan, check_plan, plan_request, temporary_bytes
from coreinfer_jax.engine.generation import make_request
from coreinfer_jax.engine.request import Past, Request
from coreinfer_jax.io import loading
from coreinfer_jax.io.mapping import leaf_shapes
from coreinfer_jax.io.native import write_native
from coreinfer_jax.model import cache
from coreinfer_jax.model import host as hosting
from coreinfer_jax.model.cache import bucket
from coreinfer_jax.model.config import Rope
from coreinfer_jax.model.weights import named_leaves
from tests.stand_ins import write_shallow
from tests.support import LLAMA, OPT, random_model, with_mlps_on_host
from tests.test_linear import explained

SIZES = {"hidden_size": 128, "embed_size": 128, "head_size": 32, "mlp_size": 512}
PROMPT = [np.random.default_rng(0).integers(3, 101, 40).tolist()]
CORE = ci.CoreConfig(beta=0.4)


def plan_of(params: ci.Params, core: object, budget: int = 2**30, **settings: object) -> Plan:
    request = make_request(params, PROMPT, core, {"max_new_tokens": 12, **settings})
    return plan_request(request, budget)


class Watch:
    """The largest number of bytes on the device in each phase of a call: arrays, and programs' temporaries."""

    def __init__(self, params: ci.Params, monkeypatch: pytest.MonkeyPatch, past: Past | None = None) -> None:
        gc.collect()
        leaves = [leaf for _, leaf in named_leaves(params) if isinstance(leaf, jax.Array)]
        calibration = jax.tree.leaves(params.calibration)
        read = [] if past is None else jax.tree.leaves((past.cache, past.sums))
        self.own = {id(leaf) for leaf in [*leaves, *calibration, *read]}
        self.before = {id(array): array for array in jax.live_arrays() if id(array) not in self.own}
        self.most = dict.fromkeys(("prefill", "compaction", "decode"), 0)
        self.phase, self.temporaries = "prefill", 0
        draft, keep = streamed_verification.draft_next, streamed_verification.keep
        put, through, decode, narrowed = hosting.put, streamed.through_layer, dispatch.decode, loop._narrowed

        def watched_put(mlp):
            made = put(mlp)
            self.look(self.phase, self.temporaries)
            return made

        def watched_through(*arguments, **static):
            self.temporaries = max(self.temporaries, temporary_bytes(through, *arguments, **static))
            return through(*arguments, **static)

        def watched_narrowed(*arguments):
            self.phase = "compaction"
            made = narrowed(*arguments)
            self.look("compaction", 0)
            self.phase, self.temporaries = "decode", 0
            return made

        def watched_draft(*arguments, **static):
            self.look("decode", temporary_bytes(draft, *arguments, **static))
            return draft(*arguments, **static)

        def watched_keep(*arguments):
            self.look("decode", temporary_bytes(keep, *arguments))
            return keep(*arguments)

        def watched_decode(*arguments):
            self.look("decode", temporary_bytes(decode, *arguments))
            return decode(*arguments)

        monkeypatch.setattr(hosting, "put", watched_put)
        monkeypatch.setattr(streamed, "through_layer", watched_through)
        monkeypatch.setattr(loop, "_narrowed", watched_narrowed)
        monkeypatch.setattr(dispatch, "decode", watched_decode)
        monkeypatch.setattr(streamed_verification, "draft_next", watched_draft)
        monkeypatch.setattr(streamed_verification, "keep", watched_keep)

    def look(self, phase: str, temporaries: int) -> None:
        live = sum(array.nbytes for array in jax.live_arrays() if id(array) not in self.before)
        self.most[phase] = max(self.most[phase], live + temporaries)


@pytest.mark.parametrize(
    ("name", "core", "lossless"),
    [
        ("opt", CORE, False),
        pytest.param("llama", ci.CoreConfig(beta=0.4, layers=(0.3, 1.0)), False, marks=pytest.mark.slow),
        ("linear", ci.CoreConfig(beta=0.5, allocation="equal"), False),
        ("opt", None, False),
        ("llama", CORE, True),
        pytest.param("opt", None, True, marks=pytest.mark.slow),
    ],
    ids=["narrowed", "some-layers", "linear", "dense", "lossless", "lossless-lookup"],
)
def test_planned_bytes_are_live_bytes(name: str, core: object, lossless: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(LLAMA if name == "llama" else OPT, **SIZES)
    linear = name == "linear"  # learnt from few tokens, so of a small hidden size
    params = explained(random_model(replace(OPT, mlp_size=1536))) if linear else random_model(config)
    on_host = with_mlps_on_host(params)
    plan = plan_of(on_host, core, lossless=lossless)
    watch = Watch(on_host, monkeypatch)
    # Every pass verifies a draft, whatever that costs.
    monkeypatch.setattr("coreinfer_jax.engine.lossless.BEST", 1 if core is None else 2)
    out = ci.generate(on_host, PROMPT, core, max_new_tokens=12, lossless=lossless)
    gather = {part.name: part.nbytes for part in plan.parts}.get("one layer's gather", 0)
    assert watch.most["prefill"] == pytest.approx(plan.phase_bytes("prefill"), rel=0.01)
    assert watch.most["decode"] == pytest.approx(plan.phase_bytes("decode"), rel=0.01)
    if core is not None:
        assert watch.most["compaction"] == pytest.approx(plan.phase_bytes("compaction") - gather, rel=0.01)
    # The first token is the prefill's; each pass after it moves as much, also one that makes several tokens.
    moved = plan.per_prompt + plan.per_set + out.stats.decode_steps * plan.per_pass
    assert out.stats.moved_bytes == pytest.approx(moved, rel=0.01)
    assert (plan.per_pass > 0) == (lossless or core is None)


def test_a_plan_is_made_of_shapes_and_runs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    params = random_model(replace(OPT, **SIZES))
    monkeypatch.setattr(hosting, "put", None)
    shapes = with_mlps_on_host(params)
    unread = replace(shapes, layers=tuple(replace(layer, mlp=_unread(layer.mlp)) for layer in shapes.layers))
    assert plan_of(unread, CORE) == plan_of(shapes, CORE)


def _unread(mlp):
    return jax.tree.map(lambda leaf: hosting.HostArray(leaf.shape, leaf.dtype, None), mlp)


def test_what_cannot_work_is_refused_with_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    params = with_mlps_on_host(random_model(replace(OPT, **SIZES)))
    wide = ci.CoreConfig(beta=0.9)
    narrow, plan = plan_of(params, ci.CoreConfig(beta=0.5)), plan_of(params, wide)
    budget = (narrow.needed + plan.needed) // 2
    with pytest.raises(ci.CoreInferError) as refused:
        ci.generate(params, PROMPT, wide, max_new_tokens=12, device_memory=budget)
    told = str(refused.value)
    assert f"device_memory={plan.needed} or more" in told
    ratio = float(re.search(r"beta=([\d.]+) fits", told)[1])
    assert 0.5 <= ratio < 0.9
    for fitting, most in ((ratio, budget), (0.9, plan.needed)):
        assert plan_of(params, ci.CoreConfig(beta=fitting)).needed <= most
        ci.generate(params, PROMPT, ci.CoreConfig(beta=fitting), max_new_tokens=12, device_memory=most)
    assert plan_of(params, ci.CoreConfig(beta=ratio + 0.01)).needed > budget
    assert "narrowed MLPs" in capsys.readouterr().err
    with pytest.raises(ci.CoreInferError, match="take a smaller model or a 16-bit dtype"):
        ci.generate(params, PROMPT, wide, max_new_tokens=12, device_memory="100KiB")


@pytest.mark.parametrize("core", [None, ci.CoreConfig(beta=1.0), ci.CoreConfig(beta=0.2)], ids=["dense", "all", "few"])
def test_no_keep_ratio_is_named_where_the_prefill_does_not_fit(core: object) -> None:
    params = with_mlps_on_host(random_model(replace(OPT, **SIZES)))
    request = make_request(params, PROMPT, core, {"max_new_tokens": 12})
    plan = plan_request(request, 1)
    told = refusal_of(request, replace(plan, budget=plan.phase_bytes("prefill") - 1))
    assert told.endswith("or ask for fewer rows or tokens, as the prefill moves whole MLPs, whatever is kept")


def refusal_of(request: Request, plan: Plan) -> str:
    with pytest.raises(ci.CoreInferError) as refused:
        check_plan(request, plan)
    return str(refused.value)


@pytest.mark.parametrize("core", [None, ci.CoreConfig(beta=1.0)], ids=["dense", "all"])
def test_steps_that_move_too_much_are_told_of_core_neurons(core: object) -> None:
    """No model that is read here has such steps: what they need besides is made up."""
    params = with_mlps_on_host(random_model(replace(OPT, **SIZES)))
    request, budget = make_request(params, PROMPT, core, {"max_new_tokens": 12}), plan_of(params, CORE).needed
    plan = plan_request(request, budget)
    told = refusal_of(request, replace(plan, parts=(*plan.parts, Part("made up", budget, ("decode",)))))
    named = "choose core neurons" if core is None else "keep less"
    ratio = float(re.search(f"{named}, beta=([\\d.]+) fits", told)[1])
    assert (
        plan_of(params, ci.CoreConfig(beta=ratio)).needed
        <= budget
        < plan_of(params, ci.CoreConfig(beta=ratio + 0.01)).needed
    )


def test_all_ratios_that_are_too_large_are_named() -> None:
    params = with_mlps_on_host(random_model(replace(OPT, **SIZES)))
    tight = plan_of(params, ci.Auto(beta=0.45)).needed
    groups: Any = SimpleNamespace(narrowed=(), clusters=SimpleNamespace(layer=0))  # all that a plan asks of groups
    for beta, gamma, named in ((0.9, 0.8, {"beta", "gamma"}), (0.9, 0.1, {"beta"}), (0.1, 0.9, {"gamma"})):
        core = ci.Auto(beta=beta, gamma=gamma)
        request = replace(make_request(params, PROMPT, ci.Auto(), {"max_new_tokens": 12}), chooser=core, groups=groups)
        told = refusal_of(request, plan_request(request, tight))
        lower = {name: float(ratio) for name, ratio in re.findall(r"(beta|gamma)=([\d.]+)", told)}
        assert set(lower) == named
        fitting = replace(request, chooser=replace(core, **lower))
        assert plan_request(fitting, tight).needed <= tight
        ratio = max(lower.values())
        assert ratio > 0.4
        more = replace(request, chooser=replace(core, **dict.fromkeys(lower, ratio + 0.01)))
        assert plan_request(more, tight).needed > tight


@pytest.mark.parametrize(("step", "most"), [(0, 1), (0.25, 12), (4, 12)], ids=["bound", "some", "none"])
def test_a_lossless_refusal_compiles_few_programs(step: float, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What drafting needs besides is made up: `step` MLPs beyond the two that have gone."""
    params, compiled = with_mlps_on_host(random_model(replace(OPT, **SIZES))), []
    whole = hosting.mlp_bytes(params.layers[0].mlp)

    def made_up(program, *arguments, **static):
        compiled.append(program)
        return int((2 + step) * whole) if program is streamed_verification.draft_next else 0

    monkeypatch.setattr(budgeting, "temporary_bytes", made_up)
    request = make_request(params, PROMPT, ci.CoreConfig(beta=0.9), {"max_new_tokens": 12, "lossless": True})
    plan = plan_request(request, 1)
    budget = plan.phase_bytes("prefill") + whole
    compiled.clear()
    told = refusal_of(request, replace(plan, budget=budget))
    assert 1 <= compiled.count(streamed_verification.draft_next) <= most
    found = re.search(r"beta=([\d.]+) fits", told)
    assert (found is None) == (step > 1)
    if found is not None:
        ratio = float(found[1])
        fitting, more = (plan_of(params, ci.CoreConfig(beta=r), lossless=True).needed for r in (ratio, ratio + 0.01))
        assert fitting <= budget < more


def test_leaving_out_lossless_is_named_where_it_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budgeting, "temporary_bytes", lambda *arguments, **static: 0)  # compiles nothing
    params = with_mlps_on_host(random_model(replace(OPT, **SIZES)))
    core = ci.CoreConfig(beta=0.7)
    request = make_request(params, PROMPT, core, {"max_new_tokens": 12, "lossless": True})
    plan, budget = plan_request(request, 1), plan_of(params, core).needed
    assert budget < plan.needed
    assert refusal_of(request, replace(plan, budget=budget)).endswith("; or leave out lossless")
    for too_small in (budget - 1, plan.phase_bytes("prefill") - 1):
        assert "leave out" not in refusal_of(request, replace(plan, budget=too_small))


def test_more_tokens_than_a_budget_has_room_for_are_refused() -> None:
    params = with_mlps_on_host(random_model(replace(OPT, **SIZES)))
    plan = plan_of(params, CORE)
    with pytest.raises(ci.CoreInferError, match=r"device_memory=\d+ .*: this call needs"):
        ci.generate(params, PROMPT, CORE, max_new_tokens=110, device_memory=plan.needed)
    ci.generate(params, PROMPT, CORE, max_new_tokens=12, device_memory=plan.needed)


def test_rows_stay_where_there_is_room_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    params = with_mlps_on_host(random_model(replace(OPT, **SIZES)))
    plan = plan_of(params, CORE)
    first = ci.generate(params, PROMPT, CORE, max_new_tokens=12)
    roomy = plan.phase_bytes("prefill") + plan.per_set
    again = ci.generate(params, PROMPT, CORE, max_new_tokens=12, device_memory=roomy, device_rows=first.device_rows)
    assert again.stats.moved_bytes < first.stats.moved_bytes
    tight = ci.generate(
        params, PROMPT, CORE, max_new_tokens=12, device_memory=plan.needed, device_rows=again.device_rows
    )
    assert tight.stats.moved_bytes == first.stats.moved_bytes
    np.testing.assert_array_equal(tight.tokens, first.tokens)


@pytest.mark.parametrize(("before", "new"), [(12, 60), (80, 4)], ids=["outgrown", "larger"])
def test_a_later_turn_is_planned_with_the_cache_that_it_finds(
    before: int, new: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = with_mlps_on_host(random_model(replace(OPT, **SIZES)))
    chunk, first = next(iter(ci.converse(params, PROMPT[0], None, CORE, max_new_tokens=before)))
    longer = [*PROMPT[0], *chunk.tokens[0].tolist(), 5, 6]
    assert (first.past.cache.capacity, bucket(len(longer) + new)) == ((64, 128) if before < new else (128, 64))
    plan = plan_request(make_request(params, [longer], CORE, {"max_new_tokens": new}, first.past), 2**30)
    watch = Watch(params, monkeypatch, first.past)
    *_, (_, last) = ci.converse(params, longer, first, CORE, max_new_tokens=new)
    assert last.past.cache.capacity == 128
    assert all(array.is_deleted() for array in first.past.cache.keys)
    for phase in ("prefill", "decode"):
        assert watch.most[phase] == pytest.approx(plan.phase_bytes(phase), rel=0.01)


@pytest.mark.parametrize("why", ["other-tokens", "long-rope"])
def test_a_conversation_that_is_read_anew_leaves_its_memory(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    factors = {"short_factors": (1.0,) * 16, "long_factors": (2.0,) * 16}
    rope = Rope(scaling="longrope", original_max_positions=64, **factors)
    params = with_mlps_on_host(random_model(replace(LLAMA, **SIZES, rope=rope)))
    chunk, first = next(iter(ci.converse(params, PROMPT[0], None, CORE, max_new_tokens=12)))
    goes_on = [*PROMPT[0], *chunk.tokens[0].tolist(), 5]
    tokens, new = (goes_on, 60) if why == "long-rope" else (PROMPT[0][::-1], 4)
    plan = plan_request(make_request(params, [tokens], CORE, {"max_new_tokens": new}), 2**30)
    with pytest.raises(ci.CoreInferError, match="this call needs"):
        ci.converse(params, tokens, first, CORE, max_new_tokens=new, device_memory=plan.needed // 2)
    assert first.past.is_alive
    watch = Watch(params, monkeypatch, first.past)
    chunks = list(ci.converse(params, tokens, first, CORE, max_new_tokens=new, device_memory="1GiB"))
    assert chunks[-1][0].stats.cached_tokens == (0,)
    for phase in ("prefill", "decode"):
        assert watch.most[phase] == pytest.approx(plan.phase_bytes(phase), rel=0.01)
    with pytest.raises(ci.CoreInferError, match="another turn has gone on from it"):
        ci.converse(params, goes_on, first, CORE, max_new_tokens=4)


def test_a_cache_that_grows_is_planned_before_any_mlp_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """With arrays of the cache so large that no later moment of the prefill takes as much."""
    config = replace(OPT, **{**SIZES, "mlp_size": 32}, num_layers=1, max_positions=2048)
    params = with_mlps_on_host(random_model(config))
    chunk, first = next(iter(ci.converse(params, PROMPT[0], None, None, max_new_tokens=900)))
    longer = [*PROMPT[0], *chunk.tokens[0].tolist(), 5, 6]
    plan = plan_request(make_request(params, [longer], None, {"max_new_tokens": 1100}, first.past), 2**30)
    grown, watch = cache._grown, Watch(params, monkeypatch, first.past)

    def watched(array, capacity):
        made = grown(array, capacity)
        watch.look("prefill", 0)
        return made

    monkeypatch.setattr(cache, "_grown", watched)
    next(iter(ci.converse(params, longer, first, None, max_new_tokens=1100)))
    assert watch.most["prefill"] == pytest.approx(plan.phase_bytes("prefill"), rel=0.01)


def test_an_outgrown_cache_goes_as_its_successor_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    params = with_mlps_on_host(random_model(replace(OPT, **SIZES)))
    before = cache.init_cache(params.config, 1, 64, params.dtype)
    grown, seen = cache._grown, []

    def watched(array, capacity):
        made = grown(array, capacity)
        seen.append(sum(one.nbytes for one in jax.live_arrays() if one.ndim == 4) - others)
        return made

    others = sum(one.nbytes for one in jax.live_arrays() if one.ndim == 4) - sum(
        a.nbytes for a in jax.tree.leaves(before)
    )
    monkeypatch.setattr(cache, "_grown", watched)
    after = cache.with_capacity(before, 128)
    one = after.keys[0].nbytes
    assert max(seen) == 2 * len(after.keys) * one + one // 2


def test_a_conversation_goes_on_within_a_tight_budget() -> None:
    params = with_mlps_on_host(random_model(replace(OPT, **SIZES)))
    needed = plan_of(params, CORE).needed
    *_, (chunk, first) = ci.converse(params, PROMPT[0], None, CORE, max_new_tokens=4, device_memory=needed)
    longer = [*PROMPT[0], *chunk.tokens[0].tolist(), 5, 6]
    *_, (again, _) = ci.converse(params, longer, first, CORE, max_new_tokens=4, device_memory=needed)
    assert again.stats.decode_steps > 0
    assert not first.past.is_alive


def test_a_budget_is_of_models_on_the_host() -> None:
    with pytest.raises(ci.CoreInferError, match="load with mlps_on_host=True"):
        ci.generate(random_model(OPT), PROMPT, None, max_new_tokens=9, device_memory="1GiB")


@pytest.mark.parametrize(
    ("text", "size"), [("12GiB", 12 * 2**30), ("800 MB", 8 * 10**8), ("0.5kib", 512), ("7", 7), (9, 9), ("3B", 3)]
)
def test_bytes_are_numbers_or_text(text: object, size: int) -> None:
    assert parse_bytes("device_memory", text) == size


@pytest.mark.parametrize("text", ["", "much", "-1", "0", "12 parsecs", 400 * "9", True, None, 1.5e300, "1e3"])
def test_other_bytes_are_refused(text: object) -> None:
    with pytest.raises(ci.CoreInferError, match=r"device_memory=.*: give bytes"):
        parse_bytes("device_memory", text)


@pytest.mark.usefixtures("drafts_always")
def test_the_command_plans_before_it_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(write_shallow("opt", tmp_path))
    core = ["--beta", "0.4", "--max-new-tokens", "8"]
    assert main(["plan", model, "--device-memory", "64MiB", "--prompt-tokens", "20", *core]) == 0
    told = capsys.readouterr().out
    assert "two MLPs on their way" in told
    assert re.search(r"together +[\d.]+ MiB +[\d.]+ MiB +[\d.]+ MiB", told)
    assert main(["plan", model, "--device-memory", "1MiB", "--prompt-tokens", "20", *core]) == 2
    assert "this call needs" in capsys.readouterr().err
    once = ["generate", "Once upon a time", "--model", model, *core]
    assert main(once) == 0
    text = capsys.readouterr().out
    assert main([*once, "--device-memory", "64MiB"]) == 0
    streamed_too = capsys.readouterr()
    assert streamed_too.out == text
    assert streamed_too.err.startswith("on the device")
    # The full model's text, by a plan that says so.
    assert main(["plan", model, "--device-memory", "64MiB", "--prompt-tokens", "20", *core, "--lossless"]) == 0
    assert re.search(
        r"Lossless, each pass of the full model moves .*, and makes 1 to 4 tokens", capsys.readouterr().out
    )
    assert main([*once[:4], "--max-new-tokens", "8", "--method", "dense"]) == 0
    full = capsys.readouterr().out
    assert main([*once, "--device-memory", "64MiB", "--lossless"]) == 0
    drafted = capsys.readouterr()
    assert drafted.out == full
    assert re.search(r"lossless: [1-9]\d* of", drafted.err)


def test_a_planned_command_says_what_it_says_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_shallow("opt", tmp_path)
    (model / "generation_config.json").write_text('{"do_sample": true, "typical_p": 0.9, "eos_token_id": 2}')
    loaded, load_tokenizer = [], loading.load_tokenizer
    monkeypatch.setattr(loading, "load_tokenizer", lambda path: loaded.append(path) or load_tokenizer(path))
    once = ["generate", "Once upon a time", "--model", str(model), "--beta", "0.4", "--max-new-tokens", "8"]
    said = []
    for options in ([], ["--device-memory", "64MiB"]):
        assert main([*once, *options]) == 0
        said.append(capsys.readouterr().err.splitlines())
    plan = [line for line in said[1] if not line.startswith("[")]
    assert len(said[1]) == len(said[0]) + len(plan)
    assert [line.partition("; prefill")[0] for line in said[1] if line.startswith("[")] == [
        line.partition("; prefill")[0] for line in said[0]
    ]
    assert sum("not honoured" in line for line in said[1]) == 1
    assert len(loaded) == 2  # once per command


def test_chat_plans_its_first_turn_before_it_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, typed = str(write_shallow("opt", tmp_path)), iter(["Once upon a time"])
    events: list[str] = []
    load_params = loading.load_params

    def typing(prompt: str = "") -> str:
        events.append("asked")
        if (line := next(typed, None)) is None:
            raise EOFError
        return line

    def loads(*arguments, **settings):
        events.append("loaded" if "together" in capsys.readouterr().err else "loaded without a plan")
        return load_params(*arguments, **settings)

    monkeypatch.setattr("builtins.input", typing)
    monkeypatch.setattr(cli_arguments, "load_params", loads)
    chat = ["chat", "--model", model, "--beta", "0.4", "--max-new-tokens", "8", "--device-memory"]
    assert main([*chat, "1MiB"]) == 2
    assert "this call needs" in capsys.readouterr().err
    assert events == []
    assert main([*chat, "64MiB"]) == 0
    assert events == ["loaded", "asked", "asked"]
    told = capsys.readouterr()
    assert told.out.strip()
    assert "together" not in told.err  # the plan is told once


def test_a_gpus_allocator_is_capped_before_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    monkeypatch.setattr(device, "_nvidia_bytes", lambda: None)
    device.cap_allocator(2**30)
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION" not in device.os.environ
    monkeypatch.setattr(device, "_nvidia_bytes", lambda: 2**33)
    device.cap_allocator(2**30)
    assert float(device.os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"]) == 0.125
    device.cap_allocator(2**31)  # what is set stays
    assert float(device.os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"]) == 0.125


# 1.1 GB of weights in a process that may have 1 GiB: loaded as a whole, they are refused by the system.
LARGE = replace(
    LLAMA, vocab_size=1000, hidden_size=1024, embed_size=1024, mlp_size=4096, num_layers=20, num_heads=16, head_size=64
)
LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_DATA, (2**30, 2**30))
import coreinfer_jax as ci
params, _ = ci.load(sys.argv[1], "float32", mlps_on_host=sys.argv[2] == "host")
out = ci.generate(params, [list(range(3, 90))], ci.CoreConfig(beta=0.1), max_new_tokens=4)
print(out.stats.moved_bytes)
"""


@pytest.mark.slow
def test_a_model_larger_than_memory_runs(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).normal(size=1 << 22).astype(np.float32) * 0.02
    shapes = leaf_shapes(LARGE).items()
    leaves = ((name, np.resize(noise, shape) + np.float32(name.endswith("norm.scale"))) for name, shape in shapes)
    write_native(tmp_path, LARGE, np.dtype("float32"), leaves)

    def run(where: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", LIMITED, str(tmp_path), where]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    ran = run("host")
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert int(ran.stdout) > 20 * 3 * 4096 * 1024 * 4  # all MLPs, and the neurons that were kept
    assert run("device").returncode != 0
