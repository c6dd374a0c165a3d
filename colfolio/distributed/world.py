"""The ranks that train together, and what they tell one another.

A rank is one process, on a GPU of its own where there are any. All ranks call the same operations
in the same order. Counts, flags and names travel between the hosts' processors, so that no device
is waited for; rows and gradients travel between the devices that they are on.

In a world of one every operation is the identity, and no process group is needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from colfolio.errors import ColfolioError

# Gradients travel in pieces of so many bytes: large enough for the wire to be busy, small enough
# for the next to be packed meanwhile.
_BUCKET_BYTES = 25 * 2**20
# torch before 2.13 knows it by the other name only, and later ones warn of that
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class SharedError(ColfolioError):
    """An error that every rank raises at the same point, in the same words: one need tell it."""


@dataclass(frozen=True, slots=True)
class World:
    """This rank among all.

    Args:
        rank: this process among `size`, from 0.
        local_rank: this process among the `local_size` of its host, from 0.
        host: the group over which the hosts' processors talk; None is the default group.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    host: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        """Whether this is the one rank that prints and writes."""
        return self.rank == 0

    def gather_rows(
        self, rows: Shaped[Tensor, "own *rest"], gradient: Literal["sum", "own"]
    ) -> Shaped[Tensor, "all *rest"]:
        """The rows of all ranks, in the order of ranks; each may have another number, also none.

        If any rank's rows want a gradient, the result carries one on all ranks, and all must then
        run backward through it.

        Args:
            gradient: what a rank's rows receive in backward. "sum": the gradients of all ranks
                added up, where what follows differs between ranks and the loss is their sum.
                "own": this rank's part alone, where all ranks compute the same from the result.
        """
        if self.size == 1:
            return rows
        wants_gradient = torch.is_grad_enabled() and rows.requires_grad
        layouts = self._exchange([len(rows), rows.shape[1:].numel(), rows.itemsize, wants_gradient])
        for rank, (_, *layout) in enumerate(layouts):
            assert layout[:2] == layouts[0][1:3], f"rows of rank {rank} are unlike those of rank 0"
        counts = [count for count, *_ in layouts]
        group = self.host if rows.device.type == "cpu" else None
        if not any(wants for *_, wants in layouts):
            return _gather(rows.detach(), counts, group)
        if not wants_gradient:
            rows = rows.detach().requires_grad_()
        begin = sum(counts[: self.rank])
        gathered = _GatherRows.apply(rows, counts, begin, gradient, group)
        assert isinstance(gathered, Tensor)
        return gathered

    def gather_counts(self, count: int) -> list[int]:
        """Every rank's count, in the order of ranks."""
        return [number for (number,) in self._exchange([count])]

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of ranks: small Python values, pickled."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.host)
        return values

    def agree(self, flag: bool) -> bool:
        """Whether all ranks say True."""
        return all(self.gather_counts(int(flag)))

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        self._exchange([0])

    def same_everywhere(self, value: Any, what: str) -> None:
        """Refuse ranks that differ in what must be the same.

        Args:
            value: small and comparable: settings, a fingerprint, versions.
            what: its name, for the message.

        Raises:
            SharedError: on all ranks, naming the first that differs.
        """
        first, *others = self.gather_objects(value)
        for rank, other in enumerate(others, start=1):
            if other != first:
                raise SharedError(
                    f"all ranks need the same {what}: rank 0 has {first!r}, rank {rank} has "
                    f"{other!r}; start every rank with the same files, arguments and versions"
                )

    @contextmanager
    def together(self) -> Iterator[None]:
        """Let all ranks fail if one does, for steps in which a rank may fail alone.

        Every rank has to come to the end of it, so nothing that a rank which failed would leave
        out may be exchanged inside. In a world of one, errors pass as they are.

        Raises:
            SharedError: on all ranks, for a `ColfolioError` of any; it says whose it was, if not
                all ranks had the same.
        """
        if self.size == 1:
            yield
            return
        failure: ColfolioError | None = None
        try:
            yield
        except ColfolioError as error:
            failure = error
        if self.agree(failure is None):
            return
        messages = self.gather_objects(None if failure is None else str(failure))
        rank, first = next((n, said) for n, said in enumerate(messages) if said is not None)
        is_everyones = all(said == first for said in messages)
        raise SharedError(first if is_everyones else f"rank {rank}: {first}") from failure

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace the gradient of each parameter by its sum over ranks, the same bits on all.

        A parameter without a gradient counts as zeros if any rank has one. Sharded parameters are
        left as they are: their gradients were summed in backward.
        """
        if self.size == 1:
            return
        trained = [
            parameter
            for parameter in parameters
            if parameter.requires_grad and not isinstance(parameter, DTensor)
        ]
        if not trained:
            return
        has_gradient = torch.tensor([p.grad is not None for p in trained], dtype=torch.uint8)
        dist.all_reduce(has_gradient, dist.ReduceOp.MAX, group=self.host)
        wanted = [p for p, has in zip(trained, has_gradient.tolist(), strict=True) if has]
        for work in [self._sum(bucket) for bucket in _buckets(wanted)]:
            work.wait()

    def _sum(self, bucket: list[nn.Parameter]) -> dist.Work:
        """Begin to sum the gradients of a bucket, which become views of what travels."""
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        sizes = [gradient.numel() for gradient in gradients]
        for parameter, piece in zip(bucket, flat.split(sizes), strict=True):
            parameter.grad = piece.view(parameter.shape)
        group = self.host if flat.device.type == "cpu" else None
        work = dist.all_reduce(flat, group=group, async_op=True)
        assert work is not None
        return work

    def _exchange(self, numbers: list[int]) -> list[list[int]]:
        """Every rank's numbers, in the order of ranks."""
        if self.size == 1:
            return [numbers]
        own = torch.tensor(numbers, dtype=torch.int64)
        every = torch.empty(self.size * len(numbers), dtype=torch.int64)
        _all_gather(every, own, group=self.host)
        return every.view(self.size, -1).tolist()


