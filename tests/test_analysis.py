"""`analyze`: every number against plain NumPy from the definitions, files, resumption, and bad input."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from importlib import util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import coreinfer_jax as ci
from coreinfer_jax.cli import main
from coreinfer_jax.files import locked
from coreinfer_jax.io.export import write_hugging_face
from coreinfer_jax.io.mapping import parse_dtype
from coreinfer_jax.lab.analysis import (
    Pairs,
    analyze,
    figures,
    growth,
    meaning,
    parts,
    perplexity,
    read_pairs,
    recall,
)
from coreinfer_jax.lab.analysis.inputs import Inputs
from coreinfer_jax.lab.analysis.observe import core_masks, overlaps, spread, votes_at
from coreinfer_jax.lab.clustering.grouping import group_by_kmeans
from coreinfer_jax.model import extend, observe_nothing, unembed
from coreinfer_jax.sparsity.narrow import compact
from coreinfer_jax.sparsity.votes import Tally
from coreinfer_jax.text.corpus import Corpus
from tests import support
from tests.support import random_model
from tests.test_bad_input import refusal, table
from tests.test_clusters import Letters
from tests.test_compilation import traced
from tests.test_evaluation import run_tokens
from tests.test_generate import empty_cache
from tests.test_prediction import activations, top, voted
from tests.test_votes import reference_votes

# Every figure is computed again in NumPy.
pytestmark = pytest.mark.slow

# Two layers: what takes time here is compiling.
OPT, LLAMA = (replace(config, num_layers=2) for config in (support.OPT, support.LLAMA))
L, F = OPT.num_layers, OPT.mlp_size
ALPHA, BETA = 0.4, 0.4
K = int(BETA * F)
RNG = np.random.default_rng(0)


def text(length: int) -> str:
    return "".join(RNG.choice(list("abcdefgh "), length)).replace("  ", "ab") + "z"


TEXTS = tuple(text(n) for n in (150, 170, 300, 200, 220, 180, 10, 190, 260))
WORDS = tuple(text(n) for n in (5, 9, 14, 30, 22, 17, 8, 12))
TOPICS = ci.Documents("topics.csv", "digest", tuple(text(20) for _ in range(14)), tuple("xy"[i % 2] for i in range(14)))
PAIRS = Pairs("pairs.csv", WORDS[:6], WORDS[2:], (1.0, 2.5, 2.5, 4.0, 0.0, 3.0))


class Shouting(Letters):
    """Another tokenizer for the same ids."""

    def encode(self, text: str) -> list[int]:
        return super().encode(text.upper())


@pytest.fixture(scope="module", autouse=True)
def few_shares() -> Iterator[None]:
    """Every keep ratio is a program of its own to compile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(perplexity, "SHARES", (0.1, 0.4, 1.0))
        yield


model = cache(lambda family="opt": random_model({"opt": OPT, "llama": LLAMA}[family]))


def documents(texts: tuple[str, ...] = TEXTS) -> ci.Documents:
    return ci.Documents("texts.txt", "digest", texts)


def inputs(family: str = "opt", texts: tuple[str, ...] = TEXTS, count: int = 3, **changed: object) -> Inputs:
    corpus = Corpus(documents(texts), Letters(), 0)
    params = changed.pop("params", model(family))
    return Inputs(params, Letters(), corpus, TOPICS, (PAIRS,), count, ALPHA, BETA, 0, **changed)


def run_all(directory: Path, **settings: object) -> Path:
    asked = {"topics": TOPICS, "pairs": (PAIRS,), "texts": 3} | settings
    corpus = asked.pop("documents", documents())
    return analyze(directory, asked.pop("params", model()), Letters(), corpus, **asked)


def tokens(rows: int, length: int) -> np.ndarray:
    return np.random.default_rng(length).integers(3, 100, (rows, length)).astype(np.int32)


def core_set(a: np.ndarray, kept: int = K) -> set[int]:
    """Sentence-wise core neurons of activations [T, F]."""
    return set(voted(a, kept).tolist())


# Votes and overlaps.


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_votes_at_marks_equal_numpy(family: str) -> None:
    texts, marks = tokens(2, 40), (1, 7, 16, 40)
    found = votes_at(model(family), texts, marks, 0.3)
    for b, row in enumerate(texts.tolist()):
        for l, a in enumerate(activations(model(family), row)):
            for m, length in enumerate(marks):
                expected = reference_votes(a[:length], 0.3, "per_token")
                np.testing.assert_array_equal(found[l].counts[b, m], expected)
                np.testing.assert_allclose(found[l].sums[b, m], a[:length].sum(axis=0), rtol=1e-4, atol=1e-4)


