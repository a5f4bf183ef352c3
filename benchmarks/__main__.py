"""`python -m benchmarks static-argument` appends a measurement to results/; `... report` fills the README from them."""

import argparse
import json

from benchmarks.environment import RESULTS
from benchmarks.report import update_readme
from benchmarks.static_argument import measure


def main() -> None:
    """Run one measurement or the report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    parser.add_argument("what", choices=("static-argument", "report"))
    what = parser.parse_args().what
    if what == "report":
        update_readme()
        return
    result = json.dumps(measure())
    print(result)
    with (RESULTS / f"{what}.jsonl").open("a", encoding="utf-8") as file:
        file.write(result + "\n")


if __name__ == "__main__":
    main()