class _GatherRows(torch.autograd.Function):
    """Rows of all ranks, with an exact gradient.

    `torch.distributed.nn.functional.all_gather` is wrong on gloo where the incoming gradient is not
    contiguous (pytorch issue 192920); here it is made so before it travels.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        counts: list[int],
        begin: int,
        gradient: Literal["sum", "own"],
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        ctx.own, ctx.gradient, ctx.group = slice(begin, begin + len(rows)), gradient, group
        return _gather(rows, counts, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        if ctx.gradient == "sum":
            gradient = gradient.clone(memory_format=torch.contiguous_format)
            dist.all_reduce(gradient, group=ctx.group)
        own = gradient[ctx.own].clone(memory_format=torch.contiguous_format)
        return own, None, None, None, None


def _gather(rows: Tensor, counts: list[int], group: dist.ProcessGroup | None) -> Tensor:
    """Rows of all ranks, moved as bytes, so that every dtype travels over every backend."""
    longest = max(counts)
    padded = rows.new_zeros(longest, *rows.shape[1:])
    padded[: len(rows)] = rows
    received = rows.new_empty(len(counts) * longest, *rows.shape[1:])
    if received.numel():
        as_bytes = [tensor.flatten().view(torch.uint8) for tensor in (received, padded)]
        _all_gather(*as_bytes, group=group)
    if min(counts) == longest:
        return received
    begins = range(0, len(received), longest)
    return torch.cat(
        [received[begin : begin + count] for begin, count in zip(begins, counts, strict=True)]
    )


def _buckets(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters of one dtype and device, behind one another, of about `_BUCKET_BYTES`."""
    kinds: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
    for parameter in parameters:
        kinds.setdefault((parameter.dtype, parameter.device), []).append(parameter)
    for alike in kinds.values():
        ends = list(accumulate(parameter.nbytes for parameter in alike))
        buckets: dict[int, list[nn.Parameter]] = {}
        for end, parameter in zip(ends, alike, strict=True):
            buckets.setdefault(end // _BUCKET_BYTES, []).append(parameter)
        yield from buckets.values()
