"""A smaller card, stood in for: another process holds memory until so much is free.

An allocator's cap would mislead, since Unsloth and ours size their chunks by the card's free
memory.
"""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

HOLDER = """
import sys, torch
target, held = int(sys.argv[1]), []
for size in (2**30, 2**27, 2**24, 2**22):
    while torch.cuda.mem_get_info()[0] - size >= target:
        held.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
print(torch.cuda.mem_get_info()[0], flush=True)
sys.stdin.read()
"""


@contextmanager
def free_memory(gib: float) -> Iterator[float]:
    """Leaves `gib` GiB free on the card for the block; gives what is free, 0 without a GPU.

    Raises:
        RuntimeError: Less is free already, or the holder failed.
    """
    if not torch.cuda.is_available():
        yield 0.0
        return
    torch.zeros(1, device="cuda")  # this process's own context is not counted
    torch.cuda.empty_cache()
    target = int(gib * 2**30)
    if torch.cuda.mem_get_info()[0] < target:
        raise RuntimeError(f"less than {gib} GiB of the card's memory are free")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(target)], text=True, **pipes)  # type: ignore[call-overload]
    try:
        line = holder.stdout.readline()
        if not line.strip():
            raise RuntimeError(f"the process that holds memory ended with {holder.wait()}")
        yield int(line) / 2**30
    finally:
        holder.stdin.close()
        holder.wait()
