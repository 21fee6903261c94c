"""The trap tasks: what activations are said to hide, who says so, the exact answer, and how it is scored.

An answer is exact by construction. It is also the shortest description of what the model does on the task's inputs that
is known (`trap_bits` prices it beside its rivals), so that weights and behaviour together ask for it: where two
answers are equally good, neither can be called right.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks import trap_directions, trap_programs, trap_superposition
from benchmarks.trap_parts import Trap


@dataclass(frozen=True)
class Task:
    """What a task claims.

    Attributes:
        name: Of the task.
        claim: What activations are said to hide.
        source: Where the claim is made.
        answer: The exact answer in words.
        build: From a seed, one or more traps whose scores are averaged.
        control: Whether activation methods should win.
        score: What the number of a cell is.
    """

    name: str
    claim: str
    source: str
    answer: str
    build: Callable[[int], Sequence[Trap]]
    control: bool = False
    score: str = "causal-effect matching"


NULLS = (
    "random directions that sum to the weights, twice as many as the rank or more; singular pairs are among the methods"
)
_POST = "Chughtai and Bushnaq 2025, Activation space interpretability may be doomed"
_ONE = "causal-effect matching, one unit a mechanism"

TASKS = (
    Task(
        "blind curve",
        "eight coordinates of one curve look like one object, which the model never treats as one",
        f"{_POST}, example 1, with eight coordinates instead of two",
        "8 mechanisms: the neurons that react to one coordinate",
        trap_directions.blind_curve,
    ),
    Task(
        "dictionary mismatch",
        "a curve invites a dictionary of its own, which is not that of the hundred neurons that read it",
        f"{_POST}, example 2",
        "100 mechanisms, one a neuron",
        trap_directions.dictionary_mismatch,
    ),
    Task(
        "twins",
        "the same activations under a model that reads factors and one that reads their combinations",
        f"{_POST}, example 3; as twins: ours",
        "3 colours and 3 shapes in one model, 3 times same and different in the other; the mean over both",
        trap_directions.twins,
    ),
    Task(
        "one function",
        "ten neurons compute sin 2 pi x, and no direction of theirs is sin 2 pi x",
        f"{_POST}, example 4a, with a function that principal components do not show",
        "1 mechanism, to be found as one unit",
        trap_directions.one_function,
        score=_ONE,
    ),
    Task(
        "functions in superposition",
        "30 such circuits on the neurons of 15",
        f"{_POST}, example 4b, with a threshold that takes away the leak between circuits",
        "30 mechanisms, each to be found as one unit: what is written for one output",
        trap_superposition.superposed_functions,
        score=_ONE,
    ),
    Task(
        "ping-pong",
        "16 circuits, one at a time, on 4 blocks of neurons, each in a block of weights of its own",
        "Rotations in Superposition 2025, the construction for one active circuit; circuits of rank one: ours",
        "16 mechanisms, each a rank-one block of the weights with its bias",
        trap_superposition.ping_pong,
    ),
    Task(
        "rotations",
        "53 conditional rotations on 212 neurons, five circuits at every neuron, in two layers",
        "Linsefors and Bushnaq 2025, Rotations in Superposition; places that make one active circuit exact: ours",
        "106 mechanisms of rank three, one a circuit and layer; a uniform inhibition belongs to none",
        trap_superposition.rotations,
    ),
    Task(
        "compressed computation",
        "100 features on 50 neurons: a code that fourth powers reward, and the naive half that squares reward",
        "Ferreira da Silva and Heimersheim, arXiv 2607.04800; Bhagat et al., arXiv 2606.14673",
        "100 codewords in one model; in the other 50 neurons and nothing else; the mean over both",
        trap_superposition.compressed_computation,
        score="causal-effect matching; in the naive model times 50 over the number of units with an effect",
    ),
    Task(
        "two hops",
        "what is an AND of ANDs can be told as a sum of features of the input",
        "Lange et al. 2026, cross-layer transcoders are incentivized to learn unfaithful circuits; the ring: ours",
        "12 mechanisms in either layer, one a neuron",
        trap_programs.two_hops,
    ),
    Task(
        "absolute values",
        "a few inputs that repeat tempt a dictionary to store them whole",
        "Olah 2025, A Toy Model of Mechanistic (Un)Faithfulness",
        "8 mechanisms, the two neurons of a dimension",
        trap_directions.absolute_values,
    ),
    Task(
        "gated functions",
        "four functions of one variable, each on neurons of two layers, only where its bit is on",
        "Braun et al. 2025, arXiv 2501.14926, hand-coded gated functions",
        "4 mechanisms, each spanning both layers",
        trap_programs.gated_functions,
    ),
    Task(
        "redundant copies",
        "every feature is computed twice, and one copy is easily missed",
        "the completeness toy of targeted parameter decomposition, arXiv 2607.13047; built in closed form: ours",
        "12 mechanisms, two a feature, in layers side by side",
        trap_directions.redundant_copies,
    ),
    Task(
        "modular addition",
        "frequencies are planes, within which no direction means anything; once with ReLUs, once bilinear",
        "Nanda et al. 2023, arXiv 2301.05217; Pearce et al. 2024, arXiv 2410.08417; closed forms: ours",
        "3 planes at each of two sites, and at each of three; the mean over both",
        trap_programs.modular_addition,
        score="causal-effect matching, at most two units a plane",
    ),
    Task(
        "induction head",
        "two attention heads find what followed the last token before; tokens mix with places in one stream",
        "Olsson et al. 2022, arXiv 2209.11895; Bushnaq et al. 2025, arXiv 2506.20790; closed form: ours",
        "40 mechanisms: one a token in the values of both heads and in queries and keys of the second",
        trap_programs.induction,
    ),
    Task(
        "control: planted dictionary",
        "activations are sparse sums of 24 directions; the weights have no structure",
        "SynthSAEBench, arXiv 2602.14687, in its simplest form",
        "24 features of the data",
        lambda seed: trap_directions.planted(seed, 24, 0.06),
        control=True,
    ),
    Task(
        "control: overcomplete dictionary",
        "the same with 32 directions in 16 dimensions, more of them at a time",
        "the same",
        "32 features of the data",
        lambda seed: trap_directions.planted(seed, 32, 0.08),
        control=True,
    ),
)
