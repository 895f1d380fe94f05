"""Timing of GPU work: CUDA graphs over rotating weights, kernels interleaved; kernel names.

One call is too short to time and would find its weight in the L2 cache. So a graph holds many
calls, each on the next of several copies of the weight, together larger than any L2. Kernels that
are compared take turns in several rounds: what the chip's clock does, it does to all of them.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd import DeviceType  # type: ignore[attr-defined]  # not in its __all__

ROTATION_BYTES = 200_000_000  # four times the L2 of an H100
ROUNDS = 5
REPLAYS = 3  # of a graph in a round, at least
SETTLE_SECONDS = 0.3  # of large calls in a round; the first half is not counted
GRAPH_SECONDS = 1e-3  # aimed at: events resolve half a microsecond
MAX_CALLS = 128  # of a kernel in a graph; capturing costs host time

Key = TypeVar("Key", bound=Hashable)
Call = Callable[[int], Tensor]  # with a number of a copy of the weight


class Timing(NamedTuple):
    """Microseconds of one call: the median of the rounds, the fastest and the slowest round."""

    us: float
    us_min: float
    us_max: float


def copies_needed(weight_bytes: int) -> int:
    """How many copies of a weight make up ROTATION_BYTES; two at least."""
    return max(2, math.ceil(ROTATION_BYTES / weight_bytes))


def calls_needed(copies: int, seconds: float) -> int:
    """Calls in a graph: whole rotations, until calls of about `seconds` fill GRAPH_SECONDS."""
    calls = min(MAX_CALLS, GRAPH_SECONDS / seconds)
    return copies * max(1, math.ceil(calls / copies))


def summarize(rounds: Sequence[float]) -> Timing:
    return Timing(statistics.median(rounds), min(rounds), max(rounds))


class Captured(NamedTuple):
    """A graph of many calls."""

    graph: torch.cuda.CUDAGraph
    calls: int
    call: Call  # keeps alive what the graph reads

    def time(self, seconds: float = 0.0) -> float:
        """Microseconds of one call: the median of replays that take `seconds`, or of REPLAYS.

        The first half does not count.
        """
        replays, events = 2 * REPLAYS, [self._replay()]  # keeps the GPU busy while others queue
        while len(events) <= replays:
            events.append(self._replay())
            if len(events) == REPLAYS:
                events[-1].synchronize()
                once = events[0].elapsed_time(events[-1]) * 1e-3 / (REPLAYS - 1)
                replays = max(replays, math.ceil(seconds / once))
        events[-1].synchronize()
        counted = pairwise(events[len(events) // 2 :])
        milliseconds: list[float] = [a.elapsed_time(b) for a, b in counted]
        return statistics.median(milliseconds) * 1000 / self.calls

    def _replay(self) -> torch.cuda.Event:
        self.graph.replay()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Timer:
    """Captures and times on one stream, which it makes current: libraries set themselves up for a
    stream when they first run on it, and they should not do so during capture.

    Its graphs share one pool of memory, which is safe: they are never replayed at the same time,
    and no output outlives its call.
    """

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()
        torch.cuda.set_stream(self.stream)
        self.pool = torch.cuda.graph_pool_handle()

    def capture(self, call: Call, copies: int, seconds: float) -> Captured:
        """Capture calls on each copy of a weight in turn.

        seconds: a rough lower estimate of one call. The call must have run once before, so that
        nothing is compiled during capture.
        """
        captured = Captured(torch.cuda.CUDAGraph(), calls_needed(copies, seconds), call)
        with torch.cuda.graph(captured.graph, pool=self.pool, stream=self.stream):
            for i in range(captured.calls):
                call(i % copies)
        return captured


def interleave(
    time_round: Mapping[Key, Callable[[], float]], failed: Callable[[Key, Exception], None]
) -> dict[Key, Timing]:
    """ROUNDS rounds that time everything once each; what fails is reported and left out.

    Each round in another order, always the same ones: a kernel inherits the clock that the one in
    front of it has left, and no kernel should always follow the same.
    """
    shuffled = random.Random(0)
    times: dict[Key, list[float]] = {key: [] for key in time_round}
    for _ in range(ROUNDS):
        for key in shuffled.sample(list(times), len(times)):
            try:
                times[key].append(time_round[key]())
            except Exception as error:
                del times[key]
                failed(key, error)
    return {key: summarize(rounds) for key, rounds in times.items()}


def memory_bandwidth() -> float:
    """Bytes per second of device memory: the better of a copy and a sum of half a gigabyte."""
    source = torch.ones(2**27, device="cuda")
    target = torch.empty_like(source)
    actions: list[tuple[Callable[[], object], int]] = [
        (lambda: target.copy_(source), 2 * source.nbytes),
        (lambda: source.sum(), source.nbytes),
    ]
    best = 0.0
    for action, size in actions:
        for _ in range(5):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            action()  # keeps the GPU busy while the next is queued
            start.record()
            action()
            end.record()
            end.synchronize()
            best = max(best, size / (start.elapsed_time(end) * 1e-3))
    return best


def kernel_names(
    calls: Iterable[tuple[Key, Callable[[], object]]],
) -> dict[Key, list[str]]:
    """What each call launches on the GPU, in order, as the profiler (kineto) sees it.

    `calls` may prepare a call while it is iterated: only what runs in the call counts.
    """
    from torch.profiler import ProfilerActivity, profile, record_function

    marker = "intscale_bench_call_"
    keys: list[Key] = []
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for key, call in calls:
            torch.cuda.synchronize()
            with record_function(f"{marker}{len(keys)}"):
                call()
                torch.cuda.synchronize()
            keys.append(key)
    return _attribute(list(profiler.events() or ()), marker, keys)


def _attribute(events: Sequence[Any], marker: str, keys: Sequence[Key]) -> dict[Key, list[str]]:
    """GPU events by the marked range of host time in which they started."""
    on_gpu = [event.device_type == DeviceType.CUDA for event in events]
    names: dict[Key, list[str]] = {key: [] for key in keys}
    launched = sorted(
        (event.time_range.start, event.name)
        for event, gpu in zip(events, on_gpu, strict=True)
        if gpu and not event.name.startswith(marker)  # a marked range shows up there, too
    )
    for event, gpu in zip(events, on_gpu, strict=True):
        if not gpu and event.name.startswith(marker):
            span = event.time_range
            inside = [name for start, name in launched if span.start <= start <= span.end]
            names[keys[int(event.name.removeprefix(marker))]] = inside
    return names
