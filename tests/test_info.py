"""`coreinfer info` against the files' sizes, transformers' configs and counts made by hand."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open

import coreinfer_jax as ci
from coreinfer_jax.cli import main
from coreinfer_jax.io.summary import summarise
from coreinfer_jax.model.fingerprint import fingerprint


@pytest.fixture
def info(capsys):
    """The object that `coreinfer info --json` prints."""

    def info(*arguments: object) -> dict:
        capsys.readouterr()
        assert main(["info", *map(str, arguments), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return info


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_parameters_and_bytes_are_those_of_the_file(info, name: str) -> None:
    facts = info(f"embedded:{name}")
    file = Path(ci.__file__).parent / "assets" / name / "model.safetensors"
    with safe_open(file, framework="numpy") as stored:
        sizes = {key: stored.get_slice(key).get_shape() for key in stored.keys()}  # noqa: SIM118
    values = sum(shape[0] * (shape[1] if len(shape) == 2 else 1) for shape in sizes.values())
    assert facts["parameters"] == values
    parts = dict.fromkeys(("embeddings", "attention", "mlp", "norms"), 0)
    for key, shape in sizes.items():
        kinds = {"norm": "norms", "self_attn": "attention", "fc": "mlp", "mlp": "mlp", "embed": "embeddings"}
        kind = next(part for mark, part in kinds.items() if mark in key)
        parts[kind] += 2 * shape[0] * (shape[1] if len(shape) == 2 else 1)
    assert facts["bytes_per_part"] == parts
    assert facts["dtype"] == "bfloat16"


def test_bytes_read_per_token(info) -> None:
    config = ci.load("embedded:opt")[0].config
    D, F, L, V = config.hidden_size, config.mlp_size, config.num_layers, config.vocab_size
    facts = info("embedded:opt", "--beta", 0.25)
    K = F // 4
    attention, norms = L * (4 * D * D + 4 * D), (2 * L + 1) * 2 * D
    outside = V * D + D + attention + norms  # the tied table is read whole, one row of positions
    assert facts["kept_neurons"] == K
    assert facts["bytes_per_token"] == 2 * (outside + L * (2 * D * F + F + D))
    assert facts["core_bytes_per_token"] == 2 * (outside + L * (2 * D * K + K + D))
    assert facts["cache_bytes_per_position"] == 2 * 2 * L * D


def test_the_same_weights_have_one_fingerprint(tmp_path: Path) -> None:
    converted = ci.convert("embedded:opt", tmp_path / "wide", "float32")
    params, _ = ci.load("embedded:opt", "float32")
    prints = {summarise("embedded:opt", 0.4).fingerprint, summarise(converted, 0.4).fingerprint, fingerprint(params)}
    assert len(prints) == 1
    changed = params.layers[-1].replace(attention=params.layers[0].attention)
    assert fingerprint(params.replace(layers=(*params.layers[:-1], changed))) not in prints
    assert summarise("embedded:llama", 0.4).fingerprint not in prints


def test_lines_for_people(capsys) -> None:
    assert main(["info", "embedded:llama"]) == 0
    lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    facts = {name: value.strip() for name, value in lines.items()}
    assert facts["family"] == "llama, silu"
    assert facts["positions"] == "1024, rotary"
    assert "tokenizer.model" in facts["tokenizer"]
    assert set(facts) >= {"parameters", "dtype", "bytes", "read per token", "KV cache", "fingerprint"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "no such directory"),
        (["embedded:gpt"], "no such embedded model; there are embedded:llama, embedded:opt"),
        (["embedded:opt", "--beta", "0"], "beta=0"),
    ],
)
def test_mistakes(capsys, arguments: list[str], message: str) -> None:
    assert main(["info", *arguments]) == 2
    assert message in capsys.readouterr().err
