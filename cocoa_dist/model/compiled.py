"""Compiles the layers of a backbone, and takes that back where it does more harm than good.

A layer that cannot be compiled, and layers that are compiled again and again, run as they are from
then on: slower, with the same numbers up to rounding. Attention is never compiled.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from cocoa_dist.attention import segment_attention
from cocoa_dist.distributed import rank

log = logging.getLogger("cocoa_dist.model")

# Text and vision, with and without gradients: 4 to 20 in the three families, evaluation included
# at most twice as many. More means that something is compiled anew for every pack.
MOST_GRAPHS = 48
_COMPILED_KINDS = 64  # torch's own limit, beyond which it goes on without a word

Compiler = Callable[[Any, Any], Any]  # torch.compile's `backend`: a graph and inputs -> a function


@dataclass
class Compilation:
    """How the compilation of one model's layers goes, on this rank."""

    graphs: int = 0  # compiled so far
    stopped: str = ""  # why layers run as they are again; empty while they are compiled

    def __deepcopy__(self, memo: Any) -> "Compilation":
        """Return this one: a copied layer is compiled with the others."""
        return self

    def stop(self, reason: str) -> None:
        """Run layers as they are from the next call on; said once."""
        if not self.stopped:
            self.stopped = reason
            log.warning(
                "rank %d: layers run without torch.compile from here on, slower: %s. "
                "model.compile_layers=false leaves it out from the start",
                *(rank(), reason),
            )

    def counting(self, compiler: Compiler) -> Compiler:
        """Return the compiler with its graphs counted; what is one too many is not compiled."""

        def compile_one(graph: Any, inputs: Any) -> Any:
            self.graphs += 1
            if self.graphs > MOST_GRAPHS:
                self.stop(
                    f"{self.graphs} graphs were compiled, expected at most {MOST_GRAPHS}: "
                    "something is compiled anew for pack after pack"
                )
            return graph.forward if self.stopped else compiler(graph, inputs)

        return compile_one


def compile_layers(model: PreTrainedModel, *, backend: str | Compiler = "inductor") -> Compilation:
    """Compile the decoder layers and vision blocks with torch.compile; attention stays as it is.

    Names of parameters do not change. Lengths are symbols from the start: every pack has others.
    """
    from torch import _dynamo as dynamo  # a second to import, for those who compile
    from torch._functorch import config as functorch_config

    language, visual = model.model.language_model, model.model.visual
    # Attention stays out: plans differ from pack to pack.
    # One code object serves all layers: text, vision, windows or not, with and without gradients.
    dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, _COMPILED_KINDS)
    # A backward pass that cannot be compiled is found in the forward pass, where there is a way out
    functorch_config.force_non_lazy_backward_lowering = True
    eager: Any = torch.compiler.disable(segment_attention)  # type: ignore[no-untyped-call]
    for attention in (*[x.self_attn for x in language.layers], *[x.attn for x in visual.blocks]):
        attention.attend = eager
    compilation = Compilation()
    named: Any = dynamo.lookup_backend(backend) if isinstance(backend, str) else backend
    compiler = compilation.counting(named)
    for layers in (language.layers[:-1], language.layers[-1:], visual.blocks):
        if not len(layers):
            continue
        forward = type(layers[0]).forward
        plain = getattr(forward, "__wrapped__", forward)  # without transformers' own checkpointing
        compiled = torch.compile(plain, backend=compiler, dynamic=True)
        for layer in layers:
            layer.forward = partial(_run_layer, layer, compilation, compiled, plain)
            # DeepSpeed reads it: ZeRO-3 gathers a layer's weights at once, ahead of the layer.
            # Its hooks on every part would cut what is compiled into pieces of one operation.
            layer._z3_leaf = True
    return compilation


def compilation_of(model: nn.Module) -> Compilation | None:
    """Return how the compilation of a model's layers goes; None where they are not compiled."""
    for module in model.modules():
        forward = vars(module).get("forward")
        if isinstance(forward, partial) and forward.func is _run_layer:
            found: Compilation = forward.args[1]
            return found
    return None


def _run_layer(
    layer: nn.Module,
    compilation: Compilation,
    compiled: Any,
    plain: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Run a layer; its activations are checkpointed around what was compiled, never inside."""
    from torch._dynamo.exc import TorchDynamoException

    # What a checkpoint runs again has to be what it ran before, whatever happened in between.
    chosen = plain if compilation.stopped else compiled

    def run(*inputs: Any) -> Any:
        nonlocal chosen
        try:
            return chosen(layer, *inputs, **kwargs)
        except TorchDynamoException as error:
            if chosen is plain:
                raise
            chosen = plain
            cause = getattr(error, "inner_exception", error)  # of a backend that failed
            first_line = str(cause).strip().partition("\n")[0]
            compilation.stop(f"{type(cause).__name__}: {first_line}")
            return plain(layer, *inputs, **kwargs)

    if layer.gradient_checkpointing and layer.training:
        checkpoint: Any = layer._gradient_checkpointing_func
        return checkpoint(run, *args)
    return run(*args)
