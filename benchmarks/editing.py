"""What edits of components do beside fine-tuning: `python -m benchmarks.editing`, about ten minutes on one core.

Two parts: removing a class from the digits classifier, and monitors of backdoors. `--smoke` runs tiny versions in
seconds, whose figures mean nothing.
"""

import argparse
from pathlib import Path

from benchmarks import editing_digits, editing_monitor
from benchmarks.report import RESULTS


def main() -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "editing", help="folder to write to")
    parser.add_argument("--smoke", action="store_true", help="tiny, in seconds; figures mean nothing, and need --out")
    arguments = parser.parse_args()
    if arguments.smoke and arguments.out == RESULTS / "editing":
        parser.error("--smoke writes figures that mean nothing; give a folder with --out")
    editing_digits.run(arguments.out, arguments.smoke)
    editing_monitor.run(arguments.out, arguments.smoke)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
