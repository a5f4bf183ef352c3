"""The tables of README.md, from committed results: what a token takes, and what fewer neurons cost."""

from benchmarks import chat_model
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
# Of what chat-model.jsonl measured: the kinds of text, how neurons are chosen, and which shares of them.
KINDS = (chat_model.OWN, chat_model.NEWS)
WAYS = {
    "votes (the paper)": "chosen as in the paper",
    "GRIFFIN": "chosen by GRIFFIN",
    chat_model.OURS: "`CoreConfig()`, calibrated",
}
KEEPS = (0.8, 0.6, 0.4, 0.2)


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
    """What SmolLM2 loses on its own answers and on other texts, by the share of neurons kept and the way to choose."""
    found = {kind: chat_model.newest()[kind] for kind in KINDS}
    rows = [["SmolLM2-135M, texts", "neurons kept", *WAYS.values()]]
    for kind in KINDS:
        of = {(own["name"], own["keep"]): own for own in found[kind]["settings"]}
        for keep in KEEPS:
            cells = (
                f"{own['kl']['mean']:.2f}, {own['agreement']['mean']:.0%}" for own in (of[way, keep] for way in WAYS)
            )
            rows.append([kind, f"{keep:.0%}", *cells])
    what = (
        "KL divergence from the full model in nats per token (0 is no loss), and the share of tokens on which both "
        "agree; all columns read the same bytes. "
    )
    return f"{markdown(rows)}\n\n{what}{made_on(*found.values())}"
