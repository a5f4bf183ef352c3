"""The bytes and kernels of a loop, read from a program's text whose figures were counted by hand."""

import jax
import pytest

from benchmarks import compiled, described
from benchmarks.__main__ import main
from benchmarks.hlo import Kernel, all_kernels, array_bytes, loop_kernels, main_memory_bytes

PROGRAM = """HloModule jit_decode

%gathered (p.0: bf16[1000,8], p.1: s32[4]) -> f32[4,8] {
  %p.0 = bf16[1000,8]{1,0} parameter(0)
  %p.1 = s32[4]{0} parameter(1)
  %rows = bf16[4,8]{1,0} gather(%p.0, %p.1), offset_dims={1}
  ROOT %wide = f32[4,8]{1,0} convert(%rows)
}

%written (p.2: bf16[1,64,8], p.3: bf16[1,1,8], p.4: s32[]) -> bf16[1,64,8] {
  %p.2 = bf16[1,64,8]{2,1,0} parameter(0)
  %p.3 = bf16[1,1,8]{2,1,0} parameter(1)
  %p.4 = s32[] parameter(2)
  ROOT %updated = bf16[1,64,8]{2,1,0} dynamic-update-slice(%p.2, %p.3, %p.4, %p.4, %p.4)
}

%widened (p.5: bf16[1024,1024]) -> f32[1024,1024] {
  %p.5 = bf16[1024,1024]{1,0} parameter(0)
  ROOT %whole = f32[1024,1024]{1,0} convert(%p.5)
}

%body (state: (s32[], bf16[1,64,8], bf16[1000,8], bf16[1024,1024])) -> (s32[], bf16[1,64,8]) {
  %state = (s32[], bf16[1,64,8]{2,1,0}, bf16[1000,8]{1,0}, bf16[1024,1024]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %cache = bf16[1,64,8]{2,1,0} get-tuple-element(%state), index=1
  %table = bf16[1000,8]{1,0} get-tuple-element(%state), index=2
  %weight = bf16[1024,1024]{1,0} get-tuple-element(%state), index=3
  %ids = s32[4]{0} broadcast(%i), dimensions={}
  %looked_up = f32[4,8]{1,0} fusion(%table, %ids), kind=kLoop, calls=%gathered, metadata={op_name="jit(decode)/embed"}
  %new = bf16[1,1,8]{2,1,0} reduce(%looked_up, %i), dimensions={0}
  %kept = bf16[1,64,8]{2,1,0} fusion(%cache, %new, %i), kind=kLoop, calls=%written
  %float = f32[1024,1024]{1,0} fusion(%weight), kind=kLoop, calls=%widened
  ROOT %next = (s32[], bf16[1,64,8]{2,1,0}) tuple(%i, %kept)
}

%condition (state: (s32[], bf16[1,64,8])) -> pred[] {
  %state.1 = (s32[], bf16[1,64,8]{2,1,0}) parameter(0)
  ROOT %more = pred[] constant(true)
}

ENTRY %main (first: (s32[], bf16[1,64,8])) -> (s32[], bf16[1,64,8]) {
  %first = (s32[], bf16[1,64,8]{2,1,0}) parameter(0)
  ROOT %loop = (s32[], bf16[1,64,8]{2,1,0}) while(%first), condition=%condition, body=%body
}
"""


def test_a_loop_is_counted_kernel_by_kernel():
    mebi = 1024 * 1024
    assert loop_kernels(PROGRAM) == [
        Kernel("ids", read=4, written=16, source="", copies=False),
        # Four rows of the table, not all of it.
        Kernel("looked_up", read=4 * 16 + 16, written=128, source="jit(decode)/embed", copies=False),
        Kernel("new", read=128 + 4, written=16, source="", copies=False),
        # The cache is updated in place: one position.
        Kernel("kept", read=16 + 4, written=16, source="", copies=False),
        Kernel("float", read=2 * mebi, written=4 * mebi, source="", copies=True),
    ]


