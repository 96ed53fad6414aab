"""The panel's work in a thread: it ends in a text, or an error, and warnings."""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

from lwf_unsloth.errors import LwfError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """How a piece of work ended."""

    said: str = ""
    """What it returned; empty after an error."""
    error: BaseException | None = None
    notes: tuple[str, ...] = ()
    """Warnings that the library logged meanwhile, each once."""

    @property
    def trouble(self) -> str:
        """The error as a text for people; empty without one."""
        if self.error is None or isinstance(self.error, LwfError):
            return str(self.error or "")
        first = next((line for line in str(self.error).splitlines() if line.strip()), "").strip()
        kind = type(self.error).__name__
        text = f"{kind}: {first}".rstrip(".") if first else kind
        if "out of memory" in str(self.error).lower():
            return f"{text}. Lower the rows a forward, or free memory that another notebook holds."
        return f"{text}. The panel can go on being used; its attribute `error` holds the whole."


def outcome(work: Callable[[], str]) -> Outcome:
    """Does the work; no error leaves it.

    Args:
        work: Returns what is to be said.

    Returns:
        How it ended.
    """
    with _Notes() as notes:
        try:
            said, error = work(), None
        except BaseException as raised:  # a thread has nobody above it to tell
            said, error = "", raised
            logger.debug("in the panel", exc_info=True)
    return Outcome(said, error, tuple(notes.texts))


class _Notes(logging.Handler):
    """Warnings of the library that this thread logs, for the panel in place of the page."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []
        self._thread = threading.get_ident()

    def emit(self, record: logging.LogRecord) -> None:
        """Keeps a text once; the load report stands in the panel anyway."""
        mine = record.thread == self._thread and not record.name.endswith(".alpaca")
        if mine and record.getMessage() not in self.texts:
            self.texts.append(record.getMessage())

    def __enter__(self) -> "_Notes":
        logging.getLogger("lwf_unsloth").addHandler(self)
        return self

    def __exit__(self, *error: object) -> None:
        logging.getLogger("lwf_unsloth").removeHandler(self)
