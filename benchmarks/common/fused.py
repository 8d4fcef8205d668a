"""Bytes and kernels of a pass after fusion, as torch's compiler (inductor) would fuse it: its own scheduler decides, nothing is compiled.

A pass on fake tensors is traced to a graph of operations, inductor lowers it and groups what it would run as one kernel, and each kernel
reads and writes its buffers once. No C++ compiler and no GPU are needed. It is the scheduler of the CPU: matrix products and attention
stay kernels of the libraries, with nothing fused into them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from benchmarks.common.kernels import Tally


def count_fused(run: Callable[..., Any], inputs: list[Tensor], mode: FakeTensorMode) -> Tally:
    """Count the fused kernels of a function of fake tensors; whatever else it reads (weights, memory) counts as read once a kernel."""
    from torch._inductor.compile_fx import view_to_reshape
    from torch._inductor.debug import DebugContext
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    # the code asks torch whether it is being compiled, and takes the way that can be fused
    with mode, torch.no_grad(), patch("torch.compiler.is_compiling", return_value=True):
        graph = make_fx(run, decomposition_table=select_decomp_table(), _allow_fake_constant=True)(*inputs)
    with mode, torch.no_grad():
        inputs = [*inputs, *_lift_constants(graph)]
        view_to_reshape(graph)
        lowering = GraphLowering(graph, example_inputs=inputs, is_inference=True)
        with V.set_graph_handler(lowering), V.set_fake_mode(mode), V.set_debug_handler(DebugContext()):
            lowering.run(*inputs)
            lowering._update_scheduler()
            return _read_scheduler(lowering.scheduler)


def _lift_constants(graph: torch.fx.GraphModule) -> list[Tensor]:
    """Turn the graph's constants into inputs, because they have no values; return them."""
    first, constants = next(node for node in graph.graph.nodes if node.op != "placeholder"), list[Tensor]()
    known: dict[int, Any] = {}
    for node in list(graph.graph.nodes):
        if node.op != "get_attr":
            continue
        value: Any = graph
        for part in node.target.split("."):
            value = getattr(value, part)
        if id(value) not in known:
            with graph.graph.inserting_before(first):
                known[id(value)] = graph.graph.placeholder(f"constant_{node.name}")
            known[id(value)].meta["val"] = value
            constants.append(value)
        node.replace_all_uses_with(known[id(value)])
        graph.graph.erase_node(node)
    graph.recompile()
    return constants


def _read_scheduler(scheduler: Any) -> Tally:
    """Sum the buffers that each kernel of a schedule reads and writes."""
    tally = Tally()
    for node in scheduler.nodes:
        size = node.get_read_write_buffers_sizes()
        if not size:
            continue
        kernel = getattr(getattr(node, "node", None), "python_kernel_name", None)
        name = str(kernel).removeprefix("extern_kernels.").removeprefix("torch.ops.aten.").split(".")[0] if kernel else "fused"
        count = tally.counts[name]
        count.kernels += 1
        count.bytes += size - (0 if kernel else _count_order_alone(node))
    return tally


def _count_order_alone(node: Any) -> int:
    """Count the bytes that a fused kernel is said to read but does not: what it writes over, which decides only when it may run."""
    from torch._inductor.dependencies import MemoryDep

    accesses = node.get_read_write_buffer_accesses(include_reads=True, include_writes=False)
    read = {dep.name for dep in node.read_writes.reads if isinstance(dep, MemoryDep)}
    return sum(size for name, size in accesses.items() if name not in read)
