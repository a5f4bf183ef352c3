"""`python -m benchmarks NAME` appends a measurement to results/; `... report` fills the documents from them."""

import argparse
import json
from pathlib import Path

from benchmarks import first_run, group_switch, keep_ratio, prediction, report, static_argument
from benchmarks.environment import RESULTS

MEASUREMENTS = {
    "static-argument": lambda options: static_argument.measure(),
    "group-switch": lambda options: group_switch.measure(),
    "prediction": lambda options: prediction.measure(),
    "keep-ratio": lambda options: keep_ratio.measure(options.texts),
    "first-run": lambda options: first_run.measure(),
}


def main() -> None:
    """Run one measurement or the report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    parser.add_argument("what", choices=(*MEASUREMENTS, "report"))
    parser.add_argument(
        "--texts", type=Path, default=Path("../shared/data/text"), help="folder of stories.txt and prose.txt"
    )
    options = parser.parse_args()
    if options.what == "report":
        report.update()
        return
    result = json.dumps(MEASUREMENTS[options.what](options))
    print(result)
    with (RESULTS / f"{options.what}.jsonl").open("a", encoding="utf-8") as file:
        file.write(result + "\n")


if __name__ == "__main__":
    main()
