"""A communication hook of DistributedDataParallel that sends gradients with few bits per layer."""

from __future__ import annotations

import heapq
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from adalayer_native.distributed.encoding import decoded, encoded, levels_of, rounding_variance
from adalayer_native.errors import ClusterError, FileFormatError, PlanError

__all__ = ["QuantizedGradients"]

SMALL = 1024  # values below which a tensor goes as it is: biases, batch norms
# Bits of which rounding by chance leaves out more than there is: what is kept would only grow.
CHANCELESS = 2
MEMORY = 0.9  # per step, of the statistics that widths are chosen by


class QuantizedGradients:
    """Bits per layer for the gradients of a model that trains in several processes.

    Every process sends its gradients rounded up or down by chance, and averages what all of them
    sent; all come to the same average. Widths follow the gradients: bits go where they take away
    most of the variance that rounding adds, as many as ``bits`` allows on average.

        ddp = DistributedDataParallel(model)
        gradients = QuantizedGradients(ddp, bits=4.5)

    Args:
        model: the wrapped model; its hook is set, so there must be no other.
        bits: average per value of the tensors that are quantized, 2 to 8.
        least, most: bits of any tensor.
        every: steps after which widths are chosen anew.
        feedback: add what a process did not send to its next gradient. Gradients of 2 bits are then
            rounded to the nearest level, since chance leaves out more of them than there is.
        seed: of the rounding; every rank has its own draw.

    Attributes:
        widths: bits by parameter name.
        sent: bytes that this process has sent: what it has to say, to every other one.
        full: bytes that it would have sent as its share of a ring that adds up float32 gradients.
            They grow less with the number of processes, so that what is gained shrinks: of two
            processes it is all of ``32 / bits``, of four half of it.
        steps: that have been averaged.

    Raises:
        PlanError: bits out of range.
        ClusterError: no process group; in a step, a process that is gone or does not answer within
            the group's timeout, or sends what is no gradient of this model; a gradient with NaN or
            infinity (a ``GradScaler``, which tries such ones, does not go with it).
    """

    def __init__(
        self,
        model: nn.parallel.DistributedDataParallel,
        bits: float = 4.0,
        *,
        least: int = 2,
        most: int = 8,
        every: int = 50,
        feedback: bool = True,
        seed: int = 0,
    ) -> None:
        if not 2 <= least <= most <= 8:
            raise PlanError(f"expected 2 <= least <= most <= 8 bits, got {least} and {most}")
        if not least <= bits <= most:
            raise PlanError(f"an average of {bits} bits is not between {least} and {most}")
        if every < 1:
            raise PlanError(f"widths can be chosen every step at the most, got every={every}")
        if not (dist.is_available() and dist.is_initialized()):
            raise ClusterError(
                "quantized gradients need a process group: torch.distributed.init_process_group"
            )
        if not isinstance(model, nn.parallel.DistributedDataParallel):
            raise PlanError(
                f"expected a DistributedDataParallel model, got a {type(model).__name__}"
            )
        self.bits, self.least, self.most, self.every = bits, least, most, every
        self.feedback = feedback
        self.group = model.process_group
        self.steps = self.sent = self.full = 0
        self._names = {id(p): name for name, p in model.module.named_parameters()}
        counts = {name: p.numel() for name, p in model.module.named_parameters() if p.requires_grad}
        self._counts = {name: count for name, count in counts.items() if count >= SMALL}
        start = int(bits)
        self.widths = dict.fromkeys(self._counts, start)
        self._variance = dict.fromkeys(self._counts, 0.0)
        self._kept: dict[str, Tensor] = {}
        rank = dist.get_rank(self.group)
        self._generator = torch.Generator().manual_seed(seed * 1_000_003 + rank)
        # DDP compares annotations as types, which those of this file are not.
        model.register_comm_hook(self, lambda state, bucket: _averaged(state, bucket))

    @property
    def ratio(self) -> float:
        """``full`` over ``sent``."""
        return self.full / max(1, self.sent)

    def encode(self, name: str, gradient: Tensor) -> Tensor:
        """This process's bytes of one gradient; what they leave out is kept for the next."""
        if name not in self.widths:
            return gradient.reshape(-1).contiguous().view(torch.uint8)
        values = gradient.float()
        if self.feedback and name in self._kept:
            values = values + self._kept[name]
        bits = self.widths[name]
        nearest = self.feedback and bits == CHANCELESS
        data = encoded(values, bits, self._generator, nearest=nearest)
        if self.feedback:
            back, _ = decoded(data, values.numel())
            self._kept[name] = values - back.view_as(values)
        return data

    def note(self, name: str, average: Tensor) -> None:
        """Statistics of what all processes came to."""
        if name in self._variance:
            old = self._variance[name]
            new = rounding_variance(average)
            self._variance[name] = MEMORY * old + (1 - MEMORY) * new if old else new

    def step(self) -> None:
        """A whole gradient has been averaged."""
        self.steps += 1
        if self.steps % self.every == 0 or self.steps == 1:
            self.widths = self._chosen()

    def _chosen(self) -> dict[str, int]:
        """Bits one after the other to the tensor that each of them helps most, per value."""
        widths = dict.fromkeys(self._counts, self.least)
        left = (self.bits - self.least) * sum(self._counts.values())

        def gain(name: str) -> float:
            now, more = (levels_of(widths[name] + extra) for extra in (0, 1))
            saved = self._variance[name] * (1 / now**2 - 1 / more**2)
            return saved / self._counts[name]

        heap = [(-gain(name), name) for name in widths]
        heapq.heapify(heap)
        while heap:
            _, name = heapq.heappop(heap)
            if widths[name] >= self.most or self._counts[name] > left:
                continue
            widths[name] += 1
            left -= self._counts[name]
            heapq.heappush(heap, (-gain(name), name))
        return widths


