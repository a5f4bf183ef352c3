"""What became of damaged files, swaps and races: the counts that `tests.robustness.fuzz` wrote, as a table."""

from typing import Any

from benchmarks.environment import read_results
from benchmarks.tables import made_on, markdown

_KINDS = {
    "config": "`config.json`, `generation_config.json`",
    "safetensors": "weights in safetensors, and their index",
    "manifest": "manifests of converted checkpoints",
    "tokenizer": "files of tokenizers",
    "gguf": "GGUF files",
    "bin": "weights in PyTorch's `.bin`",
    "calibration": "calibrations",
    "lists": "lists of neurons, `.npz`",
    "clusters": "directories of clusters",
    "documents": "texts, tables and JSON lines",
    "template": "chat templates",
    "swap": "weights whose file is changed while they are read",
    "race": "two writers of one path",
}


def table() -> str:
    """The counts of the last run of each kind, and how they were made."""
    newest = {line["kind"]: line for line in read_results("robustness")}
    lines = list(newest.values())
    rows = [["input", "tried", "loaded", "refused", "failed", "slowest, s", "most memory, MiB"]]
    rows += [_row(_KINDS[line["kind"]], line) for line in lines]
    total = {name: sum(map(int, (line[name] for line in lines))) for name in ("cases", "loaded", "refused", "not_run")}
    most = {name: max(line[name] for line in lines) for name in ("slowest_seconds", "most_mebibytes")}
    rows.append(_row("all", total | most | {"failed": sum(line["failed"] for line in lines)}))
    minutes = sum(line["seconds"] for line in lines) / 60
    told = (
        f"Seed {lines[0]['seed']}, {minutes:.0f} minutes. {total['not_run']} more tokenizers and templates may have no "
        "end. Each would use up its seconds in a process with limits, so that only one in forty of them was tried. "
    )
    revisions = ", ".join(dict.fromkeys(line["git_revision"] for line in lines))
    return "\n".join([markdown(rows), "", told + made_on(lines[0] | {"git_revision": revisions})])


def _row(what: str, line: dict[str, Any]) -> list[str]:
    tried = line["cases"] - line["not_run"]
    counts = (tried, line["loaded"], line["refused"], line["failed"])
    return [what, *map(str, counts), f"{line['slowest_seconds']:.2f}", str(line["most_mebibytes"])]
