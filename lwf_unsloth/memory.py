"""How much memory is free where training runs."""

from pathlib import Path

from lwf_unsloth.backend import on_cuda

CGROUP = Path("/sys/fs/cgroup")


def free_memory() -> int | None:
    """Free bytes on the GPU, else in RAM; None where that is not known.

    On a GPU what torch's allocator holds unused counts as free; in RAM what the system can take
    back, within a container's limit.
    """
    if on_cuda():
        import torch

        unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return int(torch.cuda.mem_get_info()[0] + unused)
    try:
        import psutil
    except ImportError:
        return None
    free = int(psutil.virtual_memory().available)
    allowed = _container_room(CGROUP)
    return free if allowed is None else min(free, allowed)


def _container_room(group: Path) -> int | None:
    """Bytes left under a container's memory limit (cgroup v2), None without a limit."""
    try:
        limit = (group / "memory.max").read_text(encoding="utf-8").strip()
        used = int((group / "memory.current").read_text(encoding="utf-8"))
        lines = (group / "memory.stat").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return None
    if limit == "max":
        return None
    caches = sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
    return max(0, int(limit) - used + caches)
