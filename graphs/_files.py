"""Files: a graph written whole or not at all, read back, compared, and checked; the format goes by the suffix."""

import gc
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import networkx as nx

from graphs import _networkx_formats as formats
from graphs._circuit_tracer import circuit_tracer, read_circuit_tracer, trimmed
from graphs._columns import UNITS
from graphs._dot import dot, read_dot
from graphs._influence import topological
from graphs._page import page
from graphs._sanitise import sanitise

_PICKLES = (b"\x80", b"PK")


class Format(NamedTuple):
    """How one format is written and read."""

    write: Callable[[nx.DiGraph], bytes]
    read: Callable[[bytes], nx.DiGraph]


FORMATS: Mapping[str, Format] = {
    ".json": Format(formats.node_link, formats.read_node_link),
    ".graphml": Format(formats.graphml, formats.read_graphml),
    ".gexf": Format(formats.gexf, formats.read_gexf),
    ".cyjs": Format(formats.cytoscape, formats.read_cytoscape),
    ".dot": Format(dot, read_dot),
}
_TRACER, _PAGE = ".ct.json", ".html"
_KINDS = ("input", *UNITS, "remainder", "bias", "pair", "output")


def write(graph: nx.DiGraph, path: str | Path, *, nonfinite: str = "error") -> None:
    """Write a graph in the format of the path's suffix, read it back, compare, and only then put it in place.

    Suffixes: `.json` (node-link), `.graphml`, `.gexf`, `.cyjs` (Cytoscape), `.dot`, `.ct.json` (circuit-tracer, with a
    folder of examples beside it) and `.html` (the page, which cannot be read back). All but the page come back
    exactly as `sanitise` makes the graph; circuit-tracer's without components that nothing enters or leaves.

    Args:
        graph: A directed graph; `circuit_graph`'s, or any for the first five formats.
        path: Where to.
        nonfinite: "error" refuses NaN and infinity, "omit" leaves such attributes out.

    Raises:
        ValueError: For an unknown suffix, or a graph that cannot be written; names the node.
        TypeError: For attributes that have no plain form.
        OSError: If the file cannot be written; what was there before stays.
    """
    path = Path(path)
    suffix = _suffix(path)
    _check_writable(path)
    examples: Mapping[str, bytes] = {}
    with _uncollected():
        clean = sanitise(graph, nonfinite=nonfinite)
        if suffix == _PAGE:
            data = page(clean).encode()
        elif suffix == _TRACER:
            clean = trimmed(clean)
            data, examples = circuit_tracer(clean, path.name.removesuffix(_TRACER))
            _compare(clean, read_circuit_tracer(data), path)
        else:
            data = FORMATS[suffix].write(clean)
            _compare(clean, FORMATS[suffix].read(data), path)
    folder = path.with_name(path.name.removesuffix(_TRACER))
    is_new = not folder.exists()
    try:
        for name, content in examples.items():
            _put(folder / name, content, make_folder=True)
        _put(path, data)
    except OSError:
        if examples and is_new:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def read(path: str | Path) -> nx.DiGraph:
    """Read a graph that `write` wrote, by the path's suffix; nothing is ever unpickled.

    Raises:
        ValueError: If the file is missing, is not of that format, or its edges and nodes do not fit together.
    """
    path = Path(path)
    suffix = _suffix(path)
    if suffix == _PAGE:
        raise ValueError(f"'{path}' is a page to look at, which cannot be read back; read the graph's .json")
    if not path.is_file():
        raise ValueError(f"there is no file '{path}'")
    data = path.read_bytes()
    if data.startswith(_PICKLES):
        raise ValueError(f"'{path}' is a pickle or an archive, expected {suffix}; nothing is ever unpickled")
    form = read_circuit_tracer if suffix == _TRACER else FORMATS[suffix].read
    try:
        with _uncollected():
            return form(data)
    except (ValueError, KeyError, TypeError, AttributeError, nx.NetworkXError) as error:
        raise ValueError(f"'{path}' is not a graph that can be read: {error}") from error


