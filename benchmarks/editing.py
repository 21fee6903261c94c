"""What edits of components cost beside fine-tuning: `python -m benchmarks.editing`, about half an hour on one core.

Three parts: removing a class from the digits classifier, removing words from a small language model (with `--data`),
and monitors of a backdoor that was trained in. `--smoke` runs tiny versions in seconds, whose figures mean nothing.
"""

import argparse
from pathlib import Path

from benchmarks import editing_digits, editing_language, editing_monitor
from benchmarks.images import data_folder
from benchmarks.report import RESULTS


def main() -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "editing", help="folder to write to")
    parser.add_argument(
        "--data", type=Path, help="folder of data sets; else the environment variable WEIGHTDECOMP_DATA"
    )
    parser.add_argument("--smoke", action="store_true", help="tiny, in seconds; figures mean nothing, and need --out")
    arguments = parser.parse_args()
    if arguments.smoke and arguments.out == RESULTS / "editing":
        parser.error("--smoke writes figures that mean nothing; give a folder with --out")
    folder = data_folder(arguments.data)
    editing_digits.run(arguments.out, arguments.smoke)
    editing_monitor.run(arguments.out, arguments.smoke)
    if folder is not None:
        editing_language.run(arguments.out, folder, arguments.smoke)
    else:
        print("no data folder: the language model is left out; pass --data")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
