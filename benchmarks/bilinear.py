"""What do closed forms of bilinear layers find on trained models, and what do they cost?

`python -m benchmarks.bilinear` runs all parts: classifiers of MNIST and Fashion-MNIST, a small language model, speed.
Data sets are read from `--data` or the folder that WEIGHTDECOMP_DATA names; without them the 8 by 8 digits of
scikit-learn take their place.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import bilinear_images, bilinear_language, bilinear_speed
from benchmarks.images import DATA_VARIABLE, data_folder
from benchmarks.report import RESULTS
from benchmarks.targets import one_thread

PARTS = {"speed": bilinear_speed.run, "images": bilinear_images.run, "language": bilinear_language.run}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bilinear", description=__doc__)
    parser.add_argument("--data", help=f"folder of the data sets; by default what {DATA_VARIABLE} names")
    parser.add_argument("--only", choices=sorted(PARTS), nargs="+", help="these parts alone")
    parser.add_argument("--out", type=Path, default=RESULTS / "bilinear", help="where results go")
    parser.add_argument("--smoke", action="store_true", help="tiny, in seconds; figures mean nothing, and need --out")
    options = parser.parse_args(arguments)
    if options.smoke and options.out == RESULTS / "bilinear":
        parser.error("--smoke would replace real results; pass --out")
    try:
        folder = data_folder(options.data)
    except ValueError as error:
        parser.error(str(error))
    # One thread: decompositions of matrices crawl when threads compete, and sums then have one order.
    with one_thread():
        for name in options.only or PARTS:
            print(PARTS[name](folder, options.out, options.smoke), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
