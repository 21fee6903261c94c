"""The trap suite on one page: tasks by methods, green or red with the score, and every mechanism's own behind it."""

import statistics
from collections.abc import Sequence
from html import escape
from typing import Any

from benchmarks.trap_tasks import Task


def page(cells: Sequence[dict[str, Any]], tasks: Sequence[Task], bar: float) -> str:
    """One HTML file that needs nothing else; a cell opens to one bar a mechanism of every seed."""
    methods = list(dict.fromkeys(one["method"] for one in cells))
    head = "".join(f"<th>{escape(task.name)}</th>" for task in tasks)
    rows = []
    for method in methods:
        found = [[c for c in cells if (c["task"], c["method"]) == (task.name, method)] for task in tasks]
        rows.append(f"<tr><td>{escape(method)}</td>{''.join(_cell(one, bar) for one in found)}</tr>")
    told = "".join(
        f"<li><b>{escape(t.name)}</b>{' (activation methods should win)' if t.control else ''}: {escape(t.claim)}. "
        f"Answer: {escape(t.answer)}. Source: {escape(t.source)}.</li>"
        for t in tasks
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Trap suite</title>'
        f"<style>{_STYLE}</style></head><body><h1>Trap suite</h1><p>{_ABOUT}</p>"
        f"<table><tr><th></th>{head}</tr>{''.join(rows)}</table><ul>{told}</ul></body></html>\n"
    )


def _cell(found: Sequence[dict[str, Any]], bar: float) -> str:
    scores = [one["score"] for one in found if "score" in one]
    if not scores:
        reason = next((one["reason"] for one in found if one["reason"]), "not run yet")
        return f'<td class="none" title="{escape(reason)}">n/a</td>'
    score = statistics.median(scores)
    shown = [one for one in found if "score" in one]
    pictures = "".join(f"<div>{_caption(one)}{_bars(one, bar)}</div>" for one in shown)
    kind = "yes" if score >= bar else "no"
    return f'<td class="{kind}"><details><summary>{score:.2f}</summary>{pictures}</details></td>'


def _caption(one: dict[str, Any]) -> str:
    return f"seed {one['seed']}, {escape(one['setting'])}, {one['units']} units"


def _bars(one: dict[str, Any], bar: float) -> str:
    """What was found of every mechanism, beside the whole of it (grey)."""
    scores = [score for trap in one["scores"] for score in trap]
    width, height = 8, 40
    parts = []
    for i, score in enumerate(scores):
        filled = max(score, 0.0) * height
        color = "#1b7837" if score >= bar else "#b2182b"
        for top, tall, fill in ((0.0, height, "#e4e4e4"), (height - filled, filled, color)):
            box = f'x="{i * width}" y="{top:.1f}" width="{width - 1}" height="{tall:.1f}"'
            parts.append(f'<rect {box} fill="{fill}"/>')
    return f'<svg width="{width * len(scores)}" height="{height}" role="img">{"".join(parts)}</svg>'


_ABOUT = (
    "A number is the median over seeds of causal-effect matching: per mechanism, how much of the change that deleting "
    "it makes is reproduced by taking out one group of the method's units, groups disjoint; 1 is exact. Green: at "
    "least 0.95. Of every baseline the best setting of its grid is shown, of ours the one default. Click a number: "
    "one bar a mechanism, grey is the truth."
)
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1a1a1a; max-width: 80rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: .3rem .5rem; border: 1px solid #fff }
th { font-weight: 600; max-width: 7rem } td:first-child { text-align: left; white-space: nowrap }
td { text-align: center; vertical-align: top }
.yes { background: #b8e0c0 } .no { background: #f3c1bb } .none { background: #eee }
details div { font-size: .75rem; text-align: left } svg { display: block } li { margin: .3rem 0 }
"""