TPU_PROGRAM = """HloModule jit_decode, is_scheduled=true

%summed (p.0: bf16[512,1024], p.1: f32[1024]) -> f32[512] {
  %p.0 = bf16[512,1024]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %p.1 = f32[1024]{0:T(1024)} parameter(1)
  ROOT %sums = f32[512]{0:T(512)S(1)} reduce(%p.0, %p.1), dimensions={1}
}

%looked_up (p.2: bf16[1000,8], p.3: s32[]) -> f32[] {
  %p.3 = s32[]{:T(128)} parameter(1)
  %p.2 = bf16[1000,8]{1,0:T(8,128)(2,1)} parameter(0)
  %row = bf16[1,8]{1,0:T(2,128)(2,1)} dynamic-slice(%p.2, %p.3, %p.3), dynamic_slice_sizes={1,8}
  ROOT %total = f32[]{:T(128)} reduce(%row, %p.3), dimensions={0,1}
}

%nested (p.4: s32[], p.5: bf16[1000,8]) -> f32[] {
  %p.4 = s32[]{:T(128)} parameter(0)
  %p.5 = bf16[1000,8]{1,0:T(8,128)(2,1)} parameter(1)
  ROOT %inner = f32[]{:T(128)} fusion(%p.5, %p.4), kind=kLoop, calls=%looked_up
}

%written (p.6: bf16[8,64,8], p.7: bf16[8,1,8], p.8: s32[]) -> bf16[8,64,8] {
  %p.6 = bf16[8,64,8]{2,0,1:T(8,128)(2,1)} parameter(0)
  %p.7 = bf16[8,1,8]{2,1,0:T(8,128)(2,1)S(1)} parameter(1)
  %p.8 = s32[]{:T(128)} parameter(2)
  ROOT %updated = bf16[8,64,8]{2,0,1:T(8,128)(2,1)} dynamic-update-slice(%p.6, %p.7, %p.8, %p.8, %p.8)
}

%turn (t: (s32[], f32[512])) -> (s32[], f32[512]) {
  %t = (s32[]{:T(128)}, f32[512]{0:T(512)}) parameter(0)
  %t.0 = s32[]{:T(128)} get-tuple-element(%t), index=0
  %t.1 = f32[512]{0:T(512)} get-tuple-element(%t), index=1
  %halved = f32[512]{0:T(512)} multiply(%t.1, %t.1)
  ROOT %turned = (s32[]{:T(128)}, f32[512]{0:T(512)}) tuple(%t.0, %halved)
}

%again (t: (s32[], f32[512])) -> pred[] {
  %t.2 = (s32[]{:T(128)}, f32[512]{0:T(512)}) parameter(0)
  ROOT %more.1 = pred[]{:T(512)} constant(true)
}

%body (state: (s32[], bf16[512,1024], bf16[1024,1024], bf16[1000,8], bf16[8,64,8])) -> (s32[], bf16[8,64,8]) {
  %state = (s32[]{:T(128)}, bf16[512,1024]{1,0:T(8,128)(2,1)}, bf16[8,64,8]{2,0,1:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  %weight = bf16[512,1024]{1,0:T(8,128)(2,1)} get-tuple-element(%state), index=1
  %wide = bf16[1024,1024]{1,0:T(8,128)(2,1)} get-tuple-element(%state), index=2
  %table = bf16[1000,8]{1,0:T(8,128)(2,1)} get-tuple-element(%state), index=3
  %cache = bf16[8,64,8]{2,0,1:T(8,128)(2,1)} get-tuple-element(%state), index=4
  %x = f32[1024]{0:T(1024)} get-tuple-element(%state), index=5
  %next.1 = s32[]{:T(128)S(6)} add(%i, %i)
  %fetch = (bf16[512,1024]{1,0:T(8,128)(2,1)S(1)}, bf16[512,1024]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%weight)
  %embedded = f32[]{:T(128)} fusion(%i, %table), kind=kLoop, calls=%nested
  %part.0 = ((bf16[1024,1024]{1,0}), bf16[512,1024]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%wide), slice={[0:512]}
  %part.1 = ((bf16[1024,1024]{1,0}), bf16[512,1024]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%wide), slice={[512:1024]}
  %fetched = bf16[512,1024]{1,0:T(8,128)(2,1)S(1)} copy-done(%fetch)
  %product = f32[512]{0:T(512)S(1)} fusion(%fetched, %x), kind=kLoop, calls=%summed, metadata={op_name="jit(decode)/up"}
  %done.0 = bf16[512,1024]{1,0:T(8,128)(2,1)S(1)} slice-done(%part.0)
  %done.1 = bf16[512,1024]{1,0:T(8,128)(2,1)S(1)} slice-done(%part.1)
  %whole = bf16[1024,1024]{1,0:T(8,128)(2,1)S(1)} custom-call(%done.0, %done.1), custom_call_target="ConcatBitcast"
  %new = bf16[8,1,8]{2,1,0:T(8,128)(2,1)S(1)} reduce(%whole, %product), dimensions={0}
  %kept = bf16[8,64,8]{2,0,1:T(8,128)(2,1)} fusion(%cache, %new, %i), kind=kCustom, calls=%written
  %moved = (bf16[1024,1024]{0,1:T(8,128)(2,1)}, bf16[1024,1024]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%wide)
  %was_moved = bf16[1024,1024]{0,1:T(8,128)(2,1)} copy-done(%moved)
  %left = (f32[512]{0:T(512)}, f32[512]{0:T(512)S(1)}, u32[]{:S(2)}) copy-start(%product)
  %has_left = f32[512]{0:T(512)} copy-done(%left)
  %pair = (s32[]{:T(128)}, f32[512]{0:T(512)}) tuple(%i, %has_left)
  %small = (s32[], f32[512]) while(%pair), condition=%again, body=%turn, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %next = (s32[]{:T(128)}, bf16[8,64,8]{2,0,1:T(8,128)(2,1)}) tuple(%next.1, %kept)
}

%condition (state: (s32[], bf16[8,64,8])) -> pred[] {
  %state.1 = (s32[]{:T(128)}, bf16[8,64,8]{2,0,1:T(8,128)(2,1)}) parameter(0)
  ROOT %more = pred[]{:T(512)} constant(true)
}

ENTRY %main (first: (s32[], bf16[8,64,8]), large: f32[1024]) -> (s32[], bf16[8,64,8]) {
  %first = (s32[]{:T(128)}, bf16[8,64,8]{2,0,1:T(8,128)(2,1)}) parameter(0)
  %large = f32[1024]{0:T(1024)} parameter(1)
  %before = f32[1024]{0:T(1024)S(1)} copy(%large)
  ROOT %loop = (s32[]{:T(128)}, bf16[8,64,8]{2,0,1:T(8,128)(2,1)}) while(%first), condition=%condition, body=%body
}
"""
MEBI = 1024 * 1024
IN_THE_LOOP_OF_A_TPU = [
    Kernel("next.1", read=4, written=0, source="", copies=False),
    # A weight is read by what fetches it, and not again by the product.
    Kernel("fetch", read=MEBI, written=0, source="", copies=False, is_transfer=True),
    # One row of the table, through two fusions, and its number.
    Kernel("embedded", read=16 + 4, written=4, source="", copies=False),
    Kernel("part.0", read=MEBI, written=0, source="", copies=False, is_transfer=True),
    Kernel("part.1", read=MEBI, written=0, source="", copies=False, is_transfer=True),
    Kernel("product", read=4096, written=0, source="jit(decode)/up", copies=False),
    Kernel("new", read=0, written=0, source="", copies=False),
    # One position of the cache, which lies in main memory; what is written lies on the chip.
    Kernel("kept", read=4, written=128, source="", copies=False),
    # From main memory to main memory.
    Kernel("moved", read=2 * MEBI, written=2 * MEBI, source="", copies=True, is_transfer=True),
    Kernel("left", read=0, written=2048, source="", copies=False, is_transfer=True),
    *[Kernel("halved", read=2048, written=2048, source="", copies=False)] * 3,
]


