"""Where the time of a step goes: a stopwatch that charges it to the innermost part entered.

Used by tools/bench_step.py. On a GPU the device is waited for at every change of part, so a step
under the stopwatch is slower than a plain one; its shares are what is read.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

PARTS = (
    "data wait",
    "vision",
    "text",
    "head",
    "loss",
    "backward",
    "communication",
    "optimizer",
    "host work",
)
REST = PARTS[-1]  # the engine's hooks, copies to the device, the loop itself
_COLLECTIVES = (
    "all_gather_into_tensor",
    "all_gather",
    "reduce_scatter_tensor",
    "reduce_scatter",
    "all_reduce",
    "broadcast",
)


class Stopwatch:
    """Wall and CPU seconds of this process by part."""

    def __init__(self, *, wait_for_device: Callable[[], None] = lambda: None) -> None:
        self.wall = dict.fromkeys(PARTS, 0.0)
        self.cpu = dict.fromkeys(PARTS, 0.0)
        self._wait_for_device = wait_for_device
        self._open = [REST]
        self._since = (time.perf_counter(), time.process_time())

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Charge what happens in the block to a part, but for what is charged to another inside."""
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def reset(self) -> None:
        """Forget what was charged so far."""
        self._charge()
        for name in PARTS:
            self.wall[name] = self.cpu[name] = 0.0

    def _charge(self) -> None:
        self._wait_for_device()
        now = (time.perf_counter(), time.process_time())
        name = self._open[-1]
        self.wall[name] += now[0] - self._since[0]
        self.cpu[name] += now[1] - self._since[1]
        self._since = now

    def around(self, stack: ExitStack, owner: Any, attribute: str, name: str) -> None:
        """Charge every call of `owner.attribute` to a part, until `stack` is left."""
        function = getattr(owner, attribute)
        had_own = attribute in vars(owner)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        def undo() -> None:
            if had_own:
                setattr(owner, attribute, function)
            else:
                delattr(owner, attribute)

        setattr(owner, attribute, timed)
        stack.callback(undo)


@contextmanager
def watched(engine: Any, watch: Stopwatch) -> Iterator[None]:
    """Charge the steps of an engine to their parts while the block runs."""
    import torch.distributed as dist

    model = engine.module
    with ExitStack() as stack:
        watch.around(stack, model.core.visual, "forward", "vision")
        watch.around(stack, model.core.language_model, "forward", "text")
        watch.around(stack, model.backbone.get_output_embeddings(), "forward", "head")
        for head in ("_patches", "_pooled"):
            watch.around(stack, model, head, "head")
        watch.around(stack, engine.objective, "sums", "loss")
        watch.around(stack, engine, "_backward_once", "backward")
        watch.around(stack, engine, "_apply", "optimizer")
        for owner in (dist, *_deepspeed_parts()):
            for name in (*_COLLECTIVES, "wait"):
                if hasattr(owner, name) and name in vars(owner):
                    watch.around(stack, owner, name, "communication")
        yield


def _deepspeed_parts() -> list[Any]:
    """Return where DeepSpeed calls collectives, and where it waits for them."""
    from deepspeed.comm.torch import TorchBackend
    from deepspeed.runtime.zero import partition_parameters as zero

    names = ("AllGatherHandle", "AllGatherCoalescedHandle", "MultipleAllGatherHandles")
    return [TorchBackend, *(getattr(zero, name) for name in names if hasattr(zero, name))]
