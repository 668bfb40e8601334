"""A training step taken apart: where its time goes, when nothing in it overlaps.

The step is made by hand as TorchRec's ``base`` pipeline makes it: next batch, copy, forward, backward, optimizer.  The
sharded embedding collection is asked for its input dist, lookup and output dist one after the other; hooks around
modules and around autograd's nodes tell the rest.  On CUDA these points are events on the stream, so that nothing is
waited for on the way: a part is what it takes when it overlaps with no other, and the time in which the device waits
for its host is in the part that was late.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer

from mtcl_torchrec.data.batch import MTBatch
from mtcl_torchrec.models import MTCLTrain

PARTS = {
    "input": "waiting for the next batch",
    "copy": "the batch to the device",
    "input dist": "ids to the ranks that hold their rows",
    "embedding forward": "lookup and pooling",
    "output dist": "pooled embeddings back to the ranks of their rows",
    "trunk": "concatenation, interaction and trunk, forward",
    "heads": "towers, heads and loss, with the all-reduce of label counts, forward",
    "dense backward": "from the loss to the gradient of the pooled embeddings",
    "gradient dist": "gradients of pooled embeddings to the ranks that hold the rows",
    "embedding backward": "gradients of rows and, where it is fused, their optimizer",
    "dense all-reduce": "what is left of the backward pass: waiting for the dense gradients of all ranks",
    "optimizer": "zeroing, clipping and stepping: dense parameters, tables whose optimizer is not fused, schedule",
    "other": "the rest of the step",
}


Moment = Any  # seconds on the host, or an event on the device's stream


class _Clock:
    """Adds up milliseconds by part."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._spans: dict[str, list[tuple[Moment, Moment]]] = defaultdict(list)

    def now(self) -> Moment:
        """This moment, in what the device is given to do."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add(self, part: str, start: Moment) -> None:
        """Count the time from then to now."""
        self._spans[part].append((start, self.now()))

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time a block."""
        start = self.now()
        yield
        self.add(name, start)

    def ms(self) -> dict[str, float]:
        """Part -> milliseconds so far; waits for the device."""
        if self.device.type != "cuda":
            return {part: sum(end - start for start, end in of) * 1000 for part, of in self._spans.items()}
        torch.cuda.synchronize(self.device)
        return {part: sum(start.elapsed_time(end) for start, end in of) for part, of in self._spans.items()}


def take_apart(
    model: DistributedModelParallel,
    optimizer: CombinedOptimizer,
    schedule: LambdaLR,
    batches: Iterator[MTBatch],
    device: torch.device,
    steps: int,
) -> dict[str, float]:
    """Train for some steps and time their parts; every rank calls this.

    Args:
        model: of an `MTCLTrain`, trained for some steps and with no pipeline attached.

    Returns:
        Part -> milliseconds, mean over the steps; ``"step"`` is their sum.
    """
    clock = _Clock(device)
    model.train()
    with _timed_forward(model, clock) as graph:
        started = clock.now()
        for _ in range(steps):
            with clock.part("input"):
                batch = next(batches)
            with clock.part("copy"):
                batch = batch.to(device)
            with clock.part("optimizer"):
                optimizer.zero_grad()
            loss, _ = model(batch)
            _backward(loss, graph, clock)
            with clock.part("optimizer"):
                optimizer.step()
                schedule.step()
        clock.add("step", started)
    spent = defaultdict(float, clock.ms())
    # Hooks tell the whole tower, the backward pass to its end, and what lies within them.
    spent["heads"] += spent["tower"] - spent["trunk"]
    spent["dense all-reduce"] -= spent["embedding backward"] + spent["gradient dist"]
    ms = {part: spent[part] / steps for part in PARTS}
    total = spent["step"] / steps
    return {"step": total, **ms, "other": total - sum(ms.values())}


class _Graph:
    """Where a forward pass left the embeddings in autograd's graph."""

    looked_up: list[torch.Tensor]  # this rank's lookups, before the output dist
    pooled: torch.Tensor  # after it


@contextmanager
def _timed_forward(model: nn.Module, clock: _Clock) -> Iterator[_Graph]:
    """Time the forward pass by its modules while the block runs."""
    train_module = next(module for module in model.modules() if isinstance(module, MTCLTrain))
    collection: Any = train_module.model.embedding_bag_collection
    tower, graph = train_module.model.tower, _Graph()

    def forward(features: Any) -> Any:
        context = collection.create_context()
        with clock.part("input dist"):
            ids = collection.input_dist(context, features).wait().wait()
        with clock.part("embedding forward"):
            graph.looked_up = collection.compute(context, ids)
        with clock.part("output dist"):
            pooled = collection.output_dist(context, graph.looked_up).wait()
        graph.pooled = pooled.values()
        return pooled

    with ExitStack() as undo:
        for module, part in (
            (tower.concat, "trunk"),
            (tower.interaction, "trunk"),
            (tower.trunk, "trunk"),
            (tower, "tower"),
            (train_module.loss, "heads"),
        ):
            _time_module(module, part, clock, undo)
        before = collection.forward
        collection.forward = forward
        undo.callback(setattr, collection, "forward", before)
        yield graph


def _time_module(module: nn.Module, part: str, clock: _Clock, undo: ExitStack) -> None:
    started: list[Moment] = []

    def before(*_: Any) -> None:
        started.append(clock.now())

    def after(*_: Any) -> None:
        clock.add(part, started.pop())

    undo.callback(module.register_forward_pre_hook(before).remove)
    undo.callback(module.register_forward_hook(after).remove)


def _backward(loss: torch.Tensor, graph: _Graph, clock: _Clock) -> None:
    """The backward pass, cut where it reaches the pooled embeddings, and below there timed node by node."""
    lookups = _nodes_below([t.grad_fn for t in graph.looked_up])
    exchange = _nodes_below([graph.pooled.grad_fn]) - lookups
    reached: list[Moment] = []

    def reaches(_: torch.Tensor) -> None:
        clock.add("dense backward", started)
        reached.append(clock.now())

    with ExitStack() as undo:
        undo.callback(graph.pooled.register_hook(reaches).remove)
        for nodes, part in ((lookups, "embedding backward"), (exchange, "gradient dist")):
            for node in nodes:
                _time_node(node, part, clock, undo)
        started = clock.now()
        loss.backward()
        clock.add("dense all-reduce", reached[0])


def _nodes_below(roots: list[Any]) -> set[Any]:
    """All nodes of autograd's graph that can be reached from `roots`, these included."""
    found: set[Any] = set()
    left = [node for node in roots if node is not None]
    while left:
        node = left.pop()
        if node not in found:
            found.add(node)
            left += [below for below, _ in node.next_functions if below is not None]
    return found


def _time_node(node: Any, part: str, clock: _Clock, undo: ExitStack) -> None:
    started: list[Moment] = []

    def before(_: Any) -> None:
        started.append(clock.now())

    def after(*_: Any) -> None:
        clock.add(part, started.pop())

    undo.callback(node.register_prehook(before).remove)
    undo.callback(node.register_hook(after).remove)
