"""DOT: written for Graphviz to draw, and read back exactly; numbers stand bare, strings in quotes."""

import json
import re
from typing import Any

import networkx as nx

_DRAWN = ("label", "style", "penwidth")  # what only the picture needs
_WORD = r'("[^"\\]*(?:\\.[^"\\]*)*"|(?:[^\s"\[\]{};=,>-]|-(?!>))+)'
_BEGIN = re.compile(rf"\s*digraph\b\s*{_WORD}?\s*{{")
_STATEMENT = re.compile(rf"\s*{_WORD}(?:\s*->\s*{_WORD})?\s*(\[)?", re.DOTALL)
_PAIR = re.compile(rf"\s*{_WORD}\s*=\s*{_WORD}\s*,?", re.DOTALL)
_CLOSE, _NEXT, _END = re.compile(r"\s*\]"), re.compile(r"[\s;]*"), re.compile(r"\s*}")
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)
_WIDEST = 4.0  # points


def dot(graph: nx.DiGraph) -> bytes:
    """DOT text; negative edges are dashed, large ones wide."""
    lines = ["digraph circuit {", f"graph [rankdir=BT, document={_quoted(json.dumps(graph.graph))}];"]
    for node, data in graph.nodes(data=True):
        lines.append(f"{_quoted(node)} [{_list({'label': data.get('title', node), **data})}];")
    for source, target, data in graph.edges(data=True):
        drawn: dict[str, Any] = {"penwidth": round(0.3 + _WIDEST * min(1.0, float(data.get("share", 0.2))), 3)}
        drawn |= {"style": "dashed" if data.get("weight", 0) < 0 else "solid"}
        lines.append(f"{_quoted(source)} -> {_quoted(target)} [{_list({**drawn, **data})}];")
    return "\n".join([*lines, "}", ""]).encode()


def _list(data: dict[str, Any]) -> str:
    return ", ".join(f"{_quoted(name)}={_value(value)}" for name, value in data.items())


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value) if isinstance(value, int | float) else _quoted(value)


def _quoted(value: str) -> str:
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def read_dot(data: bytes) -> nx.DiGraph:
    """Read what `dot` wrote; of other DOT files the plain subset with one statement a node or edge."""
    text = data.decode()
    begin = _BEGIN.match(text)
    if begin is None:
        raise ValueError("the file does not begin with 'digraph'")
    graph, at = nx.DiGraph(), begin.end()
    while not _END.match(text, at):
        at = _statement(graph, text, at)
    return graph


def _statement(graph: nx.DiGraph, text: str, at: int) -> int:
    """Read one node, edge or list of attributes of the graph, and return where the next begins."""
    head = _matched(_STATEMENT, text, at)
    data, at = _attributes(text, head.end()) if head[3] else ({}, head.end())
    name, target = str(_read(head[1])), None if head[2] is None else str(_read(head[2]))
    if target is not None:
        if graph.has_edge(name, target):
            raise ValueError(f"two edges lead from {name!r} to {target!r}")
        for end in (name, target):
            if end not in graph:
                raise ValueError(f"edge {name!r} -> {target!r} leads to no node {end!r}")
        graph.add_edge(name, target, **data)
    elif head[1] in ("graph", "node", "edge"):
        graph.graph.update(json.loads(data["document"]) if "document" in data else {})
    elif name in graph:
        raise ValueError(f"two nodes have the id {name!r}")
    else:
        graph.add_node(name, **data)
    return _matched(_NEXT, text, at).end()


def _attributes(text: str, at: int) -> tuple[dict[str, Any], int]:
    data: dict[str, Any] = {}
    while pair := _PAIR.match(text, at):
        data[str(_read(pair[1]))], at = _read(pair[2]), pair.end()
    for name in _DRAWN:
        data.pop(name, None)
    return data, _matched(_CLOSE, text, at).end()


def _matched(pattern: re.Pattern[str], text: str, at: int) -> re.Match[str]:
    found = pattern.match(text, at)
    if found is None:
        rest = text[at : at + 20].strip()
        raise ValueError(f"the file is not DOT at {rest!r}" if rest else "the file ends before the closing brace")
    return found


def _read(word: str) -> Any:
    """A word's value: a string where it stands in quotes, else a number if it is one."""
    if word[0] == '"':
        # Most strings hold no escape.
        return _ESCAPE.sub(r"\1", word[1:-1]) if "\\" in word else word[1:-1]
    if word in ("true", "false"):
        return word == "true"
    try:
        return int(word) if word.removeprefix("-").isdigit() else float(word)
    except ValueError:
        return word