@contextmanager
def _uncollected() -> Iterator[None]:
    """No search for garbage inside: documents are millions of live objects, and walking them is a third of the time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def check_path(path: str | Path) -> None:
    """Check that `write` would not refuse a path, which long runs want to know before they start.

    Raises:
        ValueError: For a suffix that names no format.
        OSError: If there is no such folder, or the path is one.
    """
    _suffix(Path(path))
    _check_writable(Path(path))


def validate(source: nx.DiGraph | str | Path) -> None:
    """Check a graph or a file against the schema, and name what is wrong.

    Raises:
        ValueError: With up to ten mistakes: ids, kinds, ends of edges, numbers, cycles, missing attributes.
    """
    graph = source if isinstance(source, nx.DiGraph) else read(source)
    wrong = mistakes(sanitise(graph))
    if wrong:
        where = "the graph" if isinstance(source, nx.DiGraph) else f"'{source}'"
        more = f"\n... and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        raise ValueError(f"{where} is not a circuit graph:\n" + "\n".join(wrong[:10]) + more)


def mistakes(graph: nx.DiGraph) -> list[str]:
    """What keeps a graph from being a circuit graph, one sentence each."""
    wrong = []
    for node, data in graph.nodes(data=True):
        kind = data.get("kind")
        if kind not in _KINDS:
            wrong.append(f"node {node!r} has the kind {kind!r}, expected one of {', '.join(_KINDS)}")
        for name in ("site", "activation", "layer"):
            if name not in data:
                wrong.append(f"node {node!r} has no {name!r}")
        if kind in ("input", "remainder", "bias") and graph.in_degree(node):
            wrong.append(f"node {node!r} is of kind {kind!r}, which no edge may enter")
        if kind == "output" and graph.out_degree(node):
            wrong.append(f"node {node!r} is an output, which no edge may leave")
        for name in ("importance", "frequency"):
            if not 0 <= float(data.get(name, 0)) <= 1 + 1e-9:
                wrong.append(f"node {node!r} has {name} {data[name]}, expected a number from 0 to 1")
    for source, target, data in graph.edges(data=True):
        if "weight" not in data:
            wrong.append(f"edge {source!r} -> {target!r} has no 'weight'")
        if not 0 <= float(data.get("share", 0)) <= 1 + 1e-9:
            wrong.append(f"edge {source!r} -> {target!r} has share {data['share']}, expected a number from 0 to 1")
    try:
        topological(graph)
    except ValueError as error:
        wrong.append(str(error))
    if "schema_version" not in graph.graph:
        wrong.append("the graph has no attribute 'schema_version'")
    return wrong


def _suffix(path: Path) -> str:
    known = [_TRACER, *FORMATS, _PAGE]
    for suffix in known:
        if path.name.endswith(suffix):
            return suffix
    raise ValueError(f"'{path}' has no suffix that names a format; choose one of {', '.join(known)}")


def _compare(graph: nx.DiGraph, back: nx.DiGraph, path: Path) -> None:
    """Refuse to write what would not come back.

    Raises:
        ValueError: Naming the node or edge; this would be a defect of ours.
    """
    for kind, one, other in (("node", graph.nodes, back.nodes), ("edge", graph.edges, back.edges)):
        for key, data in one.items():
            if key not in other or other[key] != data:
                raise ValueError(f"'{path}' would not bring back {kind} {key!r} as it is; nothing was written")
        if len(one) != len(other):
            raise ValueError(f"'{path}' would bring back {len(other)} {kind}s, of {len(one)}; nothing was written")
    if graph.graph != back.graph:
        raise ValueError(f"'{path}' would not bring back the graph's attributes; nothing was written")


def _check_writable(path: Path) -> None:
    folder = path.parent
    if path.is_dir():
        raise IsADirectoryError(f"cannot write '{path}': it is a folder, expected a file")
    if not folder.is_dir():
        raise FileNotFoundError(f"cannot write '{path}': there is no folder '{folder}'; make it first")


def _put(path: Path, data: bytes, *, make_folder: bool = False) -> None:
    """Write a file beside its place and move it there.

    Raises:
        OSError: If that fails; what was there before stays.
    """
    if make_folder and path.parent.parent.is_dir():
        path.parent.mkdir(exist_ok=True)
    _check_writable(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with part.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, path)
    except OSError as error:
        raise type(error)(error.errno, f"cannot write '{path}': {error.strerror}") from error
    finally:
        part.unlink(missing_ok=True)
