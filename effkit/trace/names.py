"""The words that PyTorch's profiler uses, and what they mean."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from effkit.operators import COMMUNICATES

# Categories that older profilers (torch before 1.13) wrote, or that other backends (MTIA, Gaudi) do, and today's usual
# ones for the same
TODAY: Mapping[str, str] = {
    "Operator": "cpu_op", "Kernel": "kernel", "Runtime": "cuda_runtime", "Memcpy": "gpu_memcpy", "Memset": "gpu_memset",
    "mtia_ccp_events": "kernel", "hpu_op": "kernel",
}  # fmt: skip
STEP, DATALOADER = "ProfilerStep#", "enumerate(DataLoader)#"
RECOMPUTED = "effkit::recomputation"  # how we mark what a checkpoint runs again
ANNOTATIONS = (STEP, DATALOADER, "Optimizer.")  # that older profilers call operators

COPIES = ("gpu_memcpy", "gpu_memset")
DEVICE = ("kernel", *COPIES)
LAUNCHES = ("_runtime", "_driver")  # how the categories of host calls to the device end: cuda_, hip_, xpu_, …
GIVES_WORK = re.compile(r"Launch|Memcpy|Memset|Enqueue")  # which of these calls give the device something to do
STACKS = ("python_function",)
SPANS = ("Trace",)  # the profiler's own marks
# Beside these: marks, and what the profiler says of itself. A pane that meets another category says so.
UNDERSTOOD = ("cpu_op", *DEVICE, *STACKS, "user_annotation", "gpu_user_annotation", "overhead", "cuda_sync",
              "collective_comm", "cuda_profiler_range", "external_correlation", "Python", "Communication")  # fmt: skip
IMPOSSIBLE = "impossible: "  # so begins the category of an event that no pane counts; why its times cannot be follows

# Calls in which the host waits for the device; everything launched before is done when they return
WAITS = re.compile(r"(?:cuda|hip|cu)(?:Device|Stream|Event|Ctx)Synchronize|(?:cuda|hip)Memcpy(?:WithStream|2D)?$")

COLLECTIVE = re.compile(r"(?P<backend>nccl|gloo|ucc|mpi|xccl|rccl):(?P<collective>.+)")  # an annotation of c10d
DEVICE_BACKENDS = ("nccl", "rccl", "xccl")  # work in kernels; the others on threads of the host

# bytes of an element, as traces spell types (C++ of the profiler, c10d, and torch)
ITEM_BYTES: Mapping[str, int] = {
    **dict.fromkeys(("double", "Double", "float64", "long int", "long", "Long", "int64", "int64_t"), 8),
    **dict.fromkeys(("c10::complex<float>", "ComplexFloat", "complex64", "UInt64", "unsigned long"), 8),
    **dict.fromkeys(("float", "Float", "float32", "int", "Int", "int32", "unsigned int", "UInt32"), 4),
    **dict.fromkeys(("c10::Half", "Half", "float16", "c10::BFloat16", "BFloat16", "bfloat16", "short int", "Short"), 2),
    **dict.fromkeys(("signed char", "Char", "int8", "unsigned char", "Byte", "uint8", "bool", "Bool"), 1),
    **dict.fromkeys(("c10::Float8_e4m3fn", "Float8_e4m3fn", "c10::Float8_e5m2", "Float8_e5m2"), 1),
}

_KERNEL_COLLECTIVES = {
    "crossdevicereduce": "all_reduce", "allreduce": "all_reduce", "allgather": "all_gather",
    "reducescatter": "reduce_scatter", "broadcast": "broadcast", "sendrecv": "send_recv", "alltoall": "all_to_all",
    "reduce": "reduce",
}  # fmt: skip


def by_name(names: pd.Series[str], told: Callable[[str], Any]) -> Any:
    """What is told of each name, asked once of each distinct one."""
    codes, distinct = pd.factorize(names)
    answers = np.array([told(name) for name in distinct])
    return answers[codes] if len(answers) else np.zeros(len(names), bool)


def communicates(name: str) -> bool:
    return bool(COMMUNICATES.search(name))


def plain_collective(name: str) -> str:
    """The usual name of a collective.

    >>> plain_collective("_all_gather_base"), plain_collective("allreduce"), plain_collective("all_to_allv")
    ('all_gather', 'all_reduce', 'all_to_all')
    """
    plain = re.sub(r"^_+|_?(base|single|tensor|coalesced)?_*$", "", name.lower())
    squeezed = plain.replace("_", "")
    return next((usual for start, usual in _KERNEL_COLLECTIVES.items() if squeezed.startswith(start)), plain)


def collective_of_kernel(name: str) -> str:
    """What a communication kernel does, from its name.

    >>> collective_of_kernel("ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)")
    'all_reduce'
    >>> collective_of_kernel("void deep_ep::internode::dispatch<false, 4>(int4*)")
    'dispatch'
    >>> collective_of_kernel("moeA2ACombineKernel")  # of FlashInfer and TensorRT-LLM
    'combine'
    >>> collective_of_kernel("void (anonymous namespace)::multimem_all_reduce_kernel<float>(float*)")
    'all_reduce'
    """
    name = name.replace("(anonymous namespace)::", "")
    if word := re.search(r"(?:ep|uccl)::\w*::(\w+)", name):
        return word[1]
    if word := re.search(r"moeA2A(Dispatch|Combine)", name):
        return word[1].lower()
    letters = re.sub(r"[^a-z]", "", name.split("(")[0].lower())
    word = re.search("|".join(_KERNEL_COLLECTIVES), letters)
    return _KERNEL_COLLECTIVES[word[0]] if word else "communication"