def _averaged(state: QuantizedGradients, bucket: dist.GradBucket) -> torch.futures.Future[Any]:
    """Of a bucket's gradients, over all processes."""
    names = [state._names[id(p)] for p in bucket.parameters()]
    gradients = bucket.gradients()
    for name, gradient in zip(names, gradients, strict=True):
        if not bool(torch.isfinite(gradient).all()):
            raise ClusterError(f"the gradient of {name!r} contains NaN or infinity")
    parts = [state.encode(n, g) for n, g in zip(names, gradients, strict=True)]
    data = torch.cat(parts)
    everyone = _gathered(data, state.group)
    others, whole = len(everyone) - 1, sum(4 * gradient.numel() for gradient in gradients)
    state.sent += len(data) * others
    state.full += 2 * whole * others // len(everyone)
    sums = [torch.zeros_like(gradient, dtype=torch.float32) for gradient in gradients]
    for rank, other in enumerate(everyone):
        try:
            _add(state, names, sums, other)
        except FileFormatError as error:
            raise ClusterError(f"process {rank} sent no gradient of this model: {error}") from error
    for name, gradient, total in zip(names, gradients, sums, strict=True):
        total /= len(everyone)
        state.note(name, total)
        gradient.copy_(total)
    if bucket.is_last():
        state.step()
    done: torch.futures.Future[Any] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def _add(state: QuantizedGradients, names: list[str], sums: list[Tensor], data: Tensor) -> None:
    """The gradients in one process's bytes."""
    at = 0
    for name, total in zip(names, sums, strict=True):
        count = total.numel()
        if name in state.widths:
            values, length = decoded(data[at:], count)
        else:
            length = 4 * count
            if len(data) - at < length:
                raise FileFormatError(f"{name}: {len(data) - at} bytes are too few")
            values = data[at : at + length].clone().view(torch.float32)
        total += values.view_as(total)
        at += length
    if at != len(data):
        raise FileFormatError(f"{len(data) - at} bytes are left over")


def _gathered(data: Tensor, group: Any) -> list[Tensor]:
    """The bytes of every process, in the order of the ranks."""
    count = dist.get_world_size(group)
    try:
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(count)]
        dist.all_gather(lengths, torch.tensor([len(data)]), group=group)
        largest = max(int(length) for length in lengths)
        padded = torch.nn.functional.pad(data, (0, largest - len(data)))
        found = [torch.empty(largest, dtype=torch.uint8) for _ in range(count)]
        dist.all_gather(found, padded, group=group)
    except RuntimeError as error:  # a peer is gone, or silent for longer than the group's timeout
        raise ClusterError(f"a process of the group does not answer: {error}") from error
    return [part[: int(length)] for part, length in zip(found, lengths, strict=True)]
