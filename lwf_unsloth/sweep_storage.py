"""Where the study of a sweep is kept: a file, or a database that several machines share."""

import contextlib
import json
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lwf_unsloth.errors import ConfigError, LwfError
from lwf_unsloth.secret_texts import without_secrets
from lwf_unsloth.whole_files import unwritable, write_whole_text, writing

HEARTBEAT, GRACE = 10, 60
"""Seconds between two signs of life of a trial, and without one until it counts as gone."""
OBJECTIVES = ("gain", "forgetting")
SQLITE = ("disk is full", "readonly database", "unable to open database", "disk I/O error")
"""What SQLite says of a disk."""
CLAIM = "study.json"
"""In the sweep's folder: whose trials it holds."""
TRIES, PAUSE = 4, 1.0
"""Times that the storage is opened, and seconds between them."""


def storage_url(storage: str | None, folder: Path) -> str:
    """The address that was given, or that of the file in the sweep's folder."""
    return storage or f"sqlite:///{folder / 'study.db'}"


def open_storage(url: str) -> Any:
    """The storage; two workers that make its tables at the same moment hinder each other once."""
    import optuna

    wait = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {}
    settings: dict[str, Any] = {"heartbeat_interval": HEARTBEAT, "grace_period": GRACE}
    for left in reversed(range(TRIES)):
        try:
            with quiet():
                storage = optuna.storages.RDBStorage(url, engine_kwargs=wait, **settings)
            if url.startswith("sqlite"):
                _one_at_a_time(storage.engine)
            return storage
        except Exception as error:  # a kind of error for each database
            if left:
                time.sleep(PAUSE)
            elif url.startswith("sqlite"):
                raise
            else:
                raise _no_database(error) from None  # what the library says may hold the password
    raise AssertionError("the last try returns or raises")


def _one_at_a_time(engine: Any) -> None:
    """Lets every transaction of a SQLite file wait for the one before.

    Optuna takes a waiting trial by a SELECT ... FOR UPDATE and an UPDATE. SQLite has no FOR UPDATE,
    and Python begins a transaction only at the UPDATE, so two processes could take the same trial
    (seen at 46 to 58 of 60 attempts at the same moment). A database that may only be read is read
    without the lock.
    """
    import sqlalchemy

    def connect(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # Python's sqlite3 begins nothing by itself

    def begin(connection: Any) -> None:
        try:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        except sqlalchemy.exc.OperationalError as error:
            if "readonly" not in str(error):
                raise
            connection.exec_driver_sql("BEGIN")

    sqlalchemy.event.listen(engine, "connect", connect)
    sqlalchemy.event.listen(engine, "begin", begin)
    engine.dispose()  # connections from before are Python's way


@contextlib.contextmanager
def told(folder: Path) -> Iterator[None]:
    """`writing`, which knows too what SQLite says of a disk."""
    try:
        with writing(folder):
            yield
    except LwfError:
        raise
    except Exception as error:
        if not any(words in str(error) for words in SQLITE):
            raise
        said = OSError(str(error).split("\n")[0])
        raise unwritable(folder, said) from error


def refuse_other(folder: Path, name: str, url: str) -> None:
    """Refuses a folder that another study's trials are in: trials are numbered from 0 in each.

    A claim that cannot be read says nothing.

    Raises:
        ConfigError: Names the other study.
    """
    own = there = _claim(name, url)
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        found = json.loads((folder / CLAIM).read_text(encoding="utf-8"))
        there = {key: str(found[key]) for key in own}
    if there != own:
        raise ConfigError(
            f"{str(folder)!r} holds the trials of the sweep {there['study']!r} (storage: "
            f"{there['storage']}), and this one is {name!r} (storage: {own['storage']}): they "
            "would be written over each other. Give another output folder."
        )


def claim(folder: Path, name: str, url: str) -> None:
    """Says in a folder whose trials it holds. The caller holds it."""
    text = json.dumps(_claim(name, url)) + "\n"
    if not (folder / CLAIM).exists():
        write_whole_text(folder / CLAIM, text)


def _claim(name: str, url: str) -> dict[str, str]:
    kind = f"the file {Path(url).name}" if url.startswith("sqlite") else "a database"
    return {"study": name, "storage": kind}


def _no_database(error: Exception) -> ConfigError:
    """What to say when a shared storage cannot be opened; its address has a password, so it is not
    shown.
    """
    kind, lines = type(error).__name__, without_secrets(str(error)).splitlines()
    unreadable = isinstance(error, ValueError) or kind == "ArgumentError" or not lines
    reason = "the address cannot be read" if unreadable else lines[0]
    return ConfigError(
        f"The sweep's storage cannot be opened ({kind}: {reason}). Check that the database is "
        "there and takes this user, and the address: postgresql+psycopg://USER:PASSWORD@HOST:PORT/"
        "NAME, with %40 for @, %3A for : and %2F for / in the password. Without storage the study "
        "is the file study.db in the output folder."
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without Optuna's warnings that a part of it is experimental."""
    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield


def note(trial: Any, result: dict[str, Any]) -> None:
    """Keeps everything but the objectives with the trial."""
    import optuna

    versions = {**result.get("versions", {}), "optuna": optuna.__version__}
    for name, value in {**result, "versions": versions}.items():
        if name not in OBJECTIVES:
            trial.set_user_attr(name, value)