def test_masks_are_the_most_voted_neurons() -> None:
    rng = np.random.default_rng(1)
    counts, sums = rng.integers(0, 5, (2, 3, F)), rng.standard_normal((2, 3, F)).astype(np.float32)
    masks = core_masks(Tally(jnp.asarray(counts, jnp.int32), jnp.asarray(sums)), K)
    for b in range(2):
        for m in range(3):
            np.testing.assert_array_equal(np.flatnonzero(masks[b, m]), top(counts[b, m], sums[b, m], K))


def test_overlaps_equal_numpy_whatever_the_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    texts, pairs = tokens(3, 50), [(8, 16), (16, 50), (8, 50)]
    expected = np.zeros((3, len(pairs)))
    for b, row in enumerate(texts.tolist()):
        for a in activations(model(), row):
            shared = [len(core_set(a[:n]) & core_set(a[:m])) / K for n, m in pairs]
            expected[b] += np.array(shared) / L
    np.testing.assert_allclose(overlaps(model(), texts, pairs, ALPHA, BETA, "test"), expected, atol=1e-6)
    monkeypatch.setattr("coreinfer_jax.lab.analysis.observe.BATCH_TOKENS", 100)  # two texts, then one and a filler
    np.testing.assert_allclose(overlaps(model(), texts, pairs, ALPHA, BETA, "test"), expected, atol=1e-6)


def test_extension_measures_every_length_that_fits() -> None:
    found = growth.extension(inputs())
    lengths = list(zip(found["original_tokens"], found["added_tokens"], strict=True))
    assert (128, 32) in lengths
    assert (128, 64) not in lengths
    own = inputs().corpus.select(160, 3).rows
    i = lengths.index((64, 32))
    by_hand = [
        np.mean([len(core_set(a[:64]) & core_set(a[:96])) / K for a in activations(model(), row)])
        for row in own.tolist()
    ]
    assert found["overlap"]["mean"][i] == pytest.approx(np.mean(by_hand), abs=1e-6)
    assert found["overlap"]["lower_quartile"][i] == pytest.approx(np.percentile(by_hand, 25), abs=1e-6)
    assert growth.extension(inputs(texts=("short", *TEXTS), count=9))["too_short"] == 3


def test_growth_ends_in_itself_and_its_map_is_sorted_votes() -> None:
    found = growth.growth(inputs())
    assert found["tokens"] == [8, 16, 24, 32, 48, 64, 96, 128]
    assert found["overlap"]["mean"][-1] == 1
    assert found["overlap"]["mean"][0] < 0.95
    one = found["one_text"]
    a = activations(model(), inputs().corpus.select(128, 3).rows[0].tolist())[one["layer"]]
    frequencies = np.stack([reference_votes(a[:n], ALPHA, "per_token") / n for n in found["tokens"]])
    order = np.argsort(-frequencies[-1], kind="stable")
    np.testing.assert_allclose(one["frequencies"], frequencies[:, order])
    np.testing.assert_array_equal(one["ranks"], np.arange(F))


def test_spread_is_over_texts() -> None:
    found = spread(np.array([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [10.0, 4.0]]))
    assert [list(found[name]) for name in ("mean", "median")] == [[4, 1], [2.5, 0]]
    assert list(found["lower_quartile"]) == [1.75, 0]


# Perplexity.


@cache
def perplexities(family: str) -> dict:
    return perplexity.measure(inputs(family))


def mean_loss(logits: np.ndarray, following: list[int]) -> float:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    logs = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return float(-logs[np.arange(len(following)), following].mean())


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_perplexities_are_those_of_narrowed_weights(family: str) -> None:
    own, found = inputs(family), perplexities(family)
    prompt, numbers = found["prompt_tokens"], found["perplexity"]
    assert (prompt, found["continuation_tokens"]) == (32, 128)
    losses: dict[str, list[float]] = {name: [] for name in ("dense", "text", "decoding")}
    beta = perplexity.SHARES.index(BETA)
    params = own.params
    for row in own.corpus.select(161, 3).rows.tolist():
        read, following = jnp.asarray([row[:-1]], jnp.int32), row[1:]
        a = activations(params, row[:-1])
        whole = ci.CoreNeurons([voted(layer, K) for layer in a])
        start = ci.CoreNeurons([voted(layer[:prompt], K) for layer in a])
        losses["dense"].append(mean_loss(np.asarray(ci.forward(params, read))[0], following))
        losses["text"].append(mean_loss(np.asarray(ci.forward(params, read, whole))[0], following))
        _, past, _ = run_tokens(params, read[:, :prompt], empty_cache(params, 1), 0)
        logits, _, _ = run_tokens(compact(params, start), read[:, prompt:], past, prompt)
        losses["decoding"].append(mean_loss(logits[0], following[prompt:]))
    by_hand = {name: np.exp(np.mean(values)) for name, values in losses.items()}
    assert numbers["dense"] == pytest.approx(by_hand["dense"], rel=1e-4)
    assert numbers["text"][beta] == pytest.approx(by_hand["text"], rel=1e-4)
    assert numbers["decoding"][beta] == pytest.approx(by_hand["decoding"], rel=1e-4)


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_keeping_everything_is_dense(family: str) -> None:
    numbers = perplexities(family)["perplexity"]
    assert numbers["text"][-1] == pytest.approx(numbers["dense"], rel=1e-5)
    assert numbers["decoding"][-1] == pytest.approx(numbers["dense_continuation"], rel=1e-5)
    # With ReLU all that is not positive is zero; SwiGLU loses its negative activations.
    lossless = numbers["token"][-1] == pytest.approx(numbers["dense"], rel=1e-5)
    assert lossless == (family == "opt")
    assert numbers["token"][0] != pytest.approx(numbers["dense"], rel=1e-3)


