"""What edits of components do beside fine-tuning: `python -m benchmarks.editing`, about ten minutes on one core.

Three parts: removing a class from the digits classifier, monitors of backdoors, and, where `--data` or the environment
names the folder of the 260K-parameter story model, removing words from it. `--smoke` runs tiny versions, whose figures
mean nothing.
"""

import argparse
from pathlib import Path

from benchmarks import editing_digits, editing_language, editing_monitor
from benchmarks.images import DATA_VARIABLE, data_folder
from benchmarks.report import RESULTS


def main() -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "editing", help="folder to write to")
    parser.add_argument("--data", help=f"folder of the story model; by default what {DATA_VARIABLE} names")
    parser.add_argument("--smoke", action="store_true", help="tiny, in seconds; figures mean nothing, and need --out")
    arguments = parser.parse_args()
    if arguments.smoke and arguments.out == RESULTS / "editing":
        parser.error("--smoke writes figures that mean nothing; give a folder with --out")
    try:
        data = data_folder(arguments.data)
    except ValueError as error:
        parser.error(str(error))
    editing_digits.run(arguments.out, arguments.smoke)
    editing_monitor.run(arguments.out, arguments.smoke)
    if data is None:
        print(f"editing: no --data and no {DATA_VARIABLE}, so no words are removed from the story model")
    else:
        editing_language.run(arguments.out, data, arguments.smoke)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
