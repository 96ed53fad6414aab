"""A trial's process, seen from the worker that starts it; and whether a worker is still there."""

import contextlib
import functools
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lwf_unsloth.sweep_result import FAILED
from lwf_unsloth.trial import JOB, RESULT

LOG = "log.txt"
LOOK = 0.5
"""Seconds between two looks at whether the sweep was interrupted."""
UNCLAIMED = 120
"""Seconds that a running trial may name no worker before it counts as gone."""
_NAMELESS: dict[tuple[Any, ...], float] = {}
"""Trials that named no worker when they were seen first, and when that was."""


class Stopped(Exception):
    """The sweep was interrupted, and the trial's process was ended with it."""


def run_process(
    command: Sequence[str],
    folder: Path,
    job: dict[str, Any],
    stop: threading.Event | None = None,
) -> dict[str, Any]:
    """Runs a job in a process of its own, which ends with this one.

    It has a session of its own: an interrupt from the keyboard or a notebook would reach it first,
    and the trial would be recorded as one that failed by itself.

    Args:
        command: What runs it; `folder` is added.
        folder: Where its job, log and result go.
        job: Plain values.
        stop: Ends the process when it is set.

    Returns:
        Its result, or what is known of why there is none.

    Raises:
        Stopped: `stop` was set.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESULT).unlink(missing_ok=True)
    (folder / JOB).write_text(json.dumps(job), encoding="utf-8")
    with (folder / LOG).open("wb") as log:
        command = [*command, str(folder)]
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        code = _wait(process, stop)
    result = read_result(folder)
    if result is not None:
        return result
    words = (folder / LOG).read_text(encoding="utf-8", errors="replace").split("\n")
    last = next((line.strip() for line in reversed(words) if line.strip()), "")
    killed = ", killed, as where memory runs out" * (code == -9)
    reason = f"The process ended with code {code}{killed}. Last words: {last[:500]}"
    return {"state": FAILED, "reason": reason}


def _wait(process: subprocess.Popen[bytes], stop: threading.Event | None) -> int:
    """The code that a process ends with; ends it when `stop` is set."""
    while True:
        try:
            return process.wait(timeout=LOOK)
        except subprocess.TimeoutExpired:
            if stop is not None and stop.is_set():
                process.kill()
                process.wait()
                raise Stopped from None
        except BaseException:
            process.kill()
            raise


def read_result(folder: Path) -> dict[str, Any] | None:
    """The result in a trial's folder, None without one."""
    try:
        found: dict[str, Any] = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        return found
    except (OSError, ValueError):
        return None


def own_result(folder: Path, owner: Any) -> dict[str, Any] | None:
    """`read_result`, if the job beside it is this worker's: a folder may hold an older study's."""
    try:
        job = json.loads((folder / JOB).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return read_result(folder) if owner is not None and job.get("owner") == owner else None


def this_worker() -> dict[str, Any]:
    """This process, so that others can tell whether it is still there."""
    return {"host": _machine(), "pid": os.getpid(), "begun": _begun(os.getpid())}


@functools.cache
def _machine() -> str:
    """This machine since it was started, as far as its processes see each other: machines may have
    one name, and of two containers neither knows the other's processes.
    """
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):  # Linux
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _begun(pid: int) -> float:
    """When a process began. On Linux in ticks since the machine's start, which no change of its
    clock moves; elsewhere in seconds since 1970.

    Raises:
        psutil.NoSuchProcess: There is none, or it has ended and was not yet waited for.
    """
    import psutil

    if not sys.platform.startswith("linux"):
        return float(psutil.Process(pid).create_time())
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        raise psutil.NoSuchProcess(pid) from None
    fields = text.rpartition(")")[2].split()  # from the third one on: the name may hold anything
    if fields[0] in "ZX":
        raise psutil.NoSuchProcess(pid)
    return float(fields[19])


def is_gone(trial: Any) -> bool:
    """Whether a running trial's worker was a process of this machine that is no more.

    Workers of other machines are known by their heartbeat alone.
    """
    import psutil

    owner = trial.user_attrs.get("owner")
    if owner is None:  # it was cut off in the moment between taking it and saying so
        # By the clock of this process: that of the machine that took it may show another time.
        first = _NAMELESS.setdefault((trial._trial_id, trial.datetime_start), time.monotonic())
        return time.monotonic() - first > UNCLAIMED
    if owner["host"] != _machine():
        return False
    try:
        return abs(_begun(owner["pid"]) - owner["begun"]) > 1
    except psutil.NoSuchProcess:
        return True


def gpu_bytes() -> int | None:
    """Bytes in use on the first GPU, by its driver; None without one."""
    ask = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        found = subprocess.run(ask, capture_output=True, text=True, timeout=30, check=True)
        return int(found.stdout.split()[0]) * 2**20
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
