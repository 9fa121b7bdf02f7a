"""Times one pass of an arm, weighs it, and repeats it, for tools/bench_attention.py.

CPU: process CPU seconds, and the profiler's records of what torch allocates. CUDA: events, with
the work queued ahead, and the caching allocator's peak.
"""

import contextlib
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from attention_arms import Arm

LEAST_SECONDS = {"cpu": 0.03, "cuda": 0.01}  # of one timing; short passes are repeated within it
CYCLES_A_SECOND = 2.0e9  # of a card, about: how long the head start of the host is


def run_once(arm: Arm, *, backward: bool) -> None:
    """One forward pass, or forward and backward with gradients made anew."""
    if not backward:
        with torch.no_grad():
            arm.forward()
        return
    for leaf in arm.inputs:
        leaf.grad = None
    torch.autograd.backward(arm.forward(), arm.gradients)


def repeated(arm: Arm) -> tuple[int, int]:
    """Run an arm twice; how many outputs and gradients are equal to the bit, and of how many."""
    first, second = _results(arm), _results(arm)
    same = [torch.equal(a, b) for a, b in zip(first, second, strict=True)]
    return sum(same), len(same)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Ask torch and the kernels for results that repeat."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _results(arm: Arm) -> list[torch.Tensor]:
    """Return the outputs and gradients of one pass."""
    for leaf in arm.inputs:
        leaf.grad = None
    outs = arm.forward()
    torch.autograd.backward(outs, arm.gradients)
    grads = [leaf.grad.clone() for leaf in arm.inputs if leaf.grad is not None]
    return [*(out.detach() for out in outs), *grads]


def calls_a_timing(call: Callable[[], None], device: torch.device) -> int:
    """How often a short pass is repeated within one timing."""
    return max(1, min(50, round(LEAST_SECONDS[device.type] / seconds(call, 1, device))))


def seconds(call: Callable[[], None], count: int, device: torch.device) -> float:
    """Seconds a call: CPU seconds of the process, or the card's time between two events."""
    if device.type == "cpu":
        begin = time.process_time()
        for _ in range(count):
            call()
        return max(time.process_time() - begin, 1e-9) / count
    torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    queueing = time.perf_counter() - begin
    torch.cuda.synchronize()
    before = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    after = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    torch.cuda._sleep(int(CYCLES_A_SECOND * min(2.0 * count * queueing, 0.5)))  # type: ignore[no-untyped-call]
    before.record()
    for _ in range(count):
        call()
    after.record()
    torch.cuda.synchronize()
    return float(before.elapsed_time(after)) / 1e3 / count


def spread(times: Sequence[float]) -> float:
    """Distance of the quartiles in per cent of the median."""
    if len(times) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return 100 * (high - low) / middle


def peak_bytes(arm: Arm, device: torch.device) -> int:
    """Most bytes that one pass holds at a time beyond its inputs, gradients included."""
    for leaf in arm.inputs:
        leaf.grad = None
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run_once(arm, backward=arm.trains)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile

    with _quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run_once(arm, backward=arm.trains)
    assert profiler.profiler is not None
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = most = 0
    for _, change in changes:
        held += change
        most = max(most, held)
    return most


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Close the standard error of torch's C++ part, where the profiler says when it starts."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def prepare_ms(arm: Arm, device: torch.device) -> float | None:
    """Median of three, on the host's clock, the card waited for."""
    if arm.prepare is None:
        return None
    times = []
    for _ in range(3):
        begin = time.process_time() if device.type == "cpu" else time.perf_counter()
        arm.prepare()
        if device.type == "cuda":
            torch.cuda.synchronize()
        end = time.process_time() if device.type == "cpu" else time.perf_counter()
        times.append(1e3 * (end - begin))
    return statistics.median(times)


def host_ms(arm: Arm) -> float:
    """How long the host is busy queueing one forward and backward pass."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    run_once(arm, backward=arm.trains)
    passed = time.perf_counter() - begin
    torch.cuda.synchronize()
    return 1e3 * passed
