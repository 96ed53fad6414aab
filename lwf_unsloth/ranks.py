"""Processes that train together (torchrun, accelerate launch): who writes, who waits, where each
loads, and one message when one of them fails.

Each process has one device and one copy of the model (DDP). They talk about set-up and files over
a group of their own on the CPU, so that a long wait is no time-out of the group that trains.
"""

import datetime
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from lwf_unsloth.backend import on_cuda, prepare
from lwf_unsloth.errors import ConfigError, LwfError, RankError

Made = TypeVar("Made")

SHARDED = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "UNSLOTH_FSDP2": "FSDP2",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor or context parallelism",
}
"""Switches of launchers -> what would split the model over the processes."""
SIZES = {"UNSLOTH_TP_SIZE": "tensor parallelism", "UNSLOTH_PP_SIZE": "pipeline parallelism"}
"""The same as a number of parts."""
OFF = ("", "0", "false", "no", "off")
LONGEST_WAIT = datetime.timedelta(days=1)
"""For another process's files; one that has ended is noticed at once."""

AGREED = "_lwf_agreed"
"""Attribute of an error that all processes know of."""

_GROUPS: dict[str, Any] = {}


def world() -> int:
    """Processes that were started together, 1 without a launcher."""
    alone = int(os.environ.get("LOCAL_RANK") or -1) < 0
    return 1 if alone else int(os.environ.get("WORLD_SIZE") or 1)


def rank() -> int:
    """This process among them, from 0."""
    return int(os.environ.get("RANK") or 0) if world() > 1 else 0


def local_rank() -> int:
    """This process among those on its machine, from 0: the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK") or 0) if world() > 1 else 0


def start(timeout: object = None) -> None:
    """Joins the other processes; before anything else of a run, and without effect alone.

    Args:
        timeout: Seconds that a step may wait for the others; None, or what is no number, is 1800.

    Raises:
        ConfigError: A launch that splits the weights, or more processes than GPUs.
    """
    check_launch()
    if world() == 1:
        return
    import torch
    from torch import distributed

    if distributed.is_initialized():
        return
    seconds = float(timeout) if isinstance(timeout, (int, float)) and timeout > 0 else 1800.0
    wait = datetime.timedelta(seconds=seconds)
    if on_cuda():
        prepare()  # sets the GPU's allocator up, which is too late once a device is chosen
        device = torch.device("cuda", local_rank())
        torch.cuda.set_device(device)
        distributed.init_process_group("nccl", timeout=wait, device_id=device)
    else:
        distributed.init_process_group("gloo", timeout=wait)
    _group()


def check_launch(args: Any = None) -> None:
    """Refuses launches that cannot work, from what every process sees alike, before any loading.

    Args:
        args: Training arguments, if they are known.

    Raises:
        ConfigError: The launch or the arguments split the model's weights, or there are more
            processes on this machine than GPUs.
    """
    given = {name: os.environ.get(name, "").strip().lower() for name in (*SHARDED, *SIZES)}
    asked = [what for name, what in SHARDED.items() if given[name] not in OFF]
    asked += [what for name, what in SIZES.items() if given[name] not in (*OFF, "1")]
    for name, what in (("fsdp", "FSDP"), ("deepspeed", "DeepSpeed")):
        asked += [what] if getattr(args, name, None) else []
    if asked:
        refusal = ConfigError(
            f"{asked[0]} was asked for, which splits the model over the processes. The teacher is "
            "the same weights with the adapter off, and the loss takes the whole output head, so "
            "here each process needs them whole; in 4 bits they take a quarter of the memory. "
            "Launch without it (accelerate launch --multi_gpu, or torchrun): each GPU then has its "
            "copy, and rows are shared out."
        )
        refusal.told = rank() > 0
        raise refusal
    if world() == 1:
        return
    if not on_cuda():
        # Without the first each process would train alone; without the second its device is
        # "cpu:0", to which torch cannot load a checkpoint's optimizer.
        os.environ.update(ACCELERATE_USE_CPU="true", ACCELERATE_TORCH_DEVICE="cpu")
        return
    import torch

    if local_rank() >= torch.cuda.device_count():
        raise ConfigError(
            f"Process {local_rank()} of this machine has no GPU of its own: there are "
            f"{torch.cuda.device_count()}, and each process needs one. Start as many processes as "
            "there are GPUs (--nproc_per_node, --num_processes)."
        )


def own_device_map(asked: Any) -> Any:
    """Where this process loads the model: as asked alone, on its own device among others.

    Args:
        asked: `device_map` of the settings.

    Raises:
        ConfigError: A map over several devices, or onto another process's.
    """
    if world() == 1:
        return asked
    own = {"": f"cuda:{local_rank()}"} if on_cuda() else None
    if asked is None or asked == own or asked == {"": local_rank()}:
        if own is not None:
            import torch

            torch.cuda.set_device(local_rank())  # kernels go by it
        return own
    raise ConfigError(
        f"device_map is {asked!r} and {world()} processes train together: each has a whole copy on "
        f"its own device ({own or 'the CPU'} for this one), and a map over several would put the "
        "copies in each other's memory. Leave device_map out, or start one process."
    )


# ---------------------------------------------------------------- talking to each other


def _group() -> Any:
    """The processes' group on the CPU; None alone. All of them must come here in the same order."""
    if world() == 1:
        return None
    start()
    if "cpu" not in _GROUPS:
        from torch import distributed

        _GROUPS["cpu"] = distributed.new_group(backend="gloo", timeout=LONGEST_WAIT)
    return _GROUPS["cpu"]


