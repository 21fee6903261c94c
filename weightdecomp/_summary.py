"""The printed table of a decomposition."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from weightdecomp._sites import NO_PATTERN

if TYPE_CHECKING:
    from weightdecomp._decomposition import Decomposition

_LISTED = 3  # names of matrices that the user left out
_SMALL = 0.05  # a circuit is listed as frequent above this


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as aligned columns: the first to the left, the others to the right; the first row is the header."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    rule = "-" * len(lines[0])
    return "\n".join([lines[0], rule, *lines[1:]])


def summary(decomposition: "Decomposition") -> str:
    """Sites, components, activity, bits and verdict, as text."""
    outcome = decomposition.outcome
    rows = [["site", "shape", "components", "live", "active per input", "unexplained |W|^2", "start"]]
    for site in decomposition.sites:
        parts = decomposition.parts[site.path]
        share = float(decomposition.remainders[site.path].norm() / site.matrix().norm()) ** 2
        rows.append(
            [
                site.path or "(model)",
                "x".join(map(str, site.shape)),
                str(parts.pieces.n),
                str(int((parts.frequencies > 0).sum())),
                f"{float(parts.frequencies.sum()):.2f}",
                f"{share:.1e}" if share < 0.001 else f"{share:.1%}",
                parts.start,
            ]
        )
    ledger = outcome.ledger
    live = sum(1 for f in decomposition.group_frequencies if f > 0)
    lines = [
        table(rows),
        "",
        f"divergence   {decomposition.divergence.name} ({decomposition.divergence.reason})",
        f"damage       {outcome.reason}",
        f"bits         {ledger.per_input:.2f} per input (naming {ledger.naming / ledger.n_inputs:.2f}, values "
        f"{ledger.values / ledger.n_inputs:.2f}, residual {ledger.residual / ledger.n_inputs:.3f}) + dictionary "
        f"{ledger.dictionary:,.0f}; always on {outcome.dense_bits:.2f}",
        f"verdict      {outcome.verdict}",
        f"circuits     {live} live of {len(decomposition.groups)}",
    ]
    matrices = [one for one in decomposition.skipped if "vector" not in one.reason]
    others = [one.name for one in matrices if one.reason == NO_PATTERN]
    if len(others) == 1:
        lines.append(f"not decomposed: {others[0]} {NO_PATTERN}")
    elif others:
        shown = ", ".join(others[:_LISTED]) + (", ..." if len(others) > _LISTED else "")
        lines.append(
            f"not decomposed: {len(others)} matrices that match none of the given patterns in sites= ({shown})"
        )
    lines += [f"not decomposed: {one.name} {one.reason}" for one in matrices if one.reason != NO_PATTERN]
    vectors = len(decomposition.skipped) - len(matrices)
    if vectors:
        lines.append(f"not decomposed: {vectors} vectors (biases and gains), kept as in the target")
    return "\n".join(lines)
