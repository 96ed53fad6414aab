"""The errors a user can meet: each says what it got, what it needed, why, and what to do."""


class LwfError(ValueError):
    """Base of every error that lwf_unsloth raises on purpose."""

    told: bool = False
    """Whether another process of the run gives this message out."""


class DataError(LwfError):
    """A source, row, column, template or split that cannot be trained on."""


class ConfigError(LwfError):
    """A setting out of range, or two settings that contradict each other."""


class ModelError(LwfError):
    """A model, tokenizer or adapter that cannot be loaded, matched or saved."""


class TeacherError(LwfError):
    """A teacher that would give wrong targets: another vocabulary, base or adapter."""


class DiskError(LwfError, OSError):
    """A file or folder that could not be written: the disk is full, or it may not be."""


class RankError(LwfError):
    """Another process of a run on several failed, and with it this one."""


class InstallError(LwfError, ImportError):
    """A package that something needs and that is not installed."""