@contextmanager
def together(doing: str) -> Iterator[None]:
    """A part that every process does: where one fails, all end here, with that one's message.

    Parts may stand in each other. A failure while the processes train is not for here: they would
    not come to hear of it; the launcher ends them.

    Args:
        doing: What the part does ("load the model"), as part of a sentence.

    Raises:
        RankError: Another process failed.
    """
    try:
        yield
    except Exception as error:
        if not getattr(error, AGREED, False):
            _agree(error, doing)
        raise
    _agree(None, doing)


def from_first(make: Callable[[], Made], doing: str) -> Made:
    """What the first process makes, in every process; the others wait for it.

    Args:
        make: Makes it; called in the first process alone.
        doing: What it does, as part of a sentence.

    Raises:
        RankError: The first process failed.
    """
    if world() == 1:
        return make()
    made: list[Any] = [None]
    with together(doing):
        if rank() == 0:
            made = [make()]
    from torch import distributed

    distributed.broadcast_object_list(made, src=0, group=_group())
    return made[0]


def _agree(error: Exception | None, doing: str) -> None:
    """Tells the others how it went here, and hears from them.

    Raises:
        RankError: It went well here, and not in another process.
    """
    if world() == 1:
        return
    from torch import distributed

    said: list[str | None] = [None] * world()
    own = None if error is None else _text(error)
    distributed.all_gather_object(said, own, group=_group())
    failed = [(number, text) for number, text in enumerate(said) if text is not None]
    if not failed:
        return
    number, text = failed[0]
    known = error or RankError(f"Process {number} of {world()} could not {doing}: {text}")
    setattr(known, AGREED, True)
    if isinstance(known, LwfError):
        known.told = rank() > 0
    if error is None:
        raise known


def wait_to_end(error: BaseException) -> None:
    """Before a process ends by an error that all know of: the first one gives it out till then,
    and the launcher ends the others as soon as one has ended.
    """
    if getattr(error, AGREED, False):
        from torch import distributed

        with suppress(Exception):  # the first one may have ended by itself
            distributed.barrier(group=_group())
    elif getattr(error, "told", False):
        time.sleep(3)  # they do not know each other yet


def _text(error: Exception) -> str:
    """An error of ours by its message, others by name too."""
    return str(error) if isinstance(error, LwfError) else f"{type(error).__name__}: {error}"


def leave() -> None:
    """Ends the groups, at the end of a run that went well."""
    _GROUPS.clear()
    if world() > 1:
        from torch import distributed

        if distributed.is_initialized():
            distributed.destroy_process_group()
