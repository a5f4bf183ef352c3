"""Batches, choosers, conversion and export of every family with rotary positions, against transformers."""

import re
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import coreinfer_jax as ci
from coreinfer_jax.cli import main
from coreinfer_jax.engine.generation import make_request
from coreinfer_jax.engine.loop import begin
from coreinfer_jax.engine.running import insert_request, start
from coreinfer_jax.io import mapping
from coreinfer_jax.io.export import write_hugging_face
from coreinfer_jax.lab.evaluation.measure import measure
from coreinfer_jax.model.families import family_of
from coreinfer_jax.model.fingerprint import fingerprint
from coreinfer_jax.model.layers import rms_normed
from tests.support import half_slow, one_quick_in, with_mlps_on_host
from tests.test_parity import FAMILIES, TOLERANCE, as_family, assert_same_until_a_tie, random_reference

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

# One variant of each, the one whose layers differ most.
CHOSEN = {family: next(iter(variants.values())) for family, variants in FAMILIES.items() if family != "OPT"}
NEW = 20  # as the parity tests make, which compile the same programs
CHOOSERS = {
    "stability": ci.CoreConfig(beta=0.5, compensation=0.0),
    "similarity": ci.Similarity(gamma=0.5),
    "fused": ci.Fused(beta=0.5),
    "auto": ci.Auto(beta=0.5, gamma=0.5),
}


@cache
def pair(family: str) -> tuple[object, ci.Params]:
    """A random model of transformers, and what is loaded of its checkpoint."""
    with TemporaryDirectory() as directory:
        reference = random_reference(family, CHOSEN[family], Path(directory))
        return reference, ci.load(directory, "float32")[0]


def prompt(length: int) -> list[int]:
    return np.random.default_rng(length).integers(3, 99, length).tolist()


