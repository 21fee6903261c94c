"""Processes: this one's share of a run that several make together, and sums over all of them.

Every process is given the same model and the same inputs, and draws the same random numbers as one process would.
Inputs are dealt out one by one, so that the first inputs of all are the first of each; so are sites, for work that is
done once a site. Whatever is a sum over inputs is summed over processes before anything else is done with it.
"""

import hashlib
import json
import math
import os
import re
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import safetensors.torch
import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

_Dealt = TypeVar("_Dealt", bound=Sequence | Tensor)


class ProcessLost(RuntimeError):
    """Another process of the same run has ended, so that this one cannot go on."""


class Processes:
    """This process among those that share a run; alone, everything is its own and nothing is exchanged.

    Attributes:
        n: How many there are.
        index: Which one this is, from 0.
        shards: Whether each keeps only a share of the components.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, shard: bool = False) -> None:
        """The members of a process group, or this process alone."""
        self.group = group
        self.n = 1 if group is None else dist.get_world_size(group)
        self.index = 0 if group is None else dist.get_rank(group)
        self.shards = shard and not self.alone

    @property
    def alone(self) -> bool:
        """Whether there is no other process."""
        return self.n == 1

    def own(self, things: _Dealt) -> _Dealt:
        """This process's share of a sequence, or of a tensor's rows, dealt out one by one."""
        every: Any = things
        return things if self.alone else every[self.index :: self.n]

    def count(self, n: int) -> int:
        """How many of the first n things are this process's."""
        return len(range(self.index, n, self.n))

    def indices(self, n: int) -> Int[Tensor, " own"]:
        """Which of n things are this process's."""
        return torch.arange(self.index, n, self.n)

    def uniform_(self, own: Tensor, first: int, n: int, rng: torch.Generator) -> None:
        """Fill rows of this process's inputs, from input `first` to n of a batch, with what one process would draw."""
        if self.alone:
            own.uniform_(generator=rng)
            return
        drawn = own.new_empty(n - first, *own.shape[1:]).uniform_(generator=rng)
        own.copy_(drawn[(self.index - first) % self.n :: self.n])

    def sum(self, x: Tensor) -> Tensor:
        """Sum over all processes."""
        return self.sums([x])[0]

    def sums(self, found: Sequence[Tensor]) -> list[Tensor]:
        """Sums over all processes, in one exchange."""
        if self.alone:
            return list(found)
        total = torch.cat([x.flatten() for x in found])
        with exchange():
            dist.all_reduce(total, group=self.group)
        parts = total.split([x.numel() for x in found])
        return [part.reshape(x.shape).to(x.dtype) for part, x in zip(parts, found, strict=True)]

    def mean(self, x: Tensor, dim: int | None = None) -> Tensor:
        """Mean over all entries (or along an axis) of the tensors of all processes."""
        if self.alone:
            return x.mean() if dim is None else x.mean(dim)
        n = x.numel() if dim is None else x.shape[dim]
        total = x.sum(dtype=torch.float64) if dim is None else x.sum(dim, dtype=torch.float64)
        total, count = self.sums([total, total.new_tensor(float(n))])
        return (total / count).to(x.dtype)

    def sharded(self, x: Tensor) -> Tensor:
        """The tensor with some of its rows in every process (a DTensor), where processes shard."""
        if self.group is None or not self.shards:
            return x
        from torch.distributed.device_mesh import DeviceMesh  # these bring half of torch along
        from torch.distributed.tensor import Shard, distribute_tensor

        mesh = DeviceMesh.from_group(self.group, x.device.type)
        with exchange():
            return distribute_tensor(x, mesh, [Shard(0)])

    def whole(self, x: Tensor) -> Tensor:
        """All rows of a sharded tensor; gradients sum over processes, each row's in the process that has it."""
        if not self.shards:
            return x
        from torch.distributed.tensor import DTensor, Partial

        assert isinstance(x, DTensor)
        with exchange():
            return x.full_tensor(grad_placements=[Partial()])

    def total(self, n: int) -> int:
        """Sum of a count over all processes."""
        return n if self.alone else int(self.sum(torch.tensor(n)))

    def columns(self, x: Float[Tensor, "own *row column"]) -> Float[Tensor, "all *row own_column"]:
        """All inputs, in their order, at this process's consecutive share of the columns."""
        if self.alone:
            return x
        parts, counts = x.tensor_split(self.n, -1), self._counts(len(x))
        shape = parts[self.index].shape[1:]
        width = math.prod(shape)
        found = x.new_empty(sum(counts) * width)
        with exchange():
            dist.all_to_all_single(
                found,
                torch.cat([part.flatten() for part in parts]),
                [n * width for n in counts],
                [part.numel() for part in parts],
                group=self.group,
            )
        every = x.new_empty(sum(counts), *shape)
        for index, block in enumerate(found.split([n * width for n in counts])):
            every[index :: self.n] = block.reshape(counts[index], *shape)
        return every

    def rows(self, x: Tensor) -> Tensor:
        """The rows of all processes, those of the first process first."""
        if self.alone:
            return x
        counts = self._counts(len(x))
        padded = x.new_zeros(max(counts), *x.shape[1:])
        padded[: len(x)] = x
        found = [torch.empty_like(padded) for _ in counts]
        with exchange():
            dist.all_gather(found, padded, group=self.group)
        return torch.cat([one[:n] for one, n in zip(found, counts, strict=True)])

    def sent(
        self, source: int, tensors: Mapping[str, Tensor] | None, document: Any = None
    ) -> tuple[dict[str, Tensor], Any]:
        """Tensors, on the CPU, and JSON values of the process `source`; what others give is not looked at."""
        if self.alone:
            return dict(tensors or {}), document
        parts = [b"", b""]
        if self.index == source:
            plain = {name: x.detach().cpu().contiguous() for name, x in (tensors or {}).items()}
            parts = [safetensors.torch.save(plain), json.dumps(document).encode()]
        sizes = torch.tensor([len(part) for part in parts])
        with exchange():
            dist.broadcast(sizes, group=self.group, group_src=source)
            data = torch.zeros(int(sizes.sum()), dtype=torch.uint8)
            if self.index == source:
                data = torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8)
            dist.broadcast(data, group=self.group, group_src=source)
        head, tail = data.split(sizes.tolist())
        return safetensors.torch.load(head.numpy().tobytes()), json.loads(tail.numpy().tobytes())

    def from_first(self, function: Callable[[], tuple[Mapping[str, Tensor], Any]]) -> tuple[dict[str, Tensor], Any]:
        """What a function returns in the first process, or the ValueError that it raises there, in every process."""
        tensors, document, error = None, None, None
        if self.index == 0:
            try:
                tensors, document = function()
            except ValueError as mistake:
                if self.alone:
                    raise
                error = str(mistake)
        tensors, (document, error) = self.sent(0, tensors, [document, error])
        if error is not None:
            raise ValueError(error)
        return tensors, document

    def agree(self, key: Mapping[str, Any]) -> None:
        """Refuse, in every process, a run that not all were asked for alike.

        Raises:
            ValueError: Naming what differs.
        """
        if self.alone:
            return
        own = {name: hashlib.sha256(json.dumps(value).encode()).hexdigest() for name, value in key.items()}
        first = self.sent(0, None, own)[1]
        differs = self.sum(torch.tensor([float(first[name] != own[name]) for name in own]))
        if differs.any():
            names = [name for name, n in zip(own, differs.tolist(), strict=True) if n]
            raise ValueError(
                f"the {self.n} processes of this run were given different {', '.join(names)}; every process must make "
                "the same call on the same inputs (seed what draws them), of which it then computes its share"
            )

    def _counts(self, n: int) -> list[int]:
        counts = [torch.zeros(1, dtype=torch.long) for _ in range(self.n)]
        with exchange():
            dist.all_gather(counts, torch.tensor([n]), group=self.group)
        return [int(one) for one in counts]


ALONE = Processes()
"""One process that makes the whole run."""


def local(x: Tensor) -> Tensor:
    """The rows of a sharded tensor that are in this process, to be changed in place; of other tensors all."""
    return getattr(x, "to_local", lambda: x)()


@contextmanager
def exchange() -> Iterator[None]:
    """Name what a failed exchange means."""
    try:
        yield
    except RuntimeError as error:
        reason = re.sub(r"^\[\S*\] ", "", str(error).partition(". ")[0])  # without a place in torch's own sources
        raise ProcessLost(f"another process of this run has ended or cannot be reached ({reason})") from error


@contextmanager
def job() -> Iterator[dist.ProcessGroup | None]:
    """The processes that torchrun started together with this one; None where it started no other, or none at all."""
    if not dist.is_torchelastic_launched() or os.environ.get("WORLD_SIZE") == "1":
        yield None
        return
    # When one process ends, torchrun ends the others by this signal; they then say how to resume, as after Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # what "cuda" means to the user's own function
    dist.init_process_group()  # gloo between CPUs, nccl between GPUs
    yield dist.group.WORLD
    # A process that ends early with an exit code other than 0 would have torchrun end those that still write.
    Processes(dist.group.WORLD).total(0)
    dist.destroy_process_group()
