"""Processes that train together (torchrun, accelerate launch): who writes, who waits, where each
loads, and one message when one of them fails.

Each process has one device and one copy of the model (DDP). What they say to each other about
set-up and files goes over the launcher's store, apart from the group that trains: no wait for a
file is a time-out there, and the group may begin whenever the libraries begin it.
"""

import base64
import datetime
import functools
import json
import os
import pickle
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from lwf_unsloth.backend import on_cuda
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
"""For what another process makes; the launcher ends all when one has ended with an error."""
SHORT_WAIT = datetime.timedelta(minutes=1)
"""Of a process that has failed, for others that may be in the midst of something."""
PART = 2**20
"""Bytes that are handed over at once."""

AGREED = "_lwf_agreed"
"""Attribute of an error that all processes know of."""


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


class _Line:
    """What the processes say to each other, in turns that all of them take in the same order."""

    def __init__(self) -> None:
        from torch import distributed

        store, _, _ = next(distributed.rendezvous("env://"))  # the launcher's, with a prefix
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.store = distributed.PrefixStore(f"lwf_unsloth/{attempt}", store)
        self.turn = 0

    def exchange(self, own: Any, wait: datetime.timedelta) -> list[Any]:
        """What each process says in this turn, by process.

        Args:
            own: What this one says.
            wait: Most time for the others.
        """
        self.turn += 1
        keys = [f"{self.turn}/{number}" for number in range(world())]
        self.store.set(keys[rank()], json.dumps(own))
        self.store.wait(keys, wait)
        return [json.loads(self.store.get(key)) for key in keys]

    def hand_out(self, made: Any) -> Any:
        """What the first process has made, in all of them."""
        self.turn += 1
        place = f"{self.turn}/made"
        if rank() == 0:
            data = base64.b64encode(pickle.dumps(made)).decode()
            parts = [data[at : at + PART] for at in range(0, len(data), PART)]
            for number, part in enumerate(parts):
                self.store.set(f"{place}/{number}", part)
            self.store.set(place, str(len(parts)))
            return made
        self.store.wait([place], LONGEST_WAIT)
        count = int(self.store.get(place))
        heard = [self.store.get(f"{place}/{number}") for number in range(count)]
        return pickle.loads(base64.b64decode(b"".join(heard)))


@functools.cache
def _line() -> _Line:
    return _Line()


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
    made: Any = None
    with together(doing):
        if rank() == 0:
            made = make()
    found: Made = _line().hand_out(made)
    return found


def _agree(error: Exception | None, doing: str) -> None:
    """Tells the others how it went here, and hears from them.

    Raises:
        RankError: It went well here, and not in another process.
    """
    if world() == 1:
        return
    own = None if error is None else _text(error)
    try:
        said = _line().exchange(own, LONGEST_WAIT if error is None else SHORT_WAIT)
    except Exception:
        if error is None:
            raise
        return  # the others are elsewhere: this one ends by itself, and the launcher ends them
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
        with suppress(Exception):  # the first one may have ended by itself
            _line().exchange("ends", SHORT_WAIT)
    elif getattr(error, "told", False):  # the first one has yet to say it, and is waited for
        time.sleep(SHORT_WAIT.total_seconds())


def _text(error: Exception) -> str:
    """An error of ours by its message, others by name too."""
    return str(error) if isinstance(error, LwfError) else f"{type(error).__name__}: {error}"


def leave() -> None:
    """At the end of a run that went well: none ends while another still speaks."""
    if world() == 1:
        return
    from torch import distributed

    with together("end"):
        pass
    if distributed.is_initialized():
        distributed.destroy_process_group()
