"""The command line: `python -m weightdecomp demo | decompose | verify | graph | report`; a verb is one call of the API.

`torchrun --nproc-per-node N -m weightdecomp decompose ...` is the same command on N processes.

Exit codes: 0; 1 if the tolerance was not met (decompose and verify); 2 for a mistake in what was given; 3 if another
process of the same job has ended; 130 for Ctrl-C.
"""

import argparse
import inspect
import json
import math
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from weightdecomp import Config, Decomposition, NumericalWarning, decompose, load
from weightdecomp._batches import Batch
from weightdecomp._given import (
    add_model,
    add_vocabulary,
    given_images,
    given_vocabulary,
    model_and_batches,
    one_input,
    seed,
)
from weightdecomp._loading import loaded_divergence
from weightdecomp._processes import Processes, ProcessLost, job
from weightdecomp._progress import shown
from weightdecomp._storage import check_vacant, check_writable, exists
from weightdecomp._verification import Verification

# What a user's own mistakes raise; anything else is a defect of ours and keeps its traceback.
_MISTAKES = (ValueError, TypeError, OSError, ImportError)
_UNMET, _MISTAKE, _LOST, _INTERRUPTED = 1, 2, 3, 130
_TOLERANCE = inspect.signature(decompose).parameters["tolerance"].default
_DEMO_DAMAGE = 5  # times the tolerance, or what the run reached: the demo's graph, all else ablated in the worst way
_ATTACK = 1280  # steps of the longest attack, unless given
_EDGES = 500  # of a report's circuit graph, unless given


def main(words: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code; `words` are the command's, without its name."""
    given = _parser().parse_args(words)
    try:
        with warnings.catch_warnings(), job() as group:
            # An unmet tolerance is in the output and in the exit code.
            warnings.simplefilter("ignore", NumericalWarning)
            if group is None:
                return given.verb(given)
            if given.verb is not _decompose:
                raise ValueError(
                    "only decompose runs on several processes; start this verb with python -m weightdecomp"
                )
            return _decompose(given, group)
    except _MISTAKES as error:
        print(f"weightdecomp: {error}", file=sys.stderr)
        return _MISTAKE
    except ProcessLost as error:
        print(f"weightdecomp: {error}", file=sys.stderr)
        return _LOST
    except KeyboardInterrupt as error:
        # `decompose` says itself how to resume where there is a checkpoint.
        hint = "; with --checkpoint DIR a run can be resumed" if hasattr(given, "checkpoint") else ""
        print(f"\nweightdecomp: {str(error) or f'interrupted{hint}'}", file=sys.stderr)
        return _INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m weightdecomp", description=_ABOUT, allow_abbrev=False)
    verbs = parser.add_subparsers(required=True, metavar="demo | decompose | verify | graph | report")
    demo = _verb(verbs, "demo", _demo, "decompose a small digit classifier that comes along, and report on it")
    demo.add_argument("--out", type=Path, default=Path("demo"), metavar="DIR", help="default: %(default)s")
    _add_run(demo)
    run = _verb(verbs, "decompose", _decompose, "decompose a model of yours, and save the result")
    run.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to save to, new or empty")
    add_model(run)
    _add_run(run)
    run.add_argument("--sites", action="append", metavar="PATTERN", help="module paths, as in layers.*; repeatable")
    run.add_argument("--divergence", default="auto", metavar="NAME", help=_DIVERGENCE)
    run.add_argument("--checkpoint", type=Path, metavar="DIR", help="keep progress there; repeat to resume")
    run.add_argument("--shard", action="store_true", help=_SHARD)
    check = _verb(verbs, "verify", _verify, "attack a saved decomposition on inputs it has not seen")
    check.add_argument("directory", type=Path, metavar="DIR", help="what `decompose --out` wrote")
    add_model(check)
    check.add_argument("--steps", type=int, default=_ATTACK, metavar="N", help="longest attack (%(default)s)")
    _add_seed(check)
    check.add_argument("--divergence", metavar="NAME", help="the function, if the run was given one of yours")
    _add_graph(_verb(verbs, "graph", _graph, "the circuit graph of a saved decomposition, as a file or a page"))
    _add_report(_verb(verbs, "report", _report, "one offline page about a saved decomposition"))
    return parser


def _verb(verbs: Any, name: str, function: Any, about: str) -> argparse.ArgumentParser:
    parser = verbs.add_parser(name, help=about, description=about, allow_abbrev=False)
    parser.set_defaults(verb=function)
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar on stderr")
    return parser


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, metavar="N", help=f"of refinement ({Config().steps})")
    _add_seed(parser)
    parser.add_argument("--tolerance", type=float, default=_TOLERANCE, metavar="X", help=_LARGEST)