@jax.jit
def with_activations(params: ci.Params, row: jax.Array, a: jax.Array) -> jax.Array:
    """Logits [T, V] of a row [1, T] whose activations are `a` [T, F] instead, in every layer."""
    start = jnp.zeros(1, jnp.int32)
    hidden, _, _ = extend(params, row, empty_cache(params, 1), start, observe_nothing, lambda *_: a[None])
    return unembed(params, hidden)[0]


def test_each_token_is_cut_to_its_own_core_neurons() -> None:
    params = replace(model(), layers=model().layers[:1], config=replace(OPT, num_layers=1))
    numbers = perplexity.measure(inputs(params=params))["perplexity"]
    losses = []
    for row in inputs().corpus.select(161, 3).rows.tolist():
        (a,) = activations(params, row[:-1])
        cut = np.zeros_like(a)
        for t, own in enumerate(a):
            ranked = sorted(np.flatnonzero(own > 0), key=lambda n: (-own[n], n))
            kept = ranked[: int(np.floor(ALPHA * len(ranked)))]
            cut[t, kept] = own[kept]
        logits = with_activations(params, jnp.asarray([row[:-1]], jnp.int32), jnp.asarray(cut))
        losses.append(mean_loss(np.asarray(logits), row[1:]))
    assert numbers["token"][perplexity.SHARES.index(ALPHA)] == pytest.approx(np.exp(np.mean(losses)), rel=1e-4)


# Topics and pairs.


def test_labels_are_scored_as_by_hand() -> None:
    rng = np.random.default_rng(2)
    centres = rng.random((3, 60)) < 0.4
    labels = np.array(list("aaaabbbbbcccc"))
    vectors = (centres["abc".index(labels[0])] ^ (rng.random((13, 60)) < 0.2)).astype(float)
    for i, label in enumerate(labels):
        vectors[i] = centres["abc".index(label)] ^ (rng.random(60) < 0.25)
    silhouette, shuffled, accuracy = meaning._topics_of_layer(vectors, labels, 0)
    distances = np.linalg.norm(vectors[:, None] - vectors[None], axis=-1)
    hits, widths = [], []
    for i, label in enumerate(labels):
        others = sorted((j for j in range(13) if j != i), key=lambda j: distances[i, j])[:5]
        voices = {name: sum(labels[j] == name for j in others) for name in "abc"}
        hits.append(max("abc", key=lambda name: voices[name]) == label)
        to = {name: [distances[i, j] for j in range(13) if labels[j] == name and j != i] for name in "abc"}
        inside, outside = np.mean(to[label]), min(np.mean(to[name]) for name in "abc" if name != label)
        widths.append((outside - inside) / max(outside, inside))
    assert accuracy == pytest.approx(np.mean(hits))
    assert silhouette == pytest.approx(np.mean(widths))
    assert 0.3 < accuracy < 1
    assert shuffled < silhouette / 2


def test_topics_are_measured_on_core_neurons() -> None:
    found = meaning.topics(inputs(count=5))
    assert found["texts_per_label"] == {"x": 5, "y": 5}
    assert found["chance"] == 0.5
    numbers = meaning.topic_texts(TOPICS, 5, 0)
    assert [TOPICS.labels[n] for n in numbers] == found["labels"] == ["x"] * 5 + ["y"] * 5
    vectors = np.zeros((10, L, F))
    for row, n in zip(vectors, numbers, strict=True):
        for l, a in enumerate(activations(model(), Letters().encode(TOPICS.texts[n]))):
            row[l, voted(a, K)] = 1
    for l in range(L):
        expected = meaning._topics_of_layer(vectors[:, l], np.array(found["labels"]), 0)
        measured = [found[name][l] for name in ("silhouette", "shuffled_silhouette", "accuracy")]
        assert measured == pytest.approx(expected)
    centred = vectors[:, 0] - vectors[:, 0].mean(axis=0)
    _, values, _ = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(np.linalg.norm(found["projection"]["0"], axis=0), values[:2], rtol=1e-6)


