"""The trap suite on one page: tasks by methods, green or red with the score, and what was found beside the truth."""

import statistics
from collections.abc import Sequence
from html import escape
from typing import Any

from benchmarks.trap_tasks import NULLS, Task

_WIDTH, _HEIGHT = 96, 48  # of one mechanism's picture


def page(cells: Sequence[dict[str, Any]], tasks: Sequence[Task], bar: float, costs: Sequence[Sequence[str]]) -> str:
    """One HTML file that needs nothing else; a cell opens to the pictures of its mechanisms.

    Args:
        cells: What was found.
        tasks: In the order of the columns.
        bar: From which score a cell is green.
        costs: A header and one row a method.
    """
    methods = list(dict.fromkeys(one["method"] for one in cells))
    head = "".join(f"<th>{escape(task.name)}</th>" for task in tasks)
    rows = []
    for method in methods:
        found = [[c for c in cells if (c["task"], c["method"]) == (task.name, method)] for task in tasks]
        rows.append(f"<tr><td>{escape(method)}</td>{''.join(_cell(one, bar) for one in found)}</tr>")
    told = _rows([("task", "claim", "exact answer", "score", "source"), *map(_told, tasks)])
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Trap suite</title>'
        f"<style>{_STYLE}</style></head><body><h1>Trap suite</h1><p>{_ABOUT}</p>"
        f'<table class="scores"><tr><th></th>{head}</tr>{"".join(rows)}</table>'
        f"<h2>Tasks</h2><table>{told}</table><p>Nulls: {escape(NULLS)}.</p>"
        f'<h2>Cost</h2><p>{_COSTS}</p><table class="costs">{_rows(costs)}</table></body></html>\n'
    )


def _rows(table: Sequence[Sequence[str]]) -> str:
    """A table's rows, the first one its header."""

    def row(texts: Sequence[str], kind: str) -> str:
        return f"<tr>{''.join(f'<{kind}>{escape(text)}</{kind}>' for text in texts)}</tr>"

    return "".join(row(texts, "td" if i else "th") for i, texts in enumerate(table))


def _told(task: Task) -> tuple[str, ...]:
    return task.name, task.claim, task.answer, task.score, task.source


def _cell(found: Sequence[dict[str, Any]], bar: float) -> str:
    if not found:
        return '<td class="none" title="not run yet"></td>'
    shown = [one for one in found if "score" in one]
    if not shown:
        return f'<td class="none" title="{escape(found[0]["reason"])}">n/a</td>'
    score = statistics.median(one["score"] for one in shown)
    lines = "".join(f"<div>{_caption(one)}{_bars(one, bar)}</div>" for one in shown)
    kind = "yes" if score >= bar else "no"
    opened = f'<div class="found">{lines}{_pictures(shown[0])}</div>'
    return f'<td class="{kind}"><details><summary>{score:.2f}</summary>{opened}</details></td>'


def _caption(one: dict[str, Any]) -> str:
    sizes = [size for trap in one["sizes"] for size in trap]
    units = " and ".join(str(n) for n in one["units"])
    return (
        f"seed {one['seed']}: {one['score']:.2f}; {escape(one['setting'])}; {units} units, "
        f"{sum(sizes) / len(sizes):.1f} a mechanism; {one['cpu_seconds']:.1f} CPU-seconds; commit {one['commit'][:7]}"
    )


def _bars(one: dict[str, Any], bar: float) -> str:
    """The score of every mechanism, beside the whole of it (grey)."""
    scores = [score for trap in one["scores"] for score in trap]
    width, height = (8 if len(scores) <= 50 else 3), 24
    parts = [f'<rect width="{width * len(scores)}" height="{height}" fill="#e4e4e4"/>']
    for i, score in enumerate(scores):
        tall, color = score * height, "#1b7837" if score >= bar else "#b2182b"
        box = f'x="{i * width}" y="{height - tall:.1f}" width="{width - 1}" height="{tall:.1f}"'
        parts.append(f'<rect {box} fill="{color}"/>')
    return f'<svg width="{width * len(scores)}" height="{height}" role="img">{"".join(parts)}</svg>'


def _pictures(one: dict[str, Any]) -> str:
    """Per mechanism its exact effect (grey) over some inputs in ascending order, and the effect found (black)."""
    drawn = [picture for trap in one["pictures"] for picture in trap[: 6 // len(one["pictures"])]]
    return "".join(
        f'<svg width="{_WIDTH}" height="{_HEIGHT}" role="img">{_line(exact, "#aaa", 5)}{_line(got, "#111", 1.2)}</svg>'
        for exact, got in drawn
    )


def _line(values: Sequence[int], color: str, width: float) -> str:
    step = (_WIDTH - 6) / max(1, len(values) - 1)
    points = " ".join(f"{3 + i * step:.0f},{_HEIGHT / 2 - v * 0.14:.0f}" for i, v in enumerate(values))
    return f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="{width}"/>'


_ABOUT = (
    "A number is the median over seeds of causal-effect matching: per mechanism, how much of the change that deleting "
    "it makes is reproduced by taking out one group of the method's units, groups disjoint; 1 is exact. Green: at "
    "least 0.95; n/a: the method does not apply, for the reason that the pointer shows; blank: not run yet. Of every "
    "baseline the best setting of its grid is shown, of ours the one default. Click a number: a bar a mechanism and "
    "seed; below, each mechanism's exact effect (grey band) over some inputs, and what the first seed's units found of "
    "it (black line)."
)
_COSTS = (
    "Median (range) over tasks and seeds, on one thread. A cell is all settings of the grid with their scoring, a fit "
    "the best setting alone; memory is what a fit adds at its peak. A dash: cells that were made before this was kept."
)
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1a1a1a; margin: 2rem; padding: 0 1rem }
p { max-width: 60rem } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: .3rem .5rem; border: 1px solid #fff; text-align: left; vertical-align: top }
th { font-weight: 600 } .scores th { font-size: .75rem; width: 4.5rem; vertical-align: bottom; hyphens: auto }
.scores td { text-align: center } .scores td:first-child { text-align: left; white-space: nowrap }
.costs td + td { text-align: right }
.yes { background: #b8e0c0 } .no { background: #f3c1bb } .none { background: #eee }
details { position: relative } summary { list-style: none; cursor: pointer }
.found { position: absolute; right: 0; z-index: 1; width: 30rem; background: #fff; border: 1px solid #999 }
.found { padding: .5rem; font-size: .75rem; text-align: left } div svg { display: block }
.found > svg { border: 1px solid #ddd; margin: 2px }
.found > svg { display: inline-block } td:nth-child(-n+8) .found { left: 0; right: auto }
"""