def greedy(model, tokens: list[int]) -> np.ndarray:
    """`tokens` and the most probable ones after them, [1, T + NEW]."""
    with torch.no_grad():
        whole = model.generate(
            torch.tensor([tokens]), max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    return whole.numpy()


@pytest.mark.parametrize("family", [*one_quick_in(2, tuple(CHOSEN)[1:]), pytest.param("Llama", marks=pytest.mark.slow)])
def test_rows_of_unequal_length_make_the_tokens_of_transformers(family: str) -> None:
    model, params = pair(family)
    prompts = [prompt(length) for length in (23, 5)]
    out = ci.generate(params, prompts, core=None, max_new_tokens=NEW)
    for row, tokens in zip(out.tokens, prompts, strict=True):
        assert_same_until_a_tie(model, row[None], greedy(model, tokens), prompt=len(tokens))


@pytest.mark.parametrize(
    "family", [f if i == 0 else pytest.param(f, marks=pytest.mark.slow) for i, f in enumerate(CHOSEN)]
)
def test_lossless_rows_make_the_tokens_of_the_full_model(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Every pass verifies a draft, whatever that costs.
    monkeypatch.setattr("coreinfer_jax.engine.lossless.BEST", 2)
    _, params = pair(family)
    prompts = [prompt(length) for length in (23, 5)]
    out = ci.generate(params, prompts, CHOOSERS["stability"], max_new_tokens=NEW, lossless=True)
    np.testing.assert_array_equal(out.tokens, ci.generate(params, prompts, None, max_new_tokens=NEW).tokens)
    assert out.stats.drafting is not None


def test_phi3_beyond_its_first_context_rotates_by_the_long_factors() -> None:
    model, params = pair("Phi3")
    tokens = prompt(80)
    with torch.no_grad():
        expected = model(torch.tensor([tokens])).logits.numpy()
    np.testing.assert_allclose(np.asarray(ci.forward(params, [tokens])), expected, rtol=0, atol=TOLERANCE)
    out = ci.generate(params, [tokens], core=None, max_new_tokens=NEW)
    assert_same_until_a_tie(model, out.tokens, greedy(model, tokens), prompt=len(tokens))
    # A conversation that gets there is read anew, which only a model without windows sees for long.
    params = params.replace(config=replace(params.config, windows=()))
    out = ci.generate(params, [tokens], core=None, max_new_tokens=NEW)
    *_, (_, conversation) = ci.converse(params, tokens[:50], None, core=None, max_new_tokens=4)
    said = [chunk.tokens[0] for chunk, _ in ci.converse(params, tokens, conversation, core=None, max_new_tokens=NEW)]
    assert np.concatenate(said).tolist() == out.tokens[0].tolist()
    begun = begin(make_request(params, [tokens[:50]], None, {"max_new_tokens": 4}))
    with pytest.raises(ci.CoreInferError, match="64 positions, the state 128, and beyond 64 this model rotates other"):
        insert_request(start(params, 2, 128), 0, begun)


@pytest.mark.parametrize("family", ["Gemma2", "Gemma3"])
def test_gemma_is_rounded_to_16_bits_where_transformers_rounds(family: str) -> None:
    model, params = pair(family)
    norm, config = model.model.layers[1].post_attention_layernorm, params.config
    x = torch.randn((2, 3, config.hidden_size), dtype=torch.bfloat16)
    narrow = jnp.asarray(x.float().numpy(), jnp.bfloat16)
    ours = rms_normed(narrow, params.layers[1].attention_out_norm, config)
    theirs = norm(x).detach().float().numpy()
    np.testing.assert_allclose(ours.astype(jnp.float32), theirs, rtol=2**-8)  # one rounding, of the product
    assert (np.asarray(ours, np.float32) == theirs).mean() > 0.99
    tokens = np.array([prompt(5)])
    with torch.no_grad():
        looked_up = deepcopy(model.model.embed_tokens).bfloat16()(torch.tensor(tokens)).float().numpy()
    half = params.replace(token_embedding=params.token_embedding.astype(jnp.bfloat16))
    embedded, _ = family_of(config).embed(half, jnp.asarray(tokens), jnp.arange(5)[None], 64)
    np.testing.assert_array_equal(embedded.astype(jnp.float32), looked_up)


@pytest.mark.parametrize(("rows", "found"), [(63, "value.weight has shape [15, 32]"), (65, "has shape [17, 32]")])
def test_a_joined_tensor_of_another_size_is_refused(rows: int, found: str, tmp_path: Path) -> None:
    model, _ = pair("Phi3")
    model.save_pretrained(tmp_path)
    tensors, name = load_file(tmp_path / "model.safetensors"), "model.layers.1.self_attn.qkv_proj.weight"
    assert len(tensors[name]) == 64
    tensors[name] = np.resize(tensors[name], (rows, 32))
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ci.CoreInferError, match=re.escape(found)):
        ci.load(tmp_path)


def groups_of(params: ci.Params, core, compacted: bool = True) -> ci.Groups:
    """Two groups by chance."""
    rng, (L, F) = np.random.default_rng(0), (params.config.num_layers, params.config.mlp_size)
    clusters = ci.Clusters(
        frequencies=rng.random((2, L, F)).astype(np.float32),
        centroids=rng.random((2, F)).astype(np.float32),
        names=("a", "b"),
        sizes=(1, 1),
        layer=1,
        vectors=ci.TextVectors(),
        origin="k-means",
        fingerprint=fingerprint(params),
    )
    return ci.prepare_groups(params, clusters, core, compacted=compacted)


def choices(every: int) -> list[object]:
    """Each family with each way of choosing; one of these is quick for every so many families."""
    return [
        pytest.param(family, chooser, marks=[] if quick else [pytest.mark.slow])
        for i, family in enumerate(CHOSEN)
        for j, chooser in enumerate(CHOOSERS)
        for quick in [(i + j) % len(CHOOSERS) == 0 and i % every == 0]
    ]


@pytest.mark.parametrize(("family", "chooser"), choices(every=2))
def test_core_neurons_decode_as_transformers_does_without_the_others(family: str, chooser: str) -> None:
    (model, params), core, tokens = pair(family), CHOOSERS[chooser], prompt(23)
    groups = None if chooser == "stability" else groups_of(params, core)
    out = ci.generate(params, [tokens], core, groups=groups, max_new_tokens=NEW)
    assert out.core.offsets == (None,) * params.config.num_layers
    hooks = [
        layer.mlp.down_proj.register_forward_pre_hook(only(out.core.row(0).layers[l]))
        for l, layer in enumerate(model.model.layers)
    ]
    try:
        expected = greedy(model, tokens)
    finally:
        for hook in hooks:
            hook.remove()
    assert out.tokens[0].tolist() == expected[0, len(tokens) :].tolist()


def only(kept: np.ndarray):
    """A hook by which the down projection reads single tokens, those that are decoded, of the neurons `kept` only."""

    def hook(module, inputs):
        [a] = inputs
        is_kept = torch.from_numpy(np.isin(np.arange(a.shape[2]), kept))
        return (torch.where(is_kept, a, 0.0),) if a.shape[1] == 1 else None

    return hook


# All ways of choosing are tried on the stand-ins of tests/test_on_host.py.
IN_TURN = [
    pytest.param(family, tuple(CHOOSERS)[-i % len(CHOOSERS)], marks=[] if i % 3 == 0 else [pytest.mark.slow])
    for i, family in enumerate(CHOSEN)
]


@pytest.mark.parametrize(("family", "chooser"), IN_TURN)
def test_mlps_that_stay_on_the_host_change_nothing(family: str, chooser: str) -> None:
    params, core, tokens = pair(family)[1], CHOOSERS[chooser], prompt(23)
    on_host = with_mlps_on_host(params)
    groups, theirs = (
        None if chooser == "stability" else groups_of(one, core, compacted=one is params) for one in (params, on_host)
    )
    expected = ci.generate(params, [tokens], core, groups=groups, max_new_tokens=NEW)
    out = ci.generate(on_host, [tokens], core, groups=theirs, max_new_tokens=NEW)
    np.testing.assert_array_equal(out.tokens, expected.tokens)
    assert out.core == expected.core
    assert out.stats.choices == expected.stats.choices


@pytest.mark.parametrize("family", ["Gemma2", "Gemma3"])
def test_offsets_come_before_the_norm_behind_the_mlp(family: str) -> None:
    """Narrowed weights, whose offset is the bias of the down projection, against masks over the full model's."""
    _, params = pair(family)
    core, context = ci.CoreConfig(beta=0.4, rule=ci.rules.Contribution(prior_tokens=0)), 23
    row = np.array([prompt(40)], np.int32)
    _, (masked,) = measure(params, row, context, [core])
    scores = ci.score_continuations(params, [row[0, :context]], [row[0, context:]], core)
    np.testing.assert_allclose(scores.logprobs[0][1:], -masked.loss[0], rtol=1e-4, atol=1e-4)
    plain = ci.score_continuations(params, [row[0, :context]], [row[0, context:]], replace(core, compensation=0.0))
    assert np.abs(plain.logprobs[0][1:] + masked.loss[0]).max() > 1e-2


@pytest.mark.parametrize(("family", "chunk"), half_slow(CHOSEN, [1, 500]))
def test_large_tensors_are_read_by_rows(
    family: str, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, params = pair(family)
    random_reference(family, CHOSEN[family], tmp_path)
    monkeypatch.setattr(mapping, "CHUNK", chunk)
    read, _ = ci.load(tmp_path, "float32")
    assert jax.tree.all(jax.tree.map(np.array_equal, read, params))


@pytest.mark.parametrize("family", CHOSEN)
def test_converted_and_exported_models_are_the_same(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, params = pair(family)
    random_reference(family, CHOSEN[family], tmp_path / "hub")
    ci.convert(tmp_path / "hub", tmp_path / "native")
    (tmp_path / "exported").mkdir()
    write_hugging_face(tmp_path / "exported", params, np.dtype(np.float32))
    for directory in ("native", "exported"):
        read, _ = ci.load(tmp_path / directory, "float32")
        assert read.config == params.config
        assert jax.tree.all(jax.tree.map(np.array_equal, read, params))
    assert main(["info", str(tmp_path / "native")]) == 0
    assert ("layers see a window of 8" in capsys.readouterr().out) == bool(params.config.windows)
    theirs = as_family(type(model).from_pretrained(tmp_path / "exported", attn_implementation="eager"), family)
    with torch.no_grad():
        ours, again = (one(torch.tensor([prompt(23)])).logits.numpy() for one in (model, theirs))
    np.testing.assert_array_equal(ours, again)
