"""The bytes and kernels of a loop, read from a program's text whose figures were counted by hand."""

import jax
import pytest

from benchmarks import compiled, described
from benchmarks.__main__ import main
from benchmarks.hlo import Kernel, array_bytes, loop_kernels

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


@pytest.mark.parametrize(
    ("shape", "size"), [("bf16[2,3]{1,0}", 12), ("(f32[], s8[5]{0}, pred[2])", 11), ("s64[]", 8), ("token[]", 0)]
)
def test_bytes_of_shapes(shape, size):
    assert array_bytes(shape) == size


def test_what_a_device_that_is_here_compiles_moves_what_it_needs(monkeypatch):
    """The CPU stands in for a described device; it copies weights to float32, so more may move than is needed."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    monkeypatch.setattr(compiled, "placed_on", lambda name: here)
    monkeypatch.setitem(described.DEVICES, "h100", described.Described("cpu", 1e9, ""))
    asked = compiled.Asked("h100", "opt-125m", layers=1, keeps=(0.25,), prompt_tokens=64, capacity=128)
    dense, narrowed, plain, choosing = compiled.measure(asked)
    assert (dense["keep"], narrowed["keep"]) == (None, 0.25)
    for result in (dense, narrowed):
        assert result["bytes_needed"] <= result["bytes_moved"]
        assert result["bound_seconds"] > result["bytes_moved"] / 1e9
    # Three quarters of 3072 neurons, 2 x 768 weights each, in 16 bits.
    assert dense["bytes_needed"] - narrowed["bytes_needed"] == pytest.approx(2304 * 2 * 768 * 2, rel=0.01)
    assert min(plain["temporary_bytes"], choosing["temporary_bytes"]) > 0


def test_a_missing_plugin_is_one_line(monkeypatch, tmp_path, capsys):
    def refuses(**_):
        raise RuntimeError("no such platform\nand a long tale")

    monkeypatch.setattr(described.topologies, "get_topology_desc", refuses)
    out = tmp_path / "out.jsonl"
    assert main(["compile", "--device", "h200", "--model", "opt-125m", "--layers", "1", "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("benchmarks: --device h200: JAX cannot compile for it here (no such platform); pip install")
    assert error.count("\n") == 1
