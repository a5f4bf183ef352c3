"""Prediction by similarity, fused and automatic, in `generate`: against plain NumPy, and every row against itself."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import coreinfer_jax as ci
from coreinfer_jax.model import extend
from coreinfer_jax.model.cache import init_cache
from coreinfer_jax.model.fingerprint import fingerprint
from coreinfer_jax.sparsity.choice import Chooser
from coreinfer_jax.sparsity.choosers import Core, chooser_of
from coreinfer_jax.sparsity.measures import nearest_group
from coreinfer_jax.sparsity.votes import Tally
from tests.support import LLAMA, OPT, check_same_core, first_quick, half_slow, one_quick_in, random_model
from tests.test_bad_input import refusal
from tests.test_compilation import traced
from tests.test_votes import reference_votes

L, F = OPT.num_layers, OPT.mlp_size
LAYER, VECTOR = 2, 0.25
C = 3
VOTES = ci.CoreConfig.paper()
SIMILARITY, AUTO, FUSED = ci.Similarity(gamma=0.5), ci.Auto(beta=0.5), ci.Fused(beta=0.5)
# Some prompts of the tests are stable by it.
STEADY = replace(AUTO, least_stability=0.3)

model = cache(lambda: random_model(OPT))


@cache
def clusters(seed: int = 0) -> ci.Clusters:
    """Groups made by hand: a centroid is the vector of one of three prompts, blurred."""
    rng = np.random.default_rng(seed)
    centroids = np.stack([vector(prompt(20, seed)) for seed in range(C)]) * 0.8 + 0.1 * rng.random((C, F))
    return ci.Clusters(
        frequencies=rng.random((C, L, F)).astype(np.float32),
        centroids=centroids.astype(np.float32),
        names=("a", "b", "c"),
        sizes=(5, 4, 3),
        layer=LAYER,
        vectors=ci.TextVectors(beta=VECTOR),
        origin="k-means",
        fingerprint=fingerprint(model()),
    )


@cache
def groups(core: Chooser = SIMILARITY, compacted: bool = True) -> ci.Groups:
    return ci.prepare_groups(model(), clusters(), core, compacted=compacted)


def prompt(length: int, seed: int) -> list[int]:
    return [2, *np.random.default_rng(seed).integers(3, OPT.vocab_size, length - 1).tolist()]


@jax.jit
def observed(params: ci.Params, row: jax.Array) -> tuple[jax.Array, ...]:
    empty = init_cache(params.config, 1, row.shape[1], jnp.dtype("float32"))
    return extend(params, row, empty, jnp.zeros(1, jnp.int32), lambda l, layer, seen: seen.activations[0])[2]


def activations(params: ci.Params, tokens: list[int]) -> list[np.ndarray]:
    """Of each layer, [T, F], in one shape for all prompts: what follows does not change them."""
    padded = np.zeros((1, params.config.max_positions), np.int32)
    padded[0, : len(tokens)] = tokens
    return [np.asarray(a)[: len(tokens)] for a in observed(params, padded)]


def top(score: np.ndarray, sums: np.ndarray, kept: int) -> np.ndarray:
    ranked = sorted(range(len(score)), key=lambda n: (-score[n], -sums[n], n))
    return np.sort(ranked[:kept])


def voted(a: np.ndarray, kept: int) -> np.ndarray:
    return top(reference_votes(a, 0.4, "per_token"), a.astype(np.float64).sum(axis=0), kept)


def vector(tokens: list[int]) -> np.ndarray:
    binary = np.zeros(F)
    binary[voted(activations(model(), tokens)[LAYER], int(VECTOR * F))] = 1
    return binary


def reference_group(tokens: list[int]) -> int:
    return int(np.argmin([np.linalg.norm(vector(tokens) - c) for c in clusters().centroids.astype(np.float64)]))


def reference_figure(params: ci.Params, tokens: list[int], kept: int) -> float:
    """The stability figure from its definition."""
    figures = []
    for a in activations(params, tokens):
        early, whole = voted(a[: len(tokens) // 2], kept), voted(a, kept)
        chance = kept / a.shape[1]
        figures.append((len(np.intersect1d(early, whole)) / kept - chance) / (1 - chance))
    return float(np.mean(figures))


def same(one: ci.Generation, other: ci.Generation, row: int = 0) -> None:
    """`one`, of a single row, made the tokens and used the neurons of row `row` of `other`."""
    assert one.core is not None
    assert other.core is not None
    np.testing.assert_array_equal(one.tokens[0], other.tokens[row])
    check_same_core(one.core, other.core if other.core.rows is None else other.core.row(row))


def test_prompts_are_assigned_as_by_numpy_and_decode_with_their_groups_neurons() -> None:
    assigned = set()
    for seed, length in [(0, 20), (1, 20), (2, 20), (3, 4), (4, 50), (5, 1)]:
        tokens = prompt(length, seed)
        out = ci.generate(model(), [tokens], SIMILARITY, groups=groups(), max_new_tokens=12)
        [choice] = out.stats.choices
        assert choice == ci.Choice("similarity", "asked for", None, reference_group(tokens))
        assert out.stats.method == "similarity"
        expected = [
            np.sort(np.argsort(-clusters().frequencies[choice.group, l], kind="stable")[: F // 2]) for l in range(L)
        ]
        assert out.core == ci.CoreNeurons(expected)
        same(ci.generate(model(), [tokens], ci.CoreNeurons(expected), max_new_tokens=12), out)
        assigned.add(choice.group)
    assert assigned >= {0, 1, 2}


def test_distances_are_euclidean_and_ties_go_to_the_lower_group() -> None:
    centroids = np.array([[1, 1, 1, 1], [0.9, 0.1, 0, 0], [0.9, 0.1, 0, 0]], np.float32)
    votes = Tally(counts=jnp.array([[3, 0, 0, 0], [4, 3, 2, 1]]), sums=jnp.zeros((2, 4)))
    assert nearest_group(votes, 1, jnp.asarray(centroids)).tolist() == [1, 1]
    assert nearest_group(votes, 4, jnp.asarray(centroids)).tolist() == [0, 0]


@pytest.mark.parametrize("gamma", half_slow([0.29, 0.01, 1.0, 0.5]))
def test_gamma_is_honoured(gamma: float) -> None:
    core = replace(SIMILARITY, gamma=gamma)
    out = ci.generate(model(), [prompt(9, 0)], core, groups=groups(core), max_new_tokens=3)
    assert out.stats.kept_neurons == (max(1, int(gamma * F + 1e-9)),) * L


def test_only_the_layers_asked_for_are_narrowed_and_the_deciding_layer_need_not_be_one() -> None:
    for core in (SIMILARITY, FUSED, AUTO):
        asked = replace(core, layers=(0.0, 0.5))
        out = ci.generate(model(), [prompt(9, 0)], asked, groups=groups(asked), max_new_tokens=3)
        assert out.stats.kept_neurons == (F // 2, F // 2, F)
        assert out.stats.choices[0].group == reference_group(prompt(9, 0))


@pytest.mark.parametrize(("core", "compacted"), one_quick_in(3, [SIMILARITY, STEADY, FUSED], [True, False]))
def test_rows_of_a_batch_equal_their_single_runs(core: Chooser, compacted: bool) -> None:
    rows = [prompt(5, 0), prompt(45, 1), prompt(64, 2), prompt(33, 3)]
    ready = groups(SIMILARITY, compacted)
    batch = ci.generate(model(), rows, core, groups=ready, max_new_tokens=9)
    for b, row in enumerate(rows):
        single = ci.generate(model(), [row], core, groups=ready, max_new_tokens=9)
        same(single, batch, b)
        assert single.stats.choices[0].method == batch.stats.choices[b].method
    if core.method == "auto":
        assert {choice.method for choice in batch.stats.choices} == {"similarity", "stability"}
        assert batch.stats.method == "mixed"


def test_rows_that_share_a_set_are_assigned_together() -> None:
    rows = [prompt(20, 0), prompt(20, 0), prompt(20, 1)]
    for core in (SIMILARITY, AUTO, FUSED):
        shared = replace(core, per_row=False)
        out = ci.generate(model(), rows, shared, groups=groups(), max_new_tokens=9)
        assert len(out.stats.choices) == 1
        assert out.core is not None
        assert out.core.rows is None
        given = ci.generate(model(), rows, out.core, max_new_tokens=9)
        np.testing.assert_array_equal(out.tokens, given.tokens)


@pytest.mark.parametrize(("length", "prior"), [(1, 64.0), (6, 64.0), (40, 64.0), (40, 3.0)])
def test_fused_equals_numpy(length: int, prior: float) -> None:
    tokens = prompt(length, 7)
    core = replace(FUSED, group_tokens=prior)
    out = ci.generate(model(), [tokens], core, groups=groups(), max_new_tokens=2)
    group = reference_group(tokens)
    assert out.stats.choices == (ci.Choice("fused", "asked for", None, group),)
    for l, a in enumerate(activations(model(), tokens)):
        votes = reference_votes(a, 0.4, "per_token").astype(np.float32)
        score = votes + np.float32(prior) * clusters().frequencies[group, l]
        np.testing.assert_array_equal(out.core.layers[l], top(score, a.sum(axis=0), F // 2))


@pytest.mark.parametrize(
    ("name", "sizes"), half_slow(["opt", "llama"], [(2, 0.5), (7, 0.5), (40, 0.2), (65, 0.7), (3, 1.0)])
)
def test_stability_figure_equals_numpy(name: str, sizes: tuple[int, float]) -> None:
    length, beta = sizes
    params = random_model({"opt": OPT, "llama": LLAMA}[name])
    tokens = prompt(length, 1)
    out = ci.generate(params, [tokens], ci.Auto(beta=beta), max_new_tokens=2)
    figure = 1.0 if beta == 1 else reference_figure(params, tokens, int(beta * F))
    assert out.stats.choices[0].stability == pytest.approx(figure, abs=1e-6)


def auto(tokens: list[int], ready: ci.Groups | None = None, **settings: object) -> tuple[ci.Choice, ci.Generation]:
    core = replace(AUTO, **settings)
    out = ci.generate(model(), [tokens], core, groups=ready, max_new_tokens=5)
    return out.stats.choices[0], out


def test_boundaries_of_the_automatic_choice() -> None:
    tokens = prompt(40, 0)
    figure = auto(tokens, groups())[0].stability
    above = float(np.nextafter(np.float32(figure), np.float32(2)))
    cases = [
        ({"least_stability": figure, "least_tokens": 40}, "stability", "stable"),
        ({"least_stability": above, "least_tokens": 40}, "similarity", "unstable: stability"),
        ({"least_stability": figure, "least_tokens": 41}, "similarity", "unstable: 40 voting tokens, fewer than 41"),
        ({"least_stability": -1, "least_tokens": 2}, "stability", "stable"),
    ]
    for settings, method, reason in cases:
        choice, out = auto(tokens, groups(), **settings)
        assert (choice.method, out.stats.method) == (method, method)
        assert choice.reason.startswith(reason)
        asked = ci.generate(
            model(),
            [tokens],
            SIMILARITY if method == "similarity" else replace(VOTES, beta=AUTO.beta),
            groups=groups() if method == "similarity" else None,
            max_new_tokens=5,
        )
        same(asked, out)


def test_of_rows_that_share_a_set_the_shortest_counts() -> None:
    core = replace(AUTO, per_row=False, least_stability=-1.0)
    for length, method in ((31, "similarity"), (32, "stability")):
        out = ci.generate(model(), [prompt(40, 0), prompt(length, 1)], core, groups=groups(), max_new_tokens=2)
        assert out.stats.method == method


def test_a_bos_that_does_not_vote_is_not_counted() -> None:
    choice, _ = auto(prompt(32, 0), count_bos=False)
    assert choice.reason.startswith("unstable: 31 voting tokens")


def test_an_unstable_prompt_without_groups_stays_with_its_own_neurons_and_says_so() -> None:
    choice, out = auto(prompt(6, 0))
    assert (choice.method, choice.group) == ("stability", None)
    assert choice.reason == "unstable: 6 voting tokens, fewer than 32; no groups were given to choose from"
    same(ci.generate(model(), [prompt(6, 0)], replace(VOTES, beta=0.5), max_new_tokens=5), out)


@pytest.mark.parametrize("compacted", first_quick([True, False]))
def test_different_ratios_of_prompts_and_groups(compacted: bool) -> None:
    core = replace(AUTO, gamma=0.25, least_stability=-1.0)
    ready = groups(core, compacted)
    for tokens, kept in ((prompt(40, 0), F // 2), (prompt(6, 0), F // 4)):
        out = ci.generate(model(), [tokens], core, groups=ready, max_new_tokens=5)
        assert out.stats.kept_neurons == (kept,) * L
    batch = ci.generate(model(), [prompt(40, 0)] * 2, replace(core, per_row=False), groups=ready, max_new_tokens=5)
    assert batch.stats.kept_neurons == (F // 2,) * L
    message = refusal(lambda: ci.generate(model(), [prompt(40, 0)] * 2, core, groups=ready, max_new_tokens=5))
    assert "beta=0.5 keeps 48 neurons and gamma=0.25 24" in message


def test_switching_between_compacted_groups_traces_and_gathers_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    ready = groups()
    ci.generate(model(), [prompt(20, 0)], SIMILARITY, groups=ready, max_new_tokens=9)

    def gather(*arguments: object) -> None:
        raise AssertionError("a gather")

    monkeypatch.setattr("coreinfer_jax.sparsity.choice.narrow", gather)
    with traced() as messages:
        outs = [ci.generate(model(), [prompt(20, s)], SIMILARITY, groups=ready, max_new_tokens=9) for s in range(3)]
    assert messages == []
    assert [out.stats.choices[0].group for out in outs] == [0, 1, 2]


@pytest.mark.parametrize("core", first_quick([STEADY, SIMILARITY, FUSED]), ids=lambda core: core.method)
def test_within_a_bucket_no_method_traces_again(core: Chooser) -> None:
    for length in (5, 40):  # `auto` has a program for either choice
        ci.generate(model(), [prompt(length, 0)], core, groups=groups(), max_new_tokens=9)
    with traced() as messages:
        for length in (9, 33, 50):
            out = ci.generate(model(), [prompt(length, length)], core, groups=groups(), max_new_tokens=9)
            assert out.stats.choices[0].group is not None
    assert messages == []


@pytest.mark.parametrize("core", first_quick([AUTO, SIMILARITY, FUSED]), ids=lambda core: core.method)
def test_a_conversation_is_that_of_its_whole_text(core: Chooser) -> None:
    first, second = prompt(30, 0), prompt(9, 1)[1:]
    *_, (_, conversation) = ci.converse(model(), first, core=core, groups=groups(), max_new_tokens=5)
    tokens = [*first, *second]
    chunks = [c for c, _ in ci.converse(model(), tokens, conversation, core, groups=groups(), max_new_tokens=5)]
    whole = ci.generate(model(), [tokens], core, groups=groups(), max_new_tokens=5)
    np.testing.assert_array_equal(np.concatenate([c.tokens for c in chunks], axis=1), whole.tokens)
    assert chunks[0].core == whole.core
    assert chunks[0].stats.cached_tokens == (0 if core.method == "auto" else 30,)


def test_a_conversation_with_other_groups_is_read_again() -> None:
    *_, (_, conversation) = ci.converse(model(), prompt(30, 0), core=SIMILARITY, groups=groups(), max_new_tokens=5)
    others = ci.prepare_groups(model(), clusters(1), SIMILARITY)
    chunk, _ = next(ci.converse(model(), [*prompt(30, 0), 5], conversation, SIMILARITY, groups=others))
    assert chunk.stats.cached_tokens == (0,)


def generate(core: Core, ready: object) -> object:
    return ci.generate(model(), [prompt(5, 0)], core, groups=ready)


def prepare(core: object = SIMILARITY, params: ci.Params | None = None, **changes: object) -> object:
    return ci.prepare_groups(params or model(), replace(clusters(), **changes), core)


MISTAKES = {
    "similarity without groups": (lambda: generate(SIMILARITY, None), "'similarity' needs groups"),
    "fused without groups": (lambda: generate(FUSED, None), "'fused' needs groups"),
    "groups that are clusters": (lambda: generate(SIMILARITY, clusters()), "prepare_groups"),
    "groups for stability": (lambda: generate(ci.CoreConfig(), groups()), "not used by the method 'stability'"),
    "groups for the full model": (lambda: generate(None, groups()), "leave groups out"),
    "groups for given neurons": (lambda: generate(ci.CoreNeurons([[1]] * L), groups()), "leave groups out"),
    "another gamma": (lambda: generate(replace(SIMILARITY, gamma=0.3), groups()), "48 neurons"),
    "other layers": (lambda: generate(replace(SIMILARITY, layers=(0.0, 0.5)), groups()), "layers=(0.0, 0.5)"),
    "another alpha": (lambda: generate(replace(SIMILARITY, votes=ci.rules.Votes(alpha=0.3)), groups()), "alpha=0.4"),
    "another budget": (
        lambda: generate(replace(SIMILARITY, votes=ci.rules.Votes(budget="mean")), groups()),
        "budget='per_token'",
    ),
    "a BOS left out": (lambda: generate(replace(SIMILARITY, count_bos=False), groups()), "count_bos=True"),
    "groups of other params": (
        lambda: ci.generate(random_model(OPT, seed=1), [[5]], SIMILARITY, groups=groups()),
        "other params",
    ),
    "another model": (lambda: prepare(params=random_model(OPT, seed=1)), "fingerprint"),
    "another family": (lambda: prepare(params=random_model(LLAMA)), "fingerprint"),
    "clusters that are none": (lambda: ci.prepare_groups(model(), groups(), SIMILARITY), "load_clusters"),
    "settings that are none": (lambda: prepare(None), "core=None"),
    "narrow layers": (lambda: prepare(replace(SIMILARITY, layers=(0.4, 0.5))), "selects none"),
    "ranks as frequencies": (lambda: prepare(FUSED, origin="published"), "'fused'"),
    "an unknown method": (lambda: chooser_of({"method": "nearest"}), "method='nearest'"),
    "a method that is none": (lambda: chooser_of({"method": 3}), "method=3"),
    "gamma of 0": (lambda: ci.Similarity(gamma=0), "gamma=0"),
    "gamma of NaN": (lambda: ci.Auto(gamma=float("nan")), "gamma=nan"),
    "a figure above 1": (lambda: ci.Auto(least_stability=1.5), "least_stability=1.5"),
    "half a token": (lambda: ci.Auto(least_tokens=2.5), "least_tokens=2.5"),
    "one token": (lambda: ci.Auto(least_tokens=1), "least_tokens=1"),
    "a negative group": (lambda: ci.Fused(group_tokens=-1), "group_tokens=-1"),
    "a negative prior": (lambda: ci.rules.Contribution(prior_tokens=-1), "prior_tokens=-1"),
    "an unknown rule": (lambda: ci.CoreConfig(rule="best"), "rule='best'"),
    "a rule for groups": (lambda: ci.Auto(votes=ci.rules.Energy()), "groups are made of votes"),
    "a prior for groups": (lambda: ci.Auto(votes=ci.rules.Votes(prior_tokens=3)), "leave prior_tokens out"),
    "a prior that no calibration holds": (
        lambda: generate(ci.CoreConfig(rule=ci.rules.Energy(prior_tokens=3)), None),
        "rule 'energy': generates without a prior",
    ),
    "more than the mean": (lambda: ci.CoreConfig(compensation=1.5), "compensation=1.5"),
    "compensation of NaN": (lambda: ci.CoreConfig(compensation=float("nan")), "compensation=nan"),
    "an endless prior": (lambda: ci.rules.Contribution(prior_tokens=float("inf")), "prior_tokens=inf"),
    "a prior beyond float32": (lambda: ci.rules.Contribution(prior_tokens=10**400), "prior_tokens="),
}


@pytest.mark.parametrize(("mistake", "named"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes(mistake: object, named: str) -> None:
    assert named in refusal(mistake)


EMBEDDED = [pytest.param(f"embedded:{family}", marks=pytest.mark.slow) for family in ("opt", "llama")]


@pytest.mark.parametrize("source", ["{opt}", *EMBEDDED])
def test_auto_takes_a_short_question_by_its_group_and_a_long_article_by_itself(
    source: str, shallow: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    params, tokenizer = ci.load(source.format(**shallow), "float32")
    wiki = ci.read_documents(data / "text" / "wiki.txt")
    corpus = replace(wiki, texts=wiki.texts[:16], labels=("a", "b") * 8)
    made = ci.build_clusters(tmp_path / "clusters", params, tokenizer, corpus, max_tokens=64)
    core = ci.Auto()
    ready = ci.prepare_groups(params, made, core, compacted=False)
    article = next(ids for text in wiki.texts[16:] if len(ids := tokenizer.encode(text)) >= 300)[:300]
    question = tokenizer.encode("Where is the old king?")[:6]
    assert len(question) == 6
    chosen = [
        ci.generate(params, [tokens], core, groups=ready, max_new_tokens=1).stats.choices[0]
        for tokens in (question, article)
    ]
    assert [choice.method for choice in chosen] == ["similarity", "stability"]
