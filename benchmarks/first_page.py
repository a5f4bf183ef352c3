"""The tables of README.md, from committed results: what a token takes, and what fewer neurons cost."""

from benchmarks.environment import read_results
from benchmarks.performance import COMPILED, EAGER, OURS, Result, Side, conditions, decode_runs
from benchmarks.tables import made_on, markdown

# Who generates, in weights of which type, and how the table calls it.
SHOWN: dict[str, Side] = {
    "transformers (PyTorch), eager, bfloat16": Side(EAGER, None, "bfloat16"),
    "transformers (PyTorch), compiled, bfloat16": Side(COMPILED, None, "bfloat16"),
    "llama.cpp, float16": Side(("llama.cpp",), None, "F16"),
    "llama.cpp, 4 bits (Q4_0)": Side(("llama.cpp",), None, "Q4_0"),
    "coreinfer_jax, all neurons, bfloat16": Side(OURS, None, "bfloat16"),
    "coreinfer_jax, 40 % of the neurons, bfloat16": Side(OURS, 0.4, "bfloat16"),
    "coreinfer_jax, 20 % of the neurons, bfloat16": Side(OURS, 0.2, "bfloat16"),
}
# Of what keep-ratio.jsonl measured: how neurons are chosen, which shares of them, after prompts of how many tokens.
WAYS = {"paper": "chosen as in the paper", "recommended": "`CoreConfig()`", "calibrated": "`CoreConfig()`, calibrated"}
KEEPS, PROMPT = ("0.8", "0.5", "0.4", "0.2"), "64"


def speed() -> str:
    """Milliseconds per new token: a table for CPUs and one for accelerators, a column for each model."""
    runs: dict[bool, dict[str, list[Result]]] = {True: {}, False: {}}
    for title, results in decode_runs().items():
        runs[title.endswith("cpu")][title.partition(";")[0]] = results
    return "\n\n".join(_speed(of_kind) for of_kind in runs.values() if of_kind)


def _speed(runs: dict[str, list[Result]]) -> str:
    """A row for each of `SHOWN` that was measured."""
    rows = [["milliseconds per new token", *runs]]
    for name, side in SHOWN.items():
        found = [side.fastest(results) for results in runs.values()]
        if any(found):
            rows.append([name, *("" if r is None else f"{r['decode_ms_per_token']['median']:.1f}" for r in found)])
    together = [result for results in runs.values() for result in results]
    return f"{markdown(rows)}\n\n{conditions(together)}"


def quality() -> str:
    """How many times larger the perplexity of each embedded model gets, by the share of neurons kept."""
    result = read_results("keep-ratio")[-1]
    rows = [["model", "neurons kept", "weights read", *WAYS.values()]]
    for name, found in result["models"].items():
        perplexity = found["perplexity"][PROMPT]
        for keep in KEEPS:
            ratios = [f"{perplexity[way][keep] / perplexity['dense']:.2f}" for way in WAYS]
            rows.append([f"embedded:{name}", f"{float(keep):.0%}", f"{found['bytes_share'][keep]:.0%}", *ratios])
    what = (
        f"Perplexity of the {result['continuation_tokens']} tokens that follow a prompt of {PROMPT} tokens, as a "
        "multiple of the full model's (1.00 is no loss). "
    )
    return f"{markdown(rows)}\n\n{what}{made_on(result)}"
