"""Clusters: votes and groups against plain NumPy, files, resumption, published lists, and bad input."""

import json
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import coreinfer_jax as ci
from coreinfer_jax.cli import main
from coreinfer_jax.files import locked
from coreinfer_jax.io.native import write_native
from coreinfer_jax.lab.clustering import counting
from coreinfer_jax.lab.clustering.grouping import deciding_layer, elbow, group_by_kmeans, group_by_labels
from coreinfer_jax.lab.clustering.published import read_lists
from coreinfer_jax.model.config import ModelConfig
from coreinfer_jax.model.fingerprint import fingerprint
from coreinfer_jax.model.weights import named_leaves
from coreinfer_jax.sparsity.choice import Chooser
from tests.support import LLAMA, OPT, first_quick, half_slow, random_model
from tests.test_bad_input import refusal
from tests.test_prediction import activations, voted
from tests.test_votes import reference_votes

L, F = OPT.num_layers, OPT.mlp_size
RNG = np.random.default_rng(0)
# Of few lengths, because every length compiles the reference anew.
TEXTS = tuple("".join(RNG.choice(list("abcdefgh "), (4, 70, 115)[i % 4 % 3])) for i in range(11))
LABELS = tuple("xyz"[i % 3] for i in range(11))

model = cache(lambda: random_model(OPT))


class Letters:
    """A tokenizer: BOS, then one id per character."""

    description, has_chat_template = "letters", False

    def encode(self, text: str) -> list[int]:
        return [2, *(ord(c) - 29 for c in text)]


def documents(texts: tuple[str, ...] = TEXTS, labels: tuple[str, ...] | None = None) -> ci.Documents:
    return ci.Documents(name="texts.txt", digest="of the file", texts=texts, labels=labels)


def build(path: Path, corpus: ci.Documents | None = None, **settings: object) -> ci.Clusters:
    return ci.build_clusters(path, settings.pop("params", model()), Letters(), corpus or documents(), **settings)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize(("name", "budget"), half_slow(["opt", "llama"], ["per_token", "mean"]))