def test_texts_that_are_all_alike_have_no_topics() -> None:
    same = np.ones((12, 5))
    assert meaning._topics_of_layer(same, np.array(list("ab" * 6)), 0)[:2] == (0, 0)
    np.testing.assert_array_equal(meaning._projection(same), np.zeros((12, 2)))


def mean_ranks(values: np.ndarray) -> np.ndarray:
    return np.array([(values < v).sum() + ((values == v).sum() + 1) / 2 for v in values])


def test_pairs_are_correlated_as_by_hand() -> None:
    found = meaning.pairs(inputs())["files"]["pairs.csv"]
    sets = {w: [core_set(a) for a in activations(model(), Letters().encode(w))] for w in WORDS}
    scores = mean_ranks(np.array(PAIRS.scores))
    both = list(zip(PAIRS.first, PAIRS.second, strict=True))
    layers = np.array([[len(sets[a][l] & sets[b][l]) for a, b in both] for l in range(L)])
    for l in range(L):
        assert found["layers"][l] == pytest.approx(np.corrcoef(mean_ranks(layers[l]), scores)[0, 1])
    together = mean_ranks(layers.sum(axis=0))
    assert found["all"] == pytest.approx(np.corrcoef(together, scores)[0, 1])
    letters = [{2, *map(ord, a)} for a in PAIRS.first], [{2, *map(ord, b)} for b in PAIRS.second]
    same = np.array([len(a & b) / len(a | b) for a, b in zip(*letters, strict=True)])
    assert found["same_tokens"] == pytest.approx(np.corrcoef(mean_ranks(same), scores)[0, 1])