def test_on_a_tpu_main_memory_alone_counts():
    assert loop_kernels(TPU_PROGRAM) == IN_THE_LOOP_OF_A_TPU


def test_a_whole_program_is_counted_with_one_turn_of_a_loop():
    before = Kernel("before", read=4096, written=0, source="", copies=False)
    assert all_kernels(TPU_PROGRAM) == [before, *IN_THE_LOOP_OF_A_TPU]


@pytest.mark.parametrize(
    ("shape", "size"),
    [("bf16[2,3]{1,0:T(8,128)(2,1)}", 12), ("f32[4]{0:T(128)S(1)}", 0), ("(s32[]{:S(6)}, s32[]{:T(128)})", 4)],
)
def test_bytes_of_shapes_in_main_memory(shape, size):
    assert main_memory_bytes(shape) == size


@pytest.mark.parametrize(
    ("shape", "size"), [("bf16[2,3]{1,0}", 12), ("(f32[], s8[5]{0}, pred[2])", 11), ("s64[]", 8), ("token[]", 0)]
)
def test_bytes_of_shapes(shape, size):
    assert array_bytes(shape) == size


def test_what_a_device_that_is_here_compiles_moves_what_it_needs(monkeypatch):
    """The CPU stands in for a described device; it copies weights to float32, so more may move than is needed."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    monkeypatch.setattr(compiled, "placed_on", lambda name: here)
    monkeypatch.setitem(described.DEVICES, "h100", described.Described("cpu", 1e9, 1e-6, {}))
    asked = compiled.Asked("h100", "opt-125m", layers=1, keeps=(None, 0.25), prompt_tokens=64, capacity=128)
    dense, narrowed, plain, choosing, selection, gather = compiled.measure(asked)
    assert [result["keep"] for result in (dense, narrowed, plain, choosing)] == [None, 0.25] * 2
    for result in (dense, narrowed, plain, choosing, selection, gather):
        assert result["bytes_needed"] <= result["bytes_moved"]
        assert result["bound_seconds"] > result["bytes_moved"] / 1e9
    # Three quarters of 3072 neurons, 2 x 768 weights each, in 16 bits.
    assert dense["bytes_needed"] - narrowed["bytes_needed"] == pytest.approx(2304 * 2 * 768 * 2, rel=0.01)
    # A quarter, read and written.
    assert gather["bytes_needed"] == pytest.approx(2 * 768 * 2 * 768 * 2, rel=0.01)
    assert min(plain["temporary_bytes"], choosing["temporary_bytes"]) > 0


def test_a_missing_plugin_is_one_line(monkeypatch, tmp_path, capsys):
    def refuses(**_):
        raise RuntimeError("no such platform\nand a long tale")

    monkeypatch.setattr(described.topologies, "get_topology_desc", refuses)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)  # it is for a whole process
    out = tmp_path / "out.jsonl"
    assert main(["compile", "--device", "h200", "--model", "opt-125m", "--layers", "1", "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("benchmarks: --device h200: JAX cannot compile for it here (no such platform); pip install")
    assert error.count("\n") == 1
