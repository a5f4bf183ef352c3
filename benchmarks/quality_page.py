"""The generated parts of docs/quality.md, from committed results: tables, and a picture of loss against bytes."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import coreinfer_jax as ci
from benchmarks.environment import REPOSITORY, read_results
from benchmarks.quality import PROMPT, SWEPT_KEEP
from benchmarks.tables import made_on, markdown
from coreinfer_jax.lab.evaluation.comparison import POSITIONS_PER_BIN
from coreinfer_jax.sparsity.allocate import PARTS, allocate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PAGE = REPOSITORY / "docs" / "quality.md"
PICTURE = PAGE.parent / "quality" / "rules.png"
Result = dict[str, Any]
# Whether the model is calibrated, then rule, compensation, prior tokens, known, allocation.
Key = tuple[bool, str, float, float, str, str]
PAPER: Key = (False, "votes", 0.0, 0.0, "context", "equal")
RANDOM: Key = (False, "random", 0.0, 0.0, "context", "equal")
RECOMMENDED: Key = (False, "contribution", 0.5, 0.0, "context", "sensitivity")
CALIBRATED: Key = (True, "contribution", 0.5, 256.0, "context", "sensitivity")
# Below it no difference matters; ceilings fall to 0, which a logarithm has no place for.
LEAST_KL = 1e-3

# What the picture shows, with the look of its line.
DRAWN: dict[Key, tuple[str, str, str]] = {
    RANDOM: ("0.6", ":", "x"),
    PAPER: ("k", "-", "o"),
    (False, "griffin", 0.0, 0.0, "context", "equal"): ("tab:orange", "--", "v"),
    (False, "contribution", 0.5, 0.0, "context", "equal"): ("tab:blue", ":", "s"),
    RECOMMENDED: ("tab:blue", "--", "s"),
    CALIBRATED: ("tab:blue", "-", "D"),
    (False, "contribution", 0.5, 0.0, "continuation", "equal"): ("tab:green", ":", "^"),
    (True, "contribution", 0.5, 0.0, "continuation", "sensitivity"): ("tab:green", "-.", "^"),
    (False, "token-norm", 0.0, 0.0, "context", "equal"): ("tab:red", "-.", "*"),
}


def newest() -> list[Result]:
    """The newest result of each model and kind of text."""
    return list({(r["model"], r["switched"]): r for r in read_results("quality")}.values())


def key_of(setting: Result) -> Key:
    """What a setting does, whatever it keeps and of which prompts."""
    named = ("calibrated", "rule", "compensation", "prior_tokens", "known", "allocation")
    calibrated, rule, compensation, prior, known, allocation = (setting[name] for name in named)
    return calibrated, rule, compensation, prior, known, allocation


def title(key: Key) -> str:
    """A variant in words."""
    calibrated, rule, compensation, prior, known, allocation = key
    extras = [f"{compensation:.0%} of mean"] if compensation else []
    extras += [f"prior {prior:g}"] if prior else []
    extras += [("measured layers" if calibrated else "larger first layer")] if allocation == "sensitivity" else []
    extras += ["sees the continuation"] if known == "continuation" else []
    return ", ".join([rule, *extras])


def sections() -> dict[str, Callable[[], str]]:
    """What makes each of the page's generated sections, by its name."""
    return {
        "quality": _summary,
        "quality rules": partial(_by_rule, switched=False),
        "quality switched": partial(_by_rule, switched=True),
        "quality layers": _by_layer,
        "quality lengths": _by_length,
        "quality positions": _by_position,
        "quality sweeps": _sweeps,
        "free running": _free_running,
    }


def _settings(result: Result, prompt: int) -> dict[tuple[Key, float], Result]:
    return {(key_of(s), s["keep"]): s for s in result["settings"] if s["prompt_tokens"] == prompt}


def _by_rule(switched: bool) -> str:
    """Per model: the KL divergence of every variant at every keep ratio, and its share of the paper's rule's."""
    parts = []
    for result in newest():
        if result["switched"] == switched:
            settings = _settings(result, PROMPT)
            keeps = sorted({keep for _, keep in settings})
            rows = [["", *(f"keep {keep:g}" for keep in keeps), "agreement at 0.4"]]
            for key in dict.fromkeys(key for key, _ in settings):
                cells = [_cell(settings, key, keep) for keep in keeps]
                rows.append([title(key), *cells, f"{settings[key, 0.4]['agreement']['mean']:.1%}"])
            parts.append(f"### {result['model']}\n\n{markdown(rows)}\n\n{_conditions(result)}")
    return "\n\n".join(parts) or "No results yet."