def test_a_constant_has_no_correlation() -> None:
    assert meaning.spearman([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) is None
    assert meaning.spearman([1.0, 2.0, 2.0, 5.0], [0.0, 1.0, 1.0, 9.0]) == pytest.approx(1)


# Recall.


def test_recall_equals_numpy() -> None:
    own = inputs()
    found = recall.measure(own)
    lengths, size = [4, 6, 8, 12, 16, 24, 32], 160
    assert found["prompt_tokens"] == lengths
    grouped, tested = (own.corpus.select(size, 3, half).rows.tolist() for half in (0, 1))
    assert not {tuple(row) for row in grouped} & {tuple(row) for row in tested}
    layer, small = found["deciding_layer"], int(0.2 * F)
    assert layer == 1
    of_groups = [activations(model(), row) for row in grouped]
    vectors = np.zeros((len(grouped), F), bool)
    for vector, a in zip(vectors, of_groups, strict=True):
        vector[voted(a[layer], small)] = True
    grouping = group_by_kmeans(vectors, None, 0)
    votes = np.array([[reference_votes(a, ALPHA, "per_token") for a in text] for text in of_groups])
    frequencies = np.stack([votes[grouping.assigned == c].mean(axis=0) / size for c in range(len(grouping.sizes))])
    expected = np.zeros((len(tested), len(lengths), 3, 2))
    figure, with_votes = np.zeros((2, len(tested), len(lengths)))
    for i, row in enumerate(tested):
        layers = activations(model(), row)
        for j, n in enumerate(lengths):
            vector = np.zeros(F)
            vector[voted(layers[layer][:n], small)] = 1
            c = np.argmin(np.square(grouping.centroids.astype(np.float64) - vector).sum(axis=1))
            for l, a in enumerate(layers):
                counts, sums = reference_votes(a[:n], ALPHA, "per_token"), a[:n].astype(np.float64).sum(axis=0)
                predicted = (
                    top(counts, sums, K),
                    top(frequencies[c, l], np.zeros(F), K),
                    # Sums of float32, as the package adds them: what rounds to the same is a tie.
                    top(counts.astype(np.float32) + 64 * frequencies[c, l].astype(np.float32), sums, K),
                )
                true = voted(a[: n + 128], K), voted(a[n : n + 128], K)
                expected[i, j] += np.array([[len({*p} & {*t}) / K for t in true] for p in predicted]) / L
                with_votes[i, j] += min(K, (counts > 0).sum()) / K / L
                shared = len({*voted(a[: n // 2], K)} & {*predicted[0]}) / K
                figure[i, j] += (shared - K / F) / (1 - K / F) / L
    for m, method in enumerate(recall.METHODS):
        for t, truth in enumerate(recall.TRUTHS):
            mean = expected[:, :, m, t].mean(axis=0)
            np.testing.assert_allclose(found["recall"][truth][method]["mean"], mean, atol=1e-6)
    np.testing.assert_allclose(found["stability_figure"]["median"], np.median(figure, axis=0), atol=1e-5)
    np.testing.assert_allclose(found["voted"], with_votes.mean(axis=0), atol=1e-6)
    assert found["chance"] == K / F


@pytest.mark.parametrize(
    ("own", "group", "expected"),
    [
        ([0.1, 0.5, 0.6, 0.9], [0.5, 0.5, 0.5, 0.5], {"tokens": 6, "stability_figure": 0.2}),
        ([0.6, 0.4, 0.6, 0.9], [0.5, 0.5, 0.5, 0.5], {"tokens": 8, "stability_figure": 0.3}),
        ([0.6, 0.6, 0.6, 0.9], [0.5, 0.5, 0.5, 0.5], {"tokens": 4, "stability_figure": 0.1}),
        ([0.6, 0.6, 0.6, 0.4], [0.5, 0.5, 0.5, 0.5], None),
    ],
)
def test_the_crossover_is_where_stability_stays_ahead(own: list, group: list, expected: dict | None) -> None:
    recalls = {"stability": {"mean": np.array(own)}, "similarity": {"mean": np.array(group)}}
    assert recall.crossover([4, 6, 8, 12], recalls, np.array([0.1, 0.2, 0.3, 0.4])) == expected


# Files.


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_all(tmp_path_factory.mktemp("analysis") / "out")


NAMES = ("perplexity", "extension", "growth", "topics", "pairs", "recall")


def test_every_part_leaves_a_picture_and_its_numbers(done: Path) -> None:
    from matplotlib.image import imread

    expected = {"settings.json", *(f"{name}.{kind}" for name in NAMES for kind in ("json", "png"))}
    assert {path.name for path in done.iterdir()} == expected
    for name in NAMES:
        picture = imread(done / f"{name}.png")
        assert picture.shape[0] > 400
        assert 0.02 < (picture[:, :, :3].min(axis=-1) < 0.9).mean() < 0.6, "neither blank nor filled"
        assert json.loads((done / f"{name}.json").read_text())["seed"] == 0
    assert str(done.parent) not in "".join(path.read_text() for path in done.glob("*.json"))


def changed_by_8(found: dict) -> np.ndarray:
    own = np.array(found["added_tokens"]) == 8
    return 100 * (1 - np.array(found["overlap"]["median"])[own])


@pytest.mark.parametrize("name", NAMES)
def test_pictures_draw_the_numbers_and_no_two_curves_alike(name: str, done: Path) -> None:
    found = json.loads((done / f"{name}.json").read_text())
    figure = getattr(figures, name)(found)
    curves = [line for axes in figure.get_axes() for line in axes.lines if line.get_marker() != "None"]
    assert curves
    for axes in figure.get_axes():
        own = [line for line in axes.lines if not line.get_label().startswith("_")]
        styles = [(line.get_marker(), line.get_linestyle()) for line in own]
        assert len(set(styles)) == len(styles), "told apart by colour alone"
    drawn = {line.get_label(): np.asarray(line.get_ydata(), float) for line in curves}
    expected = {
        "perplexity": lambda: ("continuation, on its prompt's core neurons", found["perplexity"]["decoding"]),
        "extension": lambda: ("8 tokens more", changed_by_8(found)),
        "growth": lambda: ("median", 100 * np.array(found["overlap"]["median"])),
        "topics": lambda: ("silhouette of the labels", found["silhouette"]),
        "pairs": lambda: (next(iter(drawn)), found["files"]["pairs.csv"]["layers"]),
        "recall": lambda: ("fused", found["recall"]["continuation"]["fused"]["mean"]),
    }
    label, values = expected[name]()
    np.testing.assert_allclose(drawn[label], values)


def test_bars_reach_from_quartile_to_quartile_wherever_the_mean_is() -> None:
    axes = figures._panels(1, 1)[1]
    values = {"mean": [5.0], "median": [2.0], "lower_quartile": [1.0], "upper_quartile": [3.0]}
    figures._spread(axes, [1], values, 0, "skewed", middle="mean")
    [bar] = axes.collections[0].get_segments()
    assert (bar[:, 1].tolist(), axes.lines[0].get_ydata().tolist()) == ([1.0, 3.0], [5.0])


def test_twenty_labels_have_twenty_markers(done: Path) -> None:
    found = json.loads((done / "topics.json").read_text())
    names = [f"label {i:02d}" for i in range(meaning.MOST_LABELS)]
    points = [[i, i] for i in range(len(names))]
    found |= {"labels": names, "texts_per_label": dict.fromkeys(names, 1), "projection": {"0": points}}
    drawn = figures.topics(found).get_axes()[0].collections
    looks = {(own.get_paths()[0].vertices.tobytes(), bool(len(own.get_facecolors()))) for own in drawn}
    assert len(looks) == 20


def test_what_is_done_is_not_done_again(done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for path in done.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    (out / "growth.json").unlink()
    (out / "pairs.png").unlink()
    measured: list[str] = []

    def counting(part: parts.Part) -> parts.Part:
        return replace(part, measure=lambda own: measured.append(part.name) or part.measure(own))

    monkeypatch.setattr(parts, "PARTS", tuple(counting(part) for part in parts.PARTS))
    run_all(out)
    assert measured == ["growth"]
    for path in done.iterdir():
        if path.suffix == ".json" or path.name == "pairs.png":
            assert (out / path.name).read_bytes() == path.read_bytes(), path.name


def test_an_interrupted_analysis_keeps_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(own: Inputs) -> dict:
        raise KeyboardInterrupt

    named = {part.name: part for part in parts.PARTS}
    monkeypatch.setattr(parts, "PARTS", (named["pairs"], replace(named["topics"], measure=stop)))
    with pytest.raises(KeyboardInterrupt):
        run_all(tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"settings.json", "pairs.json", "pairs.png"}


def test_parts_that_cannot_be_made_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    short = replace(inputs(params=random_model(replace(OPT, max_positions=100))), topics=None, pairs=())
    assert [part.name for part in parts.PARTS if parts._wanted(part, short)] == ["extension", "growth"]
    assert capsys.readouterr().err.splitlines() == [
        "[perplexity is left out: the model's 100 positions are too few]",
        "[topics is left out: needs labelled texts (--topics)]",
        "[pairs is left out: needs judged pairs (--pairs)]",
        "[recall is left out: the model's 100 positions are too few]",
    ]
    assert growth.growth_tokens(short.config) == 96
    assert growth.extension_tokens(short.config) == 96
    tiny = replace(OPT, max_positions=12)
    assert (growth.growth_tokens(tiny), growth.extension_tokens(tiny)) == (None, None)


def test_texts_passed_over_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = ("short",) * 5 + TEXTS[2:5]
    wanted = tuple(part for part in parts.PARTS if part.name == "growth")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "PARTS", wanted)
        out = run_all(tmp_path / "out", documents=documents(texts), texts=9)
    found = json.loads((out / "growth.json").read_text())
    assert (found["texts"], found["too_short"]) == (3, 5)
    assert "[growth: 3 texts; 5 documents passed over as too short]" in capsys.readouterr().err


# Bad input.


def with_nan() -> ci.Params:
    params = model()
    up = params.layers[1].mlp.up
    broken = replace(up, weight=up.weight.at[0, 0].set(jnp.nan))
    layer = replace(params.layers[1], mlp=replace(params.layers[1].mlp, up=broken))
    return replace(params, layers=(params.layers[0], layer, *params.layers[2:]))


def topics_of(labels: str) -> ci.Documents:
    return ci.Documents("topics.csv", "", tuple(f"text {i}" for i in range(len(labels))), tuple(labels))


CALLS = {
    "one-text": ({"texts": 1}, "texts=1"),
    "half-a-text": ({"texts": 2.5}, "texts=2.5"),
    "alpha": ({"alpha": 0.0}, "alpha=0.0"),
    "beta": ({"beta": 1.5}, "beta=1.5"),
    "seed": ({"seed": -1}, "seed=-1"),
    "pairs-twice": ({"pairs": (PAIRS, PAIRS)}, "pairs.csv"),
    "short-texts": ({"documents": documents(("abc",) * 7)}, "161 tokens are needed, at least 2; 0 of 7 documents"),
    "one-long-text": ({"documents": documents((*TEXTS[:1] * 7, TEXTS[2]))}, "1 of 8 documents"),
    "half-too-short": ({"documents": documents(TEXTS[2:4])}, "one half of texts.txt"),
    "many-labels": ({"topics": topics_of("abcdefghijklmnopqrstu")}, "21 different labels"),
    "one-label": ({"topics": topics_of("aaaaaaaa")}, "all labels are 'a'"),
    "a-lone-text": ({"topics": topics_of("aaaaaaab")}, "1 document with label 'b'"),
    "few-topics": ({"topics": topics_of("abab")}, "4 documents with at most texts=3"),
    "no-labels": ({"topics": documents()}, "no labels"),
    "narrowed": ({"params": None}, "narrowed"),
    "nan": ({"params": "nan"}, "NaN"),
}


@table(CALLS)
def test_mistakes_are_one_line(mistake: dict, named: str, tmp_path: Path) -> None:
    if "params" in mistake:
        narrowed = compact(model(), ci.CoreNeurons([np.arange(10)] * L))
        mistake = {"params": with_nan() if mistake["params"] == "nan" else narrowed}
    assert named in refusal(lambda: run_all(tmp_path / "out", **mistake))
    assert not list((tmp_path / "out").glob("*.png"))


def test_other_directories_are_refused(done: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in done.iterdir()}
    refused = refusal(lambda: analyze(done, model(), Shouting(), documents(), topics=TOPICS, pairs=(PAIRS,), texts=3))
    assert "(tokenizer)" in refused
    assert "alpha, seed" in refusal(lambda: run_all(done, alpha=0.5, seed=1))
    assert "model" in refusal(lambda: run_all(done, params=random_model(OPT, seed=1)))
    assert "data" in refusal(lambda: run_all(done, documents=documents(TEXTS[1:])))
    assert "topics" in refusal(lambda: run_all(done, topics=None))
    assert "pairs" in refusal(lambda: run_all(done, pairs=(replace(PAIRS, scores=PAIRS.scores[::-1]),)))
    assert before == {path.name: path.read_bytes() for path in done.iterdir()}
    assert "holds no analysis" in refusal(lambda: run_all(tmp_path))
    with locked(done):
        assert "another analysis" in refusal(lambda: run_all(done))
    (tmp_path / "file").write_text("")
    assert "file" in refusal(lambda: run_all(tmp_path / "file"))
    assert "no such directory" in refusal(lambda: run_all(tmp_path / "nowhere" / "out"))


@pytest.mark.parametrize("missing", ["matplotlib", "sklearn", "scipy"])
def test_missing_packages_are_named_before_anything_is_measured(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = util.find_spec
    monkeypatch.setattr(figures, "find_spec", lambda name: None if name == missing else find(name))
    assert "coreinfer_jax[analyze]" in refusal(lambda: run_all(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


TABLES = {
    "no-number": ("a,b,1\nc,d,high\n", "row 2: score 'high' is no number"),
    "not-finite": ("a,b,1\nc,d,inf\n", "inf is not finite"),
    "empty": ("a,b,1\nc, ,2\n", "row 2 has an empty sentence"),
    "two-pairs": ("a,b,1\nc,d,2\n", "2 pairs"),
    "one-score": ("a,b,1\nc,d,1\ne,f,1\n", "1 different scores"),
    "few-columns": ("a,b,1\nc,d\n", "row 2 has 2 columns"),
}


@table(TABLES)
def test_tables_of_pairs_that_cannot_be_used(mistake: str, named: str, tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text(mistake)
    assert named in refusal(lambda: read_pairs(tmp_path / "pairs.csv", [0, 1, 2]))


def test_pairs_come_by_name_or_number(tmp_path: Path) -> None:
    (tmp_path / "pairs.txt").write_text("left\tright\tscore\na\tb\t1\nc\td\t2.5\ne\tf\t0\n")
    found = read_pairs(tmp_path / "pairs.txt", ["right", "left", "score"])
    assert found == Pairs("pairs.txt", ("b", "d", "f"), ("a", "c", "e"), (1.0, 2.5, 0.0))
    (tmp_path / "pairs.csv").write_text("a,b,1\nc,d,2.5\ne,f,0\n")
    assert read_pairs(tmp_path / "pairs.csv", [0, 1, 2]).scores == (1.0, 2.5, 0.0)


COMMANDS = {
    "no-data": (["--data", "missing.txt"], "missing.txt"),
    "no-text-column": (["--data", "topics.csv"], "name the column of the text"),
    "topics-without-columns": (["--topics", "topics.csv"], "--topic-text and --topic-label"),
    "topics-with-one-column": (["--topics", "topics.csv", "--topic-text", "1"], "--topic-text and --topic-label"),
    "columns-without-topics": (["--topic-text", "1"], "--topics FILE"),
    "no-such-column": (["--topics", "topics.csv", "--topic-text", "a", "--topic-label", "b"], "no column"),
    "pairs-without-columns": (["--pairs", "topics.csv"], "FILE:A,B,SCORE"),
    "pairs-with-two-columns": (["--pairs", "topics.csv:0,1"], "FILE:A,B,SCORE"),
    "pairs-with-an-empty-column": (["--pairs", "topics.csv:0,,1"], "FILE:A,B,SCORE"),
    "pairs-score": (["--pairs", "topics.csv:0,1,1"], "is no number"),
    "no-model": (["--model", "missing"], "missing"),
    "seed-before-the-model": (["--model", "missing", "--seed", "-1"], "seed=-1"),
    "out-before-the-model": (["--model", "missing", "--out", "nowhere/out"], "no such directory"),
    "no-tokenizer": (["--model", "bare"], "no tokenizer"),
    "texts": (["--texts", "1"], "texts=1"),
    "texts-word": (["--texts", "many"], "--texts"),
    "beta": (["--beta", "0"], "beta=0"),
}


@table(COMMANDS)
def test_mistakes_on_the_command_line(
    mistake: list[str], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data.txt").write_text("some text\nand more\n")
    Path("topics.csv").write_text("a,the text\nb,the other\n")
    Path("bare").mkdir()
    write_hugging_face(Path("bare"), model(), parse_dtype("float32"))
    assert main(["analyze", "--data", "data.txt", "--out", "out", *mistake]) == 2
    told = capsys.readouterr().err.splitlines()
    assert named in told[-1]
    assert sum("error" in line for line in told) == 1
    assert not Path("out").exists()


def test_the_command_runs_an_embedded_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["the", "king", "and", "his", "daughter", "went", "to", "an", "old", "sea", "under", "dark", "trees"]
    lines = [" ".join(np.random.default_rng(i).permutation(words * 60).tolist()) for i in range(4)]
    (tmp_path / "data.txt").write_text("\n".join(lines))
    rows = [f"{lines[i % 4][i : i + 40]},{'xy'[i % 2]}" for i in range(10)]
    (tmp_path / "topics.csv").write_text("words,kind\n" + "\n".join(rows))
    arguments = ["--data", str(tmp_path / "data.txt"), "--out", str(tmp_path / "out"), "--texts", "3", "--beta", "0.25"]
    topics = ["--topics", str(tmp_path / "topics.csv"), "--topic-text", "words", "--topic-label", "kind"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "PARTS", tuple(part for part in parts.PARTS if part.name in ("topics", "pairs")))
        assert main(["analyze", *arguments, *topics]) == 0
    told = capsys.readouterr()
    assert told.out.strip() == str(tmp_path / "out")
    assert "[pairs is left out" in told.err
    found = json.loads((tmp_path / "out" / "topics.json").read_text())
    assert (found["texts"], found["beta"], found["seed"], len(found["accuracy"])) == (6, 0.25, 0, 8)
    assert (tmp_path / "out" / "topics.png").stat().st_size > 10_000


PARTS = {
    "growth": growth.growth,
    "perplexity": perplexity.measure,
    "recall": recall.measure,
    "topics": meaning.topics,
    "pairs": meaning.pairs,
}


@pytest.mark.parametrize("measure", PARTS.values(), ids=PARTS)
def test_other_texts_compile_nothing(measure: Callable[[Inputs], dict]) -> None:
    measure(inputs())
    other = inputs(texts=TEXTS[::-1])
    with traced() as messages:
        measure(other)
    assert messages == []


# The page.

PAGE = Path(ci.__file__).parents[1] / "docs" / "core-neurons.md"


def test_the_page_shows_every_committed_picture() -> None:
    content = PAGE.read_text(encoding="utf-8")
    for model in ("opt", "llama"):
        for name in NAMES:
            assert f"core-neurons/{model}/{name}.png" in content
            assert (PAGE.parent / "core-neurons" / model / f"{name}.png").stat().st_size > 10_000
    numbers = {own.stem: own.read_text() for own in (PAGE.parent / "core-neurons").glob("*/*.json")}
    assert not any("/" in own for own in numbers.values()), "no path of any machine"


def test_the_page_quotes_the_committed_numbers() -> None:
    """Of many, one per table, read from the JSON here and from the page's text there."""
    content = PAGE.read_text(encoding="utf-8")
    found = json.loads((PAGE.parent / "core-neurons" / "opt" / "recall.json").read_text())
    own = found["recall"]["with_prompt"]["stability"]["mean"][found["prompt_tokens"].index(64)]
    assert re.search(rf"^\| 64 \| {own:.2f} \|", content, re.MULTILINE)
    pairs = json.loads((PAGE.parent / "core-neurons" / "llama" / "pairs.json").read_text())["files"]
    assert re.search(rf"STS-B, all layers.*\| {pairs['stsb-en-test.csv']['all']:.2f} \|$", content, re.MULTILINE)
