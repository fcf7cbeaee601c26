"""Fast code for a graph, by torch's inductor, and CUDA graphs of it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx import GraphModule

__all__ = ["generate"]


def generate(module: GraphModule, held: list[Tensor], inputs: list[Tensor]) -> Callable:
    """Compiles a graph with torch's inductor. If that fails, returns the graph itself and says once what is missing.

    Args:
        module: the graph, of `held` and `inputs`.
        held: the same tensors in each call.
        inputs: examples of those that change.
    """
    _keep_freed_memory()
    module = copy.deepcopy(module)
    for node in module.graph.nodes:
        node.meta.clear()  # inductor makes its own
    run: Callable = module.forward
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about torch's own code
            from torch._inductor import compile as inductor

            # fallback_random: the same random numbers as torch's own kernels
            run = inductor(module, [t.detach() for t in (*held, *inputs)], {"fallback_random": True})
    except Exception as error:
        _hint(error)
    if all(t.is_cuda for t in (*held, *inputs)):
        return _Captured(run, len(held))
    return run


class _Captured:
    """A function of CUDA tensors, captured as a CUDA graph after three runs, and then replayed.

    Args:
        run: the function.
        held: how many of its arguments stay where they are.
    """

    def __init__(self, run: Callable, held: int) -> None:
        self.run, self.held = run, held
        self.left = 3.0  # runs before the capture, in which libraries set themselves up
        self.graph: torch.cuda.CUDAGraph | None = None
        self.places: list[int] = []
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []

    def __call__(self, *arguments: Tensor) -> list[Tensor]:
        if self.left:
            self.left -= 1
            return list(self.run(*arguments))
        held, inputs = arguments[: self.held], arguments[self.held :]
        places = [t.data_ptr() for t in held]
        if self.graph is None or places != self.places:
            self.places, self.inputs = places, [t.clone() for t in inputs]
            try:
                self.graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graph):
                    self.outputs = list(self.run(*held, *self.inputs))
            except RuntimeError as error:  # some operations cannot be captured
                reason = str(error).strip().partition("\n")[0]
                warnings.warn(
                    f"no CUDA graph of this function: kernels are launched one by one: {reason}", stacklevel=2
                )
                self.left = float("inf")
                return list(self.run(*arguments))
        for place, value in zip(self.inputs, inputs, strict=True):
            place.copy_(value)
        self.graph.replay()
        return [t.clone() for t in self.outputs]


def _keep_freed_memory() -> None:
    """Lets glibc keep what a step frees for the next one.

    By default it gives megabytes at the top of the heap back to the system after each step and has them mapped again,
    page by page, in the next: a third of the time of a step on small networks. One block of nearly 32 MiB, made and
    freed, raises the threshold, as any larger tensor of the process would have.
    """
    torch.empty(2**25 - 2**16, dtype=torch.uint8)


_hinted = False


def _hint(error: Exception) -> None:
    global _hinted
    if _hinted:
        return
    _hinted = True
    missing = "C++ compiler" if "Cxx" in type(error).__name__ or "compiler" in str(error).lower() else "code generator"
    warnings.warn(
        f"no working {missing} for torch's inductor here ({type(error).__name__}: {str(error).strip()[:200]}); graphs "
        "run operation by operation: the same numbers, more slowly. Try to install g++ (Linux), clang (macOS) or "
        "Visual Studio (Windows).",
        stacklevel=2,
    )
