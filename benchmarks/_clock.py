"""Milliseconds of a step, by the GPU's clock where there is one."""

import time
from collections.abc import Callable
from typing import Any

import torch

CUDA = torch.cuda.is_available()


def clock(run: Callable[[], Any]) -> float:
    """Milliseconds from an idle device to an idle device."""
    if not CUDA:
        start = time.perf_counter()
        run()
        return 1000.0 * (time.perf_counter() - start)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end))