def _add_seed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="of every random draw (0)")


def _add_graph(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=Path, metavar="DIR", help="what `decompose --out` wrote")
    add_model(parser)
    parser.add_argument("--out", type=Path, action="append", required=True, metavar="FILE", help=_FILES)
    parser.add_argument("--input", type=int, metavar="N", help="only this input of the data, positions kept")
    parser.add_argument("--outputs", type=int, nargs="+", metavar="N", help="output indices to show")
    parser.add_argument("--effects", default="gradient", metavar="NAME", help="gradient, path or removal (%(default)s)")
    parser.add_argument("--influence", type=float, metavar="X", help="prune to the nodes with this share of influence")
    parser.add_argument("--edges", type=int, metavar="N", help="prune to this many edges")
    parser.add_argument("--score", action="store_true", help="run the model on the graph alone, under five ablations")
    parser.add_argument("--divergence", metavar="NAME", help="the function, if the run was given one of yours")
    add_vocabulary(parser)
    _add_seed(parser)


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=Path, metavar="DIR", help="what `decompose --out` wrote")
    add_model(parser)
    add_vocabulary(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for report.html and report.md; default: DIR")
    parser.add_argument("--title", metavar="TEXT", help="heading of the report")
    parser.add_argument("--side", type=int, metavar="N", help="inputs are pictures of N x N pixels, with --labels")
    parser.add_argument("--labels", metavar="MODULE:FUNCTION", help="function that returns the class of every input")
    parser.add_argument("--input", type=int, metavar="N", help="also the circuit graph of this input")
    parser.add_argument("--edges", type=int, default=_EDGES, metavar="N", help="of a circuit graph (%(default)s)")
    parser.add_argument(
        "--compare", action="store_true", help="also a comparison with other methods, fitted on the data"
    )
    parser.add_argument("--steps", type=int, default=_ATTACK, metavar="N", help="longest attack (%(default)s)")
    parser.add_argument("--divergence", metavar="NAME", help="the function, if the run was given one of yours")
    _add_seed(parser)


def _decompose(given: argparse.Namespace, group: dist.ProcessGroup | None = None) -> int:
    _check_out(given)
    model, batches = model_and_batches(given)
    decomposition = decompose(
        model,
        batches,
        sites=given.sites,
        tolerance=given.tolerance,
        divergence=loaded_divergence(given.divergence),
        seed=given.seed,
        checkpoint=given.checkpoint,
        config=_config(given),
        progress=not given.no_progress,
        group=group,
        shard=given.shard,
    )
    if Processes(group).index:
        return 0
    decomposition.save(given.out)
    document = {"out": str(given.out), "seed": given.seed, **_document(decomposition)}
    _say(given, document, f"{decomposition}\nsaved        {given.out}")
    return 0 if decomposition.converged else _UNMET


def _check_out(given: argparse.Namespace) -> None:
    """Check that saving replaces nothing, or what the same run saved before: a checkpoint refuses any other run.

    Raises:
        ValueError: If it would, or if what the run makes cannot be written.
    """
    check_vacant(given.out, "decomposition")
    if given.checkpoint is not None:
        check_writable(given.checkpoint)
        if given.out.absolute() in (given.checkpoint.absolute(), *given.checkpoint.absolute().parents):
            raise ValueError(f"--checkpoint '{given.checkpoint}' lies in --out '{given.out}'; give another folder")
    resumes = given.checkpoint is not None and exists(given.checkpoint, "checkpoint")
    if exists(given.out, "decomposition") and not resumes:
        raise ValueError(f"'{given.out}' already holds a decomposition; give another --out, or delete it first")


def _verify(given: argparse.Namespace) -> int:
    model, batches = model_and_batches(given)
    function = loaded_divergence(given.divergence) if given.divergence else None
    if isinstance(function, str):
        raise ValueError(
            f"--divergence of verify is a function, module:name, got {function!r}; built-in ones are saved"
        )
    verification = _verified(given, load(given.directory, model, function), batches, given.steps)
    _say(given, verification.to_dict(), str(verification))
    return 0 if verification.converged else _UNMET


def _graph(given: argparse.Namespace) -> int:
    import graphs

    for path in given.out:
        graphs.check_path(path)
    model, inputs = model_and_batches(given)
    function = loaded_divergence(given.divergence) if given.divergence else None
    decomposition = load(given.directory, model, function if callable(function) else None)
    batches = decomposition.read(inputs)
    chosen = batches if given.input is None else [one_input(batches, given.input)]
    names = given_vocabulary(given, model, batches)
    graph = graphs.circuit_graph(
        decomposition, chosen, effects=given.effects, outputs=given.outputs, input_titles=names, output_titles=names
    )
    if given.influence is not None or given.edges is not None:
        graph = graphs.prune(graph, influence=given.influence, edges=given.edges)
    if given.score:
        graph = graphs.score(graph, decomposition, chosen[0], minimality=False, seed=given.seed)
    for path in given.out:
        graphs.write(graph, path)
    document = {"out": [str(path) for path in given.out], "nodes": len(graph), "edges": graph.number_of_edges()}
    scores = {"scores": graph.graph["scores"], "pruning": graph.graph["pruning"]}
    written = "\n".join(f"written      {path}" for path in given.out)
    _say(given, {**document, **scores}, f"{graphs.show(graph)!r}\n{written}")
    return 0


def _report(given: argparse.Namespace) -> int:
    from weightdecomp import _figures, _page, _report, compare
    from weightdecomp._curve import curve

    out = given.directory if given.out is None else given.out
    check_writable(out)
    _figures.check_plotting()
    model, inputs = model_and_batches(given)
    function = loaded_divergence(given.divergence) if given.divergence else None
    decomposition = load(given.directory, model, function if callable(function) else None)
    batches = decomposition.read(inputs)
    one = None if given.input is None else one_input(batches, given.input)
    images, names = given_images(given, batches), given_vocabulary(given, model, batches)
    report = _report.Report(
        given.title or f"{_report.model_name(model)}, decomposed",
        decomposition,
        _verified(given, decomposition, batches, given.steps),
        batches,
        images=images,
        vocabulary=names,
        curve=curve(decomposition, batches, seed=given.seed),
        recipe=_report.recipe(decomposition, batches, vars(given)),
    )
    report = report._replace(graphs=_report_graphs(given, report, one))
    if given.compare:
        found = compare(decomposition, batches, _rivals(), tune=False, progress=not given.no_progress)
        report = report._replace(comparison=found)
    out.mkdir(parents=True, exist_ok=True)
    page = _page.write(report, out)
    document = {"report": str(page), "verification": report.verification.to_dict()}
    _say(given, document, f"{_report.text(report)}\nwritten      {page}")
    return 0 if report.verification.converged else _UNMET


def _report_graphs(given: argparse.Namespace, report: Any, one: Batch | None) -> dict[str, str]:
    """Pages of the circuit graph of the inputs, and of one input where it is asked for."""
    import graphs

    chosen = {"Circuit graph": list(report.batches)}
    if one is not None:
        chosen[f"Circuit graph of input {given.input}"] = [one]
    titles = {"input_titles": report.vocabulary, "output_titles": report.output_names}
    found = {}
    for name, batches in chosen.items():
        graph = graphs.circuit_graph(report.decomposition, batches, **titles)
        found[name] = graphs.show(graphs.prune(graph, edges=given.edges)).page
    return found


def _demo(given: argparse.Namespace) -> int:
    """Decompose the classifier on its training images, and attack the result on its test images."""
    from weightdecomp import _figures, _page, _report, compare, digits
    from weightdecomp._curve import curve

    _figures.check_plotting()
    # Matrices this small gain nothing from a second thread, and wait for it where other work competes.
    torch.set_num_threads(1)
    saved = given.out / "decomposition"
    check_vacant(saved if saved.exists() else given.out, "decomposition")
    decomposition = decompose(
        digits.model(),
        digits.batches("train"),
        tolerance=given.tolerance,
        divergence="kl",  # the outputs are logits of the ten digits, which a plain tensor cannot tell
        seed=given.seed,
        config=_config(given),
        progress=not given.no_progress,
    )
    decomposition.save(saved)
    test = digits.batches("test")
    verification = _verified(given, decomposition, test, _ATTACK)
    circuit = _demo_circuit(given, decomposition, test)
    comparison = compare(
        decomposition,
        digits.batches("train"),
        _rivals(),
        evaluate=test,
        tune=False,
        progress=not given.no_progress,
    )
    plot = given.out / "comparison.svg"
    comparison.figure().savefig(plot)
    report = _report.Report(
        "A classifier of handwritten digits, decomposed",
        decomposition,
        verification,
        test,
        images=_figures.Images(torch.cat(test), digits.labels("test"), side=8),
        curve=curve(decomposition, test, seed=given.seed),
        graphs={"Circuit graph": circuit.read_text(encoding="utf-8")},
        comparison=comparison,
        recipe=_report.recipe(decomposition, test, vars(given)),
    )
    page = _page.write(report, given.out)
    document = {"report": str(page), "circuit": str(circuit), **_document(decomposition)}
    document |= {"verification": verification.to_dict(), "comparison": comparison.to_dict()}
    places = {"Report with pictures": page, "Circuit graph": circuit, "Plot of the comparison": plot}
    places |= {"Decomposition": saved}
    told = "\n".join(f"{what}: {where}" for what, where in places.items())
    _say(given, document, f"{_report.text(report)}\n\n{comparison}\n\n{told}")
    return 0


def _demo_circuit(given: argparse.Namespace, decomposition: Decomposition, images: Sequence[torch.Tensor]) -> Path:
    """Write the demo's circuit graph, as a page and as GraphML, and return the path of the page."""
    import graphs

    digits, pixels = [f"digit {i}" for i in range(10)], [f"pixel {i // 8 + 1},{i % 8 + 1}" for i in range(64)]
    whole = graphs.circuit_graph(decomposition, list(images), input_titles=pixels, output_titles=digits)
    # By influence alone a graph looks complete long before the model works on it, so the damage decides.
    own = {"decomposition": decomposition, "inputs": images[0], "seed": given.seed}
    damage = min(1.0, _DEMO_DAMAGE * max(decomposition.tolerance, decomposition.outcome.damage))
    graph = graphs.prune(whole, damage=damage, regime="adversarial", **own)
    graph = graphs.modules(graphs.score(graph, **own), seed=given.seed)
    graphs.write(graph, given.out / "circuit.graphml")
    graphs.write(graph, given.out / "circuit.html")
    return given.out / "circuit.html"


def _rivals() -> list[Any]:
    """What the demo compares with: methods that are quick to fit, trained ones with few steps."""
    from weightdecomp import baselines

    quick = baselines.Training(steps=400)
    autoencoders = [baselines.SAE(rule=baselines.TopK(k=k), training=quick) for k in (8, 16)]
    transcoders = [baselines.Transcoder(rule=baselines.TopK(k=k), training=quick) for k in (8, 16)]
    closed = [
        *baselines.Neurons().grid(),
        *baselines.PCA().grid(),
        *baselines.NMF().grid(),
        *baselines.KMeans().grid(),
        *baselines.LocalInteractionBasis().grid(),
        *baselines.SVD().grid(),
    ]
    return [*closed, baselines.Polytopes(), *autoencoders, *transcoders]


def _config(given: argparse.Namespace) -> Config:
    return Config() if given.steps is None else Config(steps=given.steps)


def _verified(given: argparse.Namespace, decomposition: Decomposition, batches: Any, steps: int) -> Verification:
    """`Decomposition.verify` under a progress bar."""
    with shown(not given.no_progress, doing="verify") as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return decomposition.verify(batches, steps=steps, seed=given.seed, on_progress=show)


def _document(decomposition: Decomposition) -> dict[str, Any]:
    """A decomposition's figures as plain values."""
    sites = []
    for site in decomposition.sites:
        parts = decomposition.parts[site.path]
        share = float(decomposition.remainders[site.path].norm() / site.matrix().norm()) ** 2
        sites.append(
            {
                "path": site.path,
                "shape": list(site.shape),
                "components": parts.pieces.n,
                "live": int((parts.frequencies > 0).sum()),
                "active": float(parts.frequencies.sum()),
                "remainder": share,
                "start": parts.start,
            }
        )
    pairs = zip(decomposition.groups, decomposition.group_frequencies, strict=True)
    return {
        "sites": sites,
        "circuits": [{"members": group, "frequency": frequency} for group, frequency in pairs],
        "skipped": [{"name": one.name, "reason": one.reason} for one in decomposition.skipped],
        "divergence": {"name": decomposition.divergence.name, "reason": decomposition.divergence.reason},
        "tolerance": decomposition.tolerance,
        "config": decomposition.config.to_dict(),
        **asdict(decomposition.outcome),
    }


def _say(given: argparse.Namespace, document: dict[str, Any], text: str) -> None:
    print(json.dumps(_plain(document), indent=1) if given.json else text)


def _plain(value: Any) -> Any:
    """JSON has no infinity and no NaN; they become text."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


_ABOUT = "Decompose a trained PyTorch checkpoint's weights into circuits, and attack the result."
_SHARD = "under torchrun: keep only a share of the components in each process, for less memory and more traffic"
_DIVERGENCE = "auto, mse, kl, or a function of yours as package.module:name (auto)"
_FILES = "file to write, repeatable; its suffix says how: html json graphml gexf cyjs dot ct.json"
_LARGEST = "largest damage under attack, as a share of ablating everything (%(default)s)"

if __name__ == "__main__":
    sys.exit(main())