def _cell(settings: dict[tuple[Key, float], Result], key: Key, keep: float) -> str:
    """A KL divergence and its share of the paper's; whether intervals lie apart, and whether chance is as good."""
    own, paper, chance = (settings[k, keep]["kl"] for k in (key, PAPER, RANDOM))
    shown = f"{own['mean']:.3f}, {own['mean'] / paper['mean']:.0%}"
    if key != PAPER and _apart(own, paper):
        shown += " \\*"
    return f"{shown} (no better than chance)" if key != RANDOM and own["mean"] >= chance["mean"] else shown


def _apart(one: Result, other: Result) -> bool:
    return one["ci95"][1] < other["ci95"][0] or other["ci95"][1] < one["ci95"][0]


def _summary() -> str:
    """The paper's votes and the default, without a calibration and with one."""
    rows = [["model, neurons kept", "the paper's votes", "default", "calibrated, constants"]]
    for result in newest():
        if not result["switched"]:
            settings = _settings(result, PROMPT)
            for keep in sorted({keep for _, keep in settings}):
                chosen = (settings[key, keep] for key in (PAPER, RECOMMENDED, CALIBRATED))
                cells = (f"{s['kl']['mean']:.3f}, {s['agreement']['mean']:.0%}" for s in chosen)
                rows.append([f"{result['model']}, {keep:.0%}", *cells])
    return f"{markdown(rows)}\n\nPrompts of {PROMPT} tokens; {made_on(*newest())}"


