"""DOT: written for Graphviz to draw, and read back exactly; numbers stand bare, strings in quotes."""

import json
import re
from typing import Any

import networkx as nx

_DRAWN = ("label", "style", "penwidth")  # what only the picture needs
_QUOTED, _BARE = r'"(?:[^"\\]|\\.)*"', r'[^\s"\[\]{};=,>]+?(?=\s|[\[\]{};=,]|->|$)'
_TOKEN = re.compile(rf"\s*(?:({_QUOTED})|({_BARE})|(->|[\[\]{{}};=,]))", re.DOTALL)
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)
_IS_QUOTED, _IS_BARE = 1, 2  # groups of a token
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
    words = _words(data.decode())
    if words[:1] != [("digraph", "bare")]:
        raise ValueError("the file does not begin with 'digraph'")
    graph, at = nx.DiGraph(), next((i for i, word in enumerate(words) if word == ("{", "mark")), len(words)) + 1
    try:
        while words[at] != ("}", "mark"):
            at = _statement(graph, words, at)
    except IndexError:
        raise ValueError("the file ends before the closing brace") from None
    return graph


Word = tuple[Any, str]  # a value, and whether it was "quoted", "bare" or a "mark"


def _words(text: str) -> list[Word]:
    found: list[Word] = []
    at, text = 0, text.rstrip()
    for match in _TOKEN.finditer(text):
        if match.start() != at:
            break
        kind, at = match.lastindex, match.end()
        assert kind is not None
        word = match[kind]
        if kind == _IS_QUOTED:
            # Most strings hold no escape.
            found.append((_ESCAPE.sub(r"\1", word[1:-1]) if "\\" in word else word[1:-1], "quoted"))
        else:
            found.append((_bare(word), "bare") if kind == _IS_BARE else (word, "mark"))
    if at < len(text):
        raise ValueError(f"the file is not DOT at {text[at : at + 20]!r}")
    return found


def _bare(word: str) -> Any:
    if word in ("true", "false"):
        return word == "true"
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return word


def _statement(graph: nx.DiGraph, words: list[Word], at: int) -> int:
    """Read one node, edge or list of attributes of the graph, and return where the next begins."""
    (first, kind), at = words[at], at + 1
    name, target = str(first), None
    if words[at] == ("->", "mark"):
        target, at = str(words[at + 1][0]), at + 2
    data, at = _attributes(words, at)
    if target is not None:
        if graph.has_edge(name, target):
            raise ValueError(f"two edges lead from {name!r} to {target!r}")
        for end in (name, target):
            if end not in graph:
                raise ValueError(f"edge {name!r} -> {target!r} leads to no node {end!r}")
        graph.add_edge(name, target, **data)
    elif kind == "bare" and name in ("graph", "node", "edge"):
        graph.graph.update(json.loads(data["document"]) if "document" in data else {})
    elif name in graph:
        raise ValueError(f"two nodes have the id {name!r}")
    else:
        graph.add_node(name, **data)
    return at


def _attributes(words: list[Word], at: int) -> tuple[dict[str, Any], int]:
    data: dict[str, Any] = {}
    if words[at] == ("[", "mark"):
        at += 1
        while words[at] != ("]", "mark"):
            if words[at + 1] != ("=", "mark"):
                raise ValueError(f"attribute {words[at][0]!r} has no value")
            data[str(words[at][0])] = words[at + 2][0]
            at += 3
            at += words[at] == (",", "mark")
        at += 1
    at += words[at] == (";", "mark")
    for name in _DRAWN:
        data.pop(name, None)
    return data, at
