"""Small Alpaca-format files written for this project, carried by the package."""

from importlib.resources import files
from pathlib import Path

from lwf_unsloth.errors import DataError

_PACKAGE = "lwf_unsloth.samples"


def sample_names() -> list[str]:
    """Names that `sample_path` knows, in alphabetical order, without the `.jsonl`."""
    found = (entry.name for entry in files(_PACKAGE).iterdir())
    return sorted(name.removesuffix(".jsonl") for name in found if name.endswith(".jsonl"))


def sample_path(name: str) -> Path:
    """Path of a sample file that comes with the package.

    Args:
        name: File name with or without `.jsonl`, such as `"faq_task"` or `"general.jsonl"`.

    Returns:
        The path of the file, for `load_alpaca` or `load_text`.

    Raises:
        DataError: If there is no sample of that name; the message lists the ones there are.
    """
    known = sample_names()
    stem = name.removesuffix(".jsonl")
    if stem not in known:
        raise DataError(
            f"Got sample name {name!r}, needed one of {', '.join(known)}: only these files come "
            "with the package. Pass one of them, or the path of your own file to load_alpaca."
        )
    return Path(str(files(_PACKAGE).joinpath(f"{stem}.jsonl")))