def test_frequencies_and_vectors_equal_numpy(name: str, budget: str, tmp_path: Path) -> None:
    params = random_model({"opt": OPT, "llama": LLAMA}[name])
    vectors = ci.TextVectors(votes=ci.rules.Votes(alpha=0.3, budget=budget), beta=0.25)
    built = build(tmp_path / "c", documents(labels=LABELS), params=params, vectors=vectors, max_tokens=100)
    assert (built.names, built.sizes, built.layer, built.origin) == (("x", "y", "z"), (4, 4, 3), 2, "topics")
    for c, label in enumerate("xyz"):
        own = [activations(params, Letters().encode(t)[:100]) for t, l in zip(TEXTS, LABELS, strict=True) if l == label]
        tokens = sum(len(a[0]) for a in own)
        for l in range(L):
            counts = sum(reference_votes(a[l], 0.3, budget) for a in own)
            np.testing.assert_allclose(built.frequencies[c, l], counts / tokens, rtol=1e-6)
        if budget == "per_token":
            vectors = np.zeros((len(own), F))
            for row, a in zip(vectors, own, strict=True):
                votes_and_sums = reference_votes(a[2], 0.3, budget), a[2].astype(np.float64).sum(axis=0)
                row[np.lexsort((np.arange(F), -votes_and_sums[1], -votes_and_sums[0]))[: F // 4]] = 1
            np.testing.assert_allclose(built.centroids[c], vectors.mean(axis=0), rtol=1e-6)


def test_index_sets_equal_numpy(tmp_path: Path) -> None:
    built = build(tmp_path / "c", documents(labels=LABELS))
    for gamma in (0.05, 0.4, 0.77):
        for c, chosen in enumerate(built.sets(gamma, (1, 2))):
            assert chosen.layers[0] is None
            for l in range(1, L):
                expected = sorted(range(F), key=lambda n: (-built.frequencies[c, l, n], n))[: int(gamma * F)]
                np.testing.assert_array_equal(chosen.layers[l], np.sort(expected))


def test_a_group_does_not_depend_on_the_other_groups(tmp_path: Path) -> None:
    """The authors' code adds the neurons of earlier groups to those of later ones."""
    whole = build(tmp_path / "whole", documents(labels=LABELS))
    for c, label in enumerate("xyz"):
        kept = tuple(text for text, own in zip(TEXTS, LABELS, strict=True) if own == label)
        alone = build(tmp_path / label, documents(kept, (label,) * len(kept)))
        np.testing.assert_array_equal(whole.frequencies[c], alone.frequencies[0])
        np.testing.assert_array_equal(whole.centroids[c], alone.centroids[0])


@pytest.mark.parametrize("labels", first_quick([None, LABELS]), ids=["k-means", "topics"])
def test_the_same_arguments_give_identical_files(labels: tuple[str, ...] | None, tmp_path: Path) -> None:
    for name in ("one", "two"):
        build(tmp_path / name, documents(labels=labels), seed=3)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_what_is_built_is_what_is_loaded(tmp_path: Path) -> None:
    vectors = ci.TextVectors(votes=ci.rules.Votes(alpha=0.3), beta=0.25, count_bos=False)
    built = build(tmp_path / "c", k=3, vectors=vectors)
    loaded = ci.load_clusters(tmp_path / "c")
    for name in ("frequencies", "centroids"):
        np.testing.assert_array_equal(getattr(built, name), getattr(loaded, name))
    for name in ("names", "sizes", "layer", "vectors", "origin", "fingerprint"):
        assert getattr(built, name) == getattr(loaded, name)


def test_an_interrupted_build_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path / "whole", k=2)
    monkeypatch.setattr(counting, "BATCH_TOKENS", 256)
    counted: list[int] = []
    count = counting._count

    def interrupted(*arguments: object) -> object:
        if len(counted) == 2:
            raise KeyboardInterrupt
        counted.append(1)
        return count(*arguments)

    monkeypatch.setattr(counting, "_count", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "parts", k=2)
    assert len(list((tmp_path / "parts.votes").glob("votes-*"))) == 2
    assert not (tmp_path / "parts").exists()
    assert "max_tokens" in refusal(lambda: build(tmp_path / "parts", k=2, max_tokens=5))
    # Another column of the same file: the digest is that of the file.
    assert "(tokens)" in refusal(lambda: build(tmp_path / "parts", documents(TEXTS[::-1]), k=2))
    with locked(tmp_path / "parts.votes"):
        assert "another build" in refusal(lambda: build(tmp_path / "parts", k=2))
    counted.clear()
    monkeypatch.setattr(counting, "_count", lambda *arguments: counted.append(1) or count(*arguments))
    build(tmp_path / "parts", k=2, seed=0)
    assert 0 < len(counted) == len(counting.plan_batches([Letters().encode(text) for text in TEXTS])) - 2
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    assert not (tmp_path / "parts.votes").exists()


def test_a_damaged_file_of_votes_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coreinfer_jax.lab.clustering.build.group_by_kmeans", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build(tmp_path / "c")
    damaged = tmp_path / "c.votes" / "votes-000000.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-7])
    monkeypatch.undo()
    assert str(damaged) in refusal(lambda: build(tmp_path / "c"))
    damaged.unlink()
    build(tmp_path / "c")


def test_documents_are_cut_at_the_models_positions(tmp_path: Path) -> None:
    texts = ("ab" * 400, "cd" * 10, "ef" * 400)
    build(tmp_path / "c", documents(texts), k=1, max_tokens=5000)
    facts = json.loads((tmp_path / "c" / "clusters.json").read_text())["facts"]
    assert (facts["documents_cut_short"], facts["tokens"]) == (2, [2 * OPT.max_positions + 21])


def planted(groups: int, texts: int, noise: float) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    centres = rng.random((groups, 200)) < 0.3
    truth = np.repeat(np.arange(groups), texts // groups)
    return centres[truth] ^ (rng.random((len(truth), 200)) < noise), truth


def test_kmeans_finds_planted_groups_and_the_elbow_their_number() -> None:
    vectors, truth = planted(4, 80, 0.05)
    found = group_by_kmeans(vectors, None, seed=0)
    assert found.sizes == (20,) * 4
    assert all(len(set(found.assigned[truth == c])) == 1 for c in range(4))
    for c in range(4):
        np.testing.assert_allclose(found.centroids[c], vectors[found.assigned == c].mean(axis=0), rtol=1e-6)
    spread = [np.square(vectors[found.assigned == c] - found.centroids[c]).sum() for c in range(4)]
    assert found.within[3] == pytest.approx(sum(spread), rel=1e-6)
    assert found.within[0] == pytest.approx(np.square(vectors - vectors.mean(axis=0)).sum(), rel=1e-6)


def test_groups_are_numbered_by_size_and_k_overrides_the_elbow() -> None:
    vectors, truth = planted(2, 60, 0.05)
    vectors, truth = vectors[truth.argsort()[::-1]][:45], truth[::-1][:45]
    found = group_by_kmeans(vectors, 2, seed=0)
    assert found.sizes == (30, 15)
    assert len(group_by_kmeans(vectors, 5, seed=0).names) == 5
    assert group_by_labels(vectors, ["b"] * 40 + ["a"] * 5).sizes == (5, 40)


@pytest.mark.parametrize(
    ("within", "index"),
    [([10, 4, 3, 2, 1, 0], 1), ([10, 9, 8, 1, 0.5, 0], 3), ([4, 3, 2, 1], 0), ([5, 1], 0), ([3], 0), ([2, 2, 2], 0)],
)
def test_the_elbow_is_farthest_below_the_chord(within: list[float], index: int) -> None:
    assert elbow(within) == index


@pytest.mark.parametrize(("layers", "layer"), [(32, 25), (8, 6), (7, 5), (1, 0)])
def test_the_deciding_layer_is_the_papers(layers: int, layer: int) -> None:
    assert deciding_layer(layers) == layer


def test_nearest_documents_are_those_of_numpy(tmp_path: Path) -> None:
    built = build(tmp_path / "c", documents(labels=LABELS), vectors=ci.TextVectors(beta=0.25))
    facts = json.loads((tmp_path / "c" / "clusters.json").read_text())["facts"]
    for c, label in enumerate("xyz"):
        own = [i for i, l in enumerate(LABELS) if l == label]
        vectors = np.zeros((len(own), F))
        for row, i in zip(vectors, own, strict=True):
            row[voted(activations(model(), Letters().encode(TEXTS[i]))[2], F // 4)] = 1
        distances = np.linalg.norm(vectors - built.centroids[c].astype(np.float64), axis=1)
        near = facts["nearest"][c]
        assert [entry["document"] for entry in near] == [own[i] for i in np.argsort(distances, kind="stable")]
        np.testing.assert_allclose([entry["distance"] for entry in near], np.sort(distances), atol=1e-5)


# Published lists.

REAL = {
    "opt-6.7B_QA": (replace(OPT, mlp_size=16384, hidden_size=16, embed_size=16, head_size=4), 5),
    "Llama3-8B_QA": (replace(LLAMA, mlp_size=14336, hidden_size=16, embed_size=16, head_size=4), 4),
}


def native(directory: Path, config: ModelConfig) -> Path:
    params = random_model(config, dtype="bfloat16")
    directory.mkdir()
    leaves = ((name, np.asarray(leaf)) for name, leaf in named_leaves(params))
    write_native(directory, config, np.dtype(jnp.bfloat16), leaves)
    return directory


@pytest.mark.parametrize("layers", [3, pytest.param(32, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", first_quick(REAL))
def test_published_lists_drive_generation(name: str, layers: int, data: Path, tmp_path: Path) -> None:
    """All 32 layers of them, or the first ones alone."""
    config, groups = replace(REAL[name][0], num_layers=layers), REAL[name][1]
    source, checkpoint = tmp_path / f"{name}.npz", native(tmp_path / "model", config)
    with np.load(data / "neurons" / source.name, allow_pickle=False) as archive:
        lists = {f"L{l}_C{c}": archive[f"L{l}_C{c}"] for l in range(layers) for c in range(groups)}
        assert layers < 32 or lists.keys() == {*archive.files}
    np.savez(source, **lists)
    # The lists of the third layer are shorter than those of the 25th, which decides in the whole model.
    clusters = ci.import_published(source, tmp_path / "c", checkpoint, beta=0.2 if layers == 32 else 0.15)
    assert (clusters.frequencies.shape, clusters.origin) == ((groups, layers, config.mlp_size), "published")

    gamma = 0.12
    kept = int(gamma * config.mlp_size)
    overlaps = ci.inspect_clusters(tmp_path / "c", gamma).overlaps
    for l in range(layers):
        for c in range(groups):
            for d in range(groups):
                common = np.intersect1d(lists[f"L{l}_C{c}"][:kept], lists[f"L{l}_C{d}"][:kept])
                assert overlaps[l, c, d] == pytest.approx(len(common) / kept)

    params, _ = ci.load(checkpoint)
    core = ci.Similarity(gamma=gamma)
    ready = ci.prepare_groups(params, ci.load_clusters(tmp_path / "c"), core, compacted=False)
    out = ci.generate(params, [[2, 5, 6, 7, 8]], core, groups=ready, max_new_tokens=4)
    group = out.stats.choices[0].group
    assert out.stats.kept_neurons == (kept,) * layers
    for l in range(layers):
        np.testing.assert_array_equal(out.core.layers[l], np.sort(lists[f"L{l}_C{group}"][:kept]))
    asked = ci.generate(params, [[2, 5, 6, 7, 8]], out.core, max_new_tokens=4)
    np.testing.assert_array_equal(out.tokens, asked.tokens)

    shortest = min(len(neurons) for neurons in lists.values())
    greedy = replace(core, gamma=0.9)
    message = refusal(lambda: ci.prepare_groups(params, clusters, greedy))
    assert f"has {shortest}" in message
    assert f"asks for {int(0.9 * config.mlp_size)}" in message
    most = float(message.rpartition("gamma=")[2])
    assert int(most * config.mlp_size) <= shortest < int((most + 2e-4) * config.mlp_size)
    clusters.sets(most, tuple(range(layers)))


def archive(path: Path, **arrays: object) -> Path:
    whole = {f"L{l}_C{c}": np.arange(F) for l in range(L) for c in range(2)}
    changed = whole | arrays
    np.savez(path, **{key: value for key, value in changed.items() if value is not None})
    return path


ARCHIVES = {
    "a list that is missing": ({"L1_C0": None}, "holds 5 lists"),
    "layers of another model": ({"L3_C0": np.arange(4), "L3_C1": np.arange(4)}, "4 layers"),
    "a name that is none": ({"layer0": np.arange(4)}, "'layer0'"),
    "a neuron too many": ({"L1_C1": np.arange(F + 1)}, f"L1_C1 holds neurons 0 .. {F}"),
    "a negative neuron": ({"L1_C1": np.array([3, -1])}, "neurons -1 .. 3"),
    "a neuron twice": ({"L1_C1": np.array([3, 3])}, "L1_C1 holds a neuron twice"),
    "a list under two names": ({"L01_C1": np.arange(4)}, "'L01_C1'"),
    "an empty list": ({"L1_C1": np.array([], int)}, "L1_C1 is int64 [0]"),
    "floats": ({"L1_C1": np.ones(3)}, "L1_C1 is float64"),
    "two axes": ({"L1_C1": np.ones((3, 2), int)}, "L1_C1 is int64 [3, 2]"),
    "a deciding list that is too short": ({"L2_C0": np.arange(7)}, "shortest list in layer 2 has 7"),
    "objects, which only pickle holds": ({"L1_C1": np.array([{}], object)}, "not a .npz archive"),
}


@pytest.mark.parametrize(("changes", "named"), ARCHIVES.values(), ids=ARCHIVES)
def test_archives_that_do_not_fit(changes: dict[str, object], named: str, tmp_path: Path) -> None:
    checkpoint = native(tmp_path / "model", OPT)
    source = archive(tmp_path / "lists.npz", **changes)
    assert named in refusal(lambda: ci.import_published(source, tmp_path / "c", checkpoint))
    assert not (tmp_path / "c").exists()


def test_damaged_archives_are_named(tmp_path: Path) -> None:
    """Zip files fail in many ways, by zlib's and zipfile's own exceptions."""
    checkpoint, source, rng = native(tmp_path / "model", OPT), tmp_path / "lists.npz", np.random.default_rng(0)
    np.savez_compressed(source, **{f"L{l}_C{c}": rng.permutation(F) for l in range(L) for c in range(2)})
    whole = source.read_bytes()
    refused = 0
    for i in range(300):
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        source.write_bytes(damaged)
        try:
            ci.import_published(source, tmp_path / f"c{i}", checkpoint)
        except ci.CoreInferError as error:
            refused += str(source) in str(error)
    assert refused > 100
    with source.open("wb") as file:
        np.save(file, np.arange(5))
    assert str(source) in refusal(lambda: ci.import_published(source, tmp_path / "c", checkpoint))


def member(head: str, data: bytes = bytes(1600)) -> bytes:
    """A `.npy` file with this header."""
    line = head.encode("latin1") + b"\n"
    return b"\x93NUMPY\x01\x00" + len(line).to_bytes(2, "little") + line + data


SHAPE = "{'descr': '<i8', 'fortran_order': False, 'shape': (%s,), }"
MEMBERS = {
    "no array": b"garbage",
    "nothing": b"",
    "an unclosed bracket": member("{'descr'"),
    "an unclosed string": member('"""'),
    "an indentation": member("if x:\n  y\n z"),
    "a shape beyond 64 bits": member(SHAPE % 10**30),
    "a shape of terabytes": member(SHAPE % 10**12),
    "a negative shape": member(SHAPE % -200),
    "nested deeply": member("(" * 2000),
}


@pytest.mark.parametrize("content", MEMBERS.values(), ids=MEMBERS)
def test_what_numpy_raises_for_a_list_becomes_one_line(content: bytes, tmp_path: Path) -> None:
    source = tmp_path / "lists.npz"
    with zipfile.ZipFile(source, "w") as archive:
        for l in range(OPT.num_layers):
            archive.writestr(f"L{l}_C0.npy", content)
    assert f"{source}: not a .npz archive (" in refusal(lambda: read_lists(source, OPT))


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_what_decompressing_raises_becomes_one_line(method: int, tmp_path: Path) -> None:
    source = tmp_path / "lists.npz"
    with zipfile.ZipFile(source, "w", method) as archive:
        for l in range(OPT.num_layers):
            archive.writestr(f"L{l}_C0.npy", member(SHAPE % 4, np.arange(4).tobytes()))
    read_lists(source, OPT)
    content = bytearray(source.read_bytes())
    content[50:80] = b"\xff" * 30
    source.write_bytes(content)
    assert f"{source}: not a .npz archive (" in refusal(lambda: read_lists(source, OPT))


def test_a_list_longer_than_a_layer_is_not_unpacked(tmp_path: Path) -> None:
    source, size = tmp_path / "lists.npz", 1 << 30
    with zipfile.ZipFile(source, "w", zipfile.ZIP_DEFLATED) as archive:
        for l in range(OPT.num_layers):
            archive.writestr(f"L{l}_C0.npy", member(SHAPE % 4, np.arange(4).tobytes()))
    content = bytearray(source.read_bytes())
    place = content.index(b"PK\x01\x02") + 24  # the size unpacked, in the list of members
    content[place : place + 4] = size.to_bytes(4, "little")
    source.write_bytes(content)
    assert f"L0_C0 takes {size} bytes" in refusal(lambda: read_lists(source, OPT))


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 cut short"])
def test_files_that_are_no_archives(content: bytes, tmp_path: Path) -> None:
    checkpoint, source = native(tmp_path / "model", OPT), tmp_path / "lists.npz"
    source.write_bytes(content)
    assert str(source) in refusal(lambda: ci.import_published(source, tmp_path / "c", checkpoint))
    source.unlink()
    assert str(source) in refusal(lambda: ci.import_published(source, tmp_path / "c", checkpoint))


# Bad input.

BUILDS = {
    "one document": ({"corpus": documents(("a",))}, "1 document"),
    "more groups than documents": ({"k": 12}, "k=12"),
    "more groups than different documents": ({"corpus": documents(("a", "b", "a")), "k": 3}, "k=3"),
    "documents that are all the same": ({"corpus": documents(("a", "a"))}, "1 of them different"),
    "no groups": ({"k": 0}, "k=0"),
    "half a group": ({"k": 1.5}, "k=1.5"),
    "k beside labels": ({"corpus": documents(labels=LABELS), "k": 2}, "labels"),
    "a depth of 1": ({"depth": 1.0}, "depth=1.0"),
    "a depth of NaN": ({"depth": float("nan")}, "depth=nan"),
    "a negative seed": ({"seed": -1}, "seed=-1"),
    "no tokens": ({"max_tokens": 0}, "max_tokens=0"),
    "too many tokens": ({"max_tokens": 10**6}, "max_tokens=1000000"),
    "documents that are none": ({"corpus": ["a", "b"]}, "read_documents"),
    "settings that are none": ({"vectors": None}, "vectors=None"),
    "a depth that is none": ({"depth": "deep"}, "depth='deep'"),
    "a label too few": ({"corpus": documents(labels=LABELS[1:])}, "10 labels for 11 texts"),
}


@pytest.mark.parametrize(("settings", "named"), BUILDS.values(), ids=BUILDS)
def test_builds_that_cannot_be(settings: dict[str, object], named: str, tmp_path: Path) -> None:
    assert named in refusal(lambda: build(tmp_path / "c", **settings))
    assert list(tmp_path.iterdir()) == []


def test_activations_that_are_nan(tmp_path: Path) -> None:
    layer = model().layers[1]
    broken = replace(layer.mlp.up, weight=layer.mlp.up.weight.at[3, 4].set(jnp.nan))
    layers = (model().layers[0], replace(layer, mlp=replace(layer.mlp, up=broken)), model().layers[2])
    params = replace(model(), layers=layers)
    assert "NaN" in refusal(lambda: build(tmp_path / "c", params=params))
    assert list(tmp_path.iterdir()) == []


def test_a_target_that_exists_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    assert "exists already" in refusal(lambda: build(tmp_path / "c"))
    assert list(tmp_path.iterdir()) == [tmp_path / "c"]


def edit_json(directory: Path, **changes: object) -> None:
    path = directory / "clusters.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_arrays(directory: Path, **changes: object) -> None:
    arrays = load_file(directory / "clusters.safetensors") | changes
    save_file({k: v for k, v in arrays.items() if v is not None}, directory / "clusters.safetensors")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


VOTING = {"alpha": 0.4, "beta": 0.2, "budget": "mean", "count_bos": True}
DAMAGES: dict[str, Callable[[Path], object]] = {
    "no arrays": lambda path: (path / "clusters.safetensors").unlink(),
    "no manifest": lambda path: (path / "clusters.json").unlink(),
    "arrays cut short": lambda path: cut(path / "clusters.safetensors"),
    "a manifest cut short": lambda path: cut(path / "clusters.json"),
    "nothing at all": shutil.rmtree,
    "another format": lambda path: edit_json(path, format="something"),
    "a later version": lambda path: edit_json(path, version=2),
    "no names": lambda path: edit_json(path, names=None),
    "a name too few": lambda path: edit_json(path, names=["a"]),
    "numbers as names": lambda path: edit_json(path, names=[1, 2, 3]),
    "a layer too deep": lambda path: edit_json(path, layer=3),
    "another origin": lambda path: edit_json(path, origin="dreams"),
    "votes by another rule": lambda path: edit_json(
        path, voting={"alpha": 3, "beta": 0.2, "budget": "mean", "count_bos": True}
    ),
    "no facts": lambda path: edit_json(path, facts=None),
    "facts of nothing": lambda path: edit_json(path, facts={}),
    "facts without documents": lambda path: edit_json(path, facts={"data": {"name": "x"}, "nearest": [[], [], [{}]]}),
    "facts of two groups": lambda path: edit_json(path, facts={"data": {"name": "x"}, "nearest": [[], []]}),
    "no frequencies": lambda path: edit_arrays(path, frequencies=None),
    "frequencies that are NaN": lambda path: edit_arrays(path, frequencies=np.full((3, L, F), np.nan, np.float32)),
    "frequencies above 1": lambda path: edit_arrays(path, frequencies=np.full((3, L, F), 2, np.float32)),
    "frequencies of doubles": lambda path: edit_arrays(path, frequencies=np.zeros((3, L, F))),
    "frequencies of one group": lambda path: edit_arrays(path, frequencies=np.zeros((1, L, F), np.float32)),
    "frequencies of two axes": lambda path: edit_arrays(path, frequencies=np.zeros((3, F), np.float32)),
    "documents of no group": lambda path: edit_arrays(path, assigned=np.array([3], np.int32)),
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clusters") / "c"
    build(path, documents(labels=LABELS))
    return path


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_half_written_and_damaged_clusters(damage: Callable[[Path], object], built: Path, tmp_path: Path) -> None:
    shutil.copytree(built, tmp_path / "c")
    ci.load_clusters(tmp_path / "c")
    damage(tmp_path / "c")
    assert str(tmp_path / "c") in refusal(lambda: ci.load_clusters(tmp_path / "c"))


# The command line.


@pytest.fixture
def run(capsys):
    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "news.csv"
    path.write_text('topic,text\nsea,"The sea, the ship."\nking,The king.\nsea,A wave.\nking,"His ""crown""."\n')
    return path


@pytest.mark.parametrize(
    "core", first_quick([ci.Auto(beta=0.4, gamma=0.4), ci.Similarity(gamma=0.4), ci.Fused(beta=0.4)])
)
def test_build_inspect_and_generate(core: Chooser, run, shallow: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    out, model = tmp_path / "clusters", ("--model", shallow["opt"])
    columns = ("--text-column", "text", "--label-column", "topic")
    status, told, err = run("clusters", "build", *model, "--data", corpus, *columns, "--out", out)
    assert status == 0, err
    assert "king: 2 documents" in told
    assert 'His "crown".' in told
    status, shown, _ = run("clusters", "inspect", out, "--gamma", 0.4, "--json")
    facts = json.loads(shown)
    assert (status, facts["names"], facts["sizes"], facts["gamma"]) == (0, ["king", "sea"], [2, 2], 0.4)
    params, tokenizer = ci.load(shallow["opt"])
    assert facts["model"] == fingerprint(params)
    groups = ci.prepare_groups(params, ci.load_clusters(out), core)
    expected = ci.generate(params, [tokenizer.encode("The queen")], core, groups=groups, max_new_tokens=6)
    options = ("--method", core.method, "--clusters", out, "--gamma", 0.4, "--beta", 0.4, "--temperature", 0)
    status, shown, err = run("generate", "The queen", *model, *options, "--max-new-tokens", 6, "--json")
    assert status == 0, err
    result = json.loads(shown)
    assert result["tokens"] == expected.tokens[0].tolist()
    assert result["stats"]["choices"] == [asdict(choice) for choice in expected.stats.choices]
    choice = expected.stats.choices[0]
    why = " (unstable: 3 voting tokens, fewer than 32)" if core.method == "auto" else ""
    assert err.startswith(f"[{choice.method} by {facts['names'][choice.group]!r}{why}: 40% of ")


def test_auto_without_clusters_says_what_it_does(run, shallow: dict[str, Path]) -> None:
    model = ("--model", shallow["opt"])
    status, _, err = run("generate", "The queen", *model, "--method", "auto", "--max-new-tokens", 2)
    assert status == 0
    assert "[stability (unstable: 3 voting tokens, fewer than 32; no groups were given to choose from)" in err


def test_chat_takes_clusters(run, on_clusters: tuple[object, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter(["The queen", "The king"])
    monkeypatch.setattr("builtins.input", lambda *_: next(lines, "/exit"))
    status, _, err = run("chat", "--method", "similarity", *on_clusters, "--max-new-tokens", 3)
    assert status == 0, err
    assert err.count("[similarity by 'group ") == 2


@pytest.fixture(scope="module")
def on_clusters(shallow: dict[str, Path], corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[object, ...]:
    """Options that name a model and its clusters."""
    ready = tmp_path_factory.mktemp("ready") / "clusters"
    ci.build_clusters(ready, *ci.load(shallow["opt"]), ci.read_documents(corpus, "text"))
    return ("--model", shallow["opt"], "--clusters", ready)


def test_imported_lists_on_the_command_line(run, tmp_path: Path) -> None:
    source, out = archive(tmp_path / "lists.npz", L0_C0=np.arange(30)), tmp_path / "c"
    status, told, err = run("clusters", "import", source, "--model", native(tmp_path / "model", OPT), "--out", out)
    assert (status, told) == (0, f"{out}\n"), err
    status, told, _ = run("clusters", "inspect", out)
    assert status == 0
    assert "group 1: a published list" in told
    assert "at gamma=0.3125" in told  # 30 of 96 neurons
    assert run("clusters", "inspect", out, "--gamma", 0.32)[0] == 0
    status, _, err = run("clusters", "inspect", out, "--gamma", 0.33)
    assert status == 2
    assert "give at most gamma=0.3125" in err


def test_settings_of_auto_and_fused_reach_the_prediction(run, on_clusters: tuple[object, ...]) -> None:
    def kept(*options: object) -> dict:
        arguments = (*on_clusters, "--max-new-tokens", 2, "--json", *options)
        status, out, err = run("generate", "The queen and the king", *arguments)
        assert status == 0, err
        return json.loads(out)["stats"]

    stats = kept("--method", "auto", "--least-tokens", 2, "--least-stability", -1, "--layers", 0.5, 1)
    assert stats["method"] == "stability"
    assert stats["kept_neurons"] == [768, 384]
    unstable = "--method", "auto", "--least-tokens", 2, "--least-stability", 1
    assert kept(*unstable, "--no-linear")["method"] == "similarity"
    status, _, err = run("generate", "x", "--method", "fused", *on_clusters, "--group-tokens", -1)
    assert (status, "group_tokens=-1.0" in err) == (2, True)


UNUSED = [
    (("--method", "fused", "--compensation", 0.2), "--compensation 0.2: is of --method stability"),
    (("--method", "auto", "--allocation", "equal"), "--allocation equal: is of --method stability"),
    (("--method", "similarity", "--prior-tokens", 5), "--prior-tokens 5.0: is of --method stability"),
    (("--method", "auto", "--group-tokens", 5), "--group-tokens 5.0: is of --method fused"),
    (("--method", "fused", "--least-tokens", 5), "--least-tokens 5: is of --method auto"),
]


@pytest.mark.parametrize(("options", "said"), UNUSED)
def test_options_that_would_change_nothing_are_refused(options, said, run, on_clusters: tuple[object, ...]) -> None:
    status, _, err = run("generate", "x", *on_clusters, *options)
    assert (status, said in err) == (2, True), err


def test_prior_tokens_without_a_calibration_are_refused(run, tinystories: Path) -> None:
    status, _, err = run("generate", "x", "--model", tinystories, "--prior-tokens", 5)
    assert (status, "is of a calibration, and the model has none" in err) == (2, True), err


MISTAKES = {
    "no such file": (("build", "--data", "nowhere.txt", "--out", "c"), "nowhere.txt"),
    "no column": (("build", "--data", "news.csv", "--out", "c"), "name the column"),
    "a column that is not there": (("build", "--data", "news.csv", "--text-column", "body", "--out", "c"), "'body'"),
    "a number that is not there": (("build", "--data", "news.csv", "--text-column", "7", "--out", "c"), "number 7"),
    "a label that is not there": (
        ("build", "--data", "news.csv", "--text-column", "text", "--label-column", "tag", "--out", "c"),
        "'tag'",
    ),
    "an empty corpus": (("build", "--data", "empty.txt", "--out", "c"), "no documents"),
    "columns of text": (("build", "--data", "one.txt", "--text-column", "x", "--out", "c"), "plain text"),
    "one document": (("build", "--data", "one.txt", "--out", "c"), "1 document"),
    "k larger than the corpus": (
        ("build", "--data", "news.csv", "--text-column", "text", "--k", "9", "--out", "c"),
        "k=9",
    ),
    "lines that are no JSON": (("build", "--data", "bad.jsonl", "--out", "c"), "line 2"),
    "a field that is not there": (("build", "--data", "bad.jsonl", "--text-column", "x", "--out", "c"), "line 1"),
    "no clusters": (("inspect", "nowhere"), "nowhere"),
    "a gamma of 0": (("inspect", "nowhere", "--gamma", "0"), "gamma=0"),
    "lists without a model": (("import", "lists.npz", "--out", "c"), "--model"),
    "an unknown action": (("make",), "make"),
}


@pytest.mark.parametrize(("arguments", "named"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_on_the_command_line(
    run, arguments: tuple[str, ...], named: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(corpus, tmp_path)
    (tmp_path / "empty.txt").write_text("\n  \n")
    (tmp_path / "one.txt").write_text("One line.\n")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    status, out, err = run("clusters", *arguments)
    assert (status, out) == (2, "")
    assert named in err
    assert err.count("\n") == 1
    assert not (tmp_path / "c").exists()


def test_mistakes_with_clusters(run, built: Path, tmp_path: Path) -> None:
    for arguments, named in {
        ("--method", "similarity"): "needs --clusters",
        ("--clusters", str(built)): "--method stability uses none",
        ("--method", "dense", "--clusters", str(built)): "--method dense uses none",
        ("--method", "similarity", "--clusters", str(built)): "fingerprint",
        ("--method", "auto", "--clusters", str(tmp_path)): "clusters.json is missing",
        ("--method", "auto", "--gamma", "0.2"): "--gamma 0.2",
        ("--gamma", "0.2"): "--gamma 0.2",
        ("--method", "auto", "--clusters", str(built), "--gamma", "2"): "gamma=2.0",
    }.items():
        status, out, err = run("generate", "The king", *arguments)
        assert (status, out) == (2, "")
        assert named in err
        assert err.count("\n") == 1