def _by_layer() -> str:
    """What each layer of the embedded models is worth, and what it keeps, by their calibrations."""
    totals = (0.2, 0.4, 0.6)
    head = ["", "KL where it alone keeps a quarter", *(f"kept of {total:.0%}" for total in totals)]
    rows = [head]
    for name in ("opt", "llama"):
        params, _ = ci.load(f"embedded:{name}")
        assert params.calibration is not None
        gains = params.calibration.gains
        assert gains is not None
        kept = [allocate(ci.CoreConfig(beta=total), params.config, gains) for total in totals]
        for l, lost in enumerate(gains[:, PARTS // 4 :].sum(axis=1)):
            shares = (f"{layers[l] / params.config.mlp_size:.0%}" for layers in kept)
            rows.append([f"embedded:{name}, layer {l}", f"{lost:.4f}", *shares])
    return markdown(rows)


def _by_length() -> str:
    """Shares of the paper's rule's KL divergence by prompt length, of the variants in the picture."""
    parts = []
    for result in newest():
        if not result["switched"]:
            lengths = sorted({s["prompt_tokens"] for s in result["settings"]})
            by_length = {n: _settings(result, n) for n in lengths}
            keeps = sorted({keep for _, keep in by_length[PROMPT]})
            rows = [["", *(f"{n} tokens, keep {keep:g}" for n in lengths for keep in keeps)]]
            for key in DRAWN:
                own = [(by_length[n][key, keep], by_length[n][PAPER, keep]) for n in lengths for keep in keeps]
                rows.append([title(key), *(f"{a['kl']['mean'] / b['kl']['mean']:.0%}" for a, b in own)])
            parts.append(f"### {result['model']}\n\n{markdown(rows)}")
    return "\n\n".join(parts) or "No results yet."


def _by_position() -> str:
    """KL divergence at keep 0.4 against decode position, of what the picture shows."""
    results = [result for result in newest() if not result["switched"]]
    rows: list[list[str]] = []
    for result in results:
        settings = _settings(result, PROMPT)
        own = {key: settings[key, SWEPT_KEEP]["kl_by_position"] for key in (PAPER, RECOMMENDED, CALIBRATED)}
        bins = range(len(own[PAPER]))
        ends = [min((i + 1) * POSITIONS_PER_BIN, result["continuation"]) for i in bins]
        head = ["", *(f"{i * POSITIONS_PER_BIN + 1} to {end}" for i, end in zip(bins, ends, strict=True))]
        rows = rows or [head]
        rows += [[f"{result['model']}, {title(key)}", *(f"{kl:.3f}" for kl in means)] for key, means in own.items()]
    return markdown(rows) if rows else "No results yet."


def _sweeps() -> str:
    """KL divergence by alpha, and by layers with the bytes they leave to read."""
    results = [result for result in newest() if not result["switched"]]
    if not results:
        return "No results yet."
    rows = [["", *(f"{r['model']}: KL, MB per token" for r in results)]]
    # The setting that both sweeps have stands once.
    by_title = {_swept_title(same[0]): same for same in zip(*(result["swept"] for result in results), strict=True)}
    rows += [
        [name, *(f"{s['kl']['mean']:.3f}, {s['bytes_per_token'] / 1e6:.1f}" for s in same)]
        for name, same in by_title.items()
    ]
    return markdown(rows)


def _swept_title(setting: Result) -> str:
    layers = tuple(setting["layers"])
    if layers == (0.0, 1.0) and setting["rule"] == "votes":
        return f"votes, alpha {setting['alpha']:g}"
    return f"{setting['rule']}, layers {layers[0]:g} to {layers[1]:g} of depth"


def _free_running() -> str:
    """Per model: what greedy continuations look like, in means and their intervals."""
    parts = []
    for result in {r["model"]: r for r in read_results("free-running")}.values():
        rows = [["", "like the full model's, tokens", "repeated 4-grams", "length, tokens"]]
        rows.append(["all neurons", *_written(result["dense"])])
        rows += [[f"{s['rule']}, keep {s['keep']:g}", *_written(s)] for s in result["settings"]]
        told = (
            f"{result['texts']} texts, prompts of {result['prompt_tokens']} tokens, {result['new_tokens']} new tokens"
        )
        calibrated = "calibrated" if result["calibrated"] else "not calibrated"
        parts.append(f"### {result['model']}\n\n{markdown(rows)}\n\n{told}, {calibrated}; {made_on(result)}")
    return "\n\n".join(parts) or "No results yet."


def _written(figures: Result) -> list[str]:
    digits = {"departure": 1, "repetition": 3, "length": 1}
    return [
        f"{figures[name]['mean']:.{n}f} ({figures[name]['ci95'][0]:.{n}f} .. {figures[name]['ci95'][1]:.{n}f})"
        for name, n in digits.items()
    ]


def _conditions(result: Result) -> str:
    what = f"{result['texts']} texts, prompts of {PROMPT} tokens, {result['continuation']} tokens scored"
    return f"{what}; prior from {result['tokens_of_prior']} tokens; {made_on(result)}"


def draw() -> None:
    """The picture: KL divergence against the share of neurons read, one panel per model."""
    from matplotlib.figure import Figure

    results = [result for result in newest() if not result["switched"]]
    if not results:
        return
    figure = Figure(figsize=(4.2 * len(results), 5), layout="constrained")
    panels: Sequence[Axes] = figure.subplots(1, len(results), squeeze=False, sharey=True)[0]
    for axes, result in zip(panels, results, strict=True):
        _draw_model(axes, result)
    panels[0].set_ylabel("KL(all neurons || kept), nats per token")
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize="small", loc="outside lower center", ncols=3)
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=120)


def megabytes(result: Result) -> dict[float, float]:
    """Weights that a step reads, by keep ratio."""
    read = {float(keep): size for keep, size in result["mlp_bytes_per_token"].items()}
    widest = max(read)
    others = result["bytes_per_token"] - read[widest] / widest
    return {keep: (others + size) / 1e6 for keep, size in read.items()}


def _draw_model(axes: "Axes", result: Result) -> None:
    settings, read = _settings(result, PROMPT), megabytes(result)
    keeps = sorted(read)
    places = [read[keep] for keep in keeps]
    for key, (colour, line, marker) in DRAWN.items():
        kl = [settings[key, keep]["kl"] for keep in keeps]
        means = [value["mean"] for value in kl]
        axes.plot(places, means, color=colour, linestyle=line, marker=marker, label=title(key))
        low, high = zip(*(value["ci95"] for value in kl), strict=True)
        axes.fill_between(places, low, high, color=colour, alpha=0.15)
    axes.set(title=result["model"], xlabel="MB of weights read per token", yscale="log")
    axes.set_ylim(bottom=LEAST_KL)
    kept = axes.secondary_xaxis("top")
    kept.set_xticks(places, [f"{keep:.0%}" for keep in keeps])
    kept.set_xlabel("neurons kept")
    axes.grid(alpha=0.3)
