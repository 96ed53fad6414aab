"""Texts without the secrets that could have got into them: tokens, keys, passwords in addresses."""

import os
import re

LEFT_OUT = "(left out)"
SECRET_KEYS = {"token", "hub_token", "hf_token", "api_key", "password", "secret"}
"""Names of settings whose values are never shown or saved."""

_KNOWN = re.compile(r"\b(?:hf|gh[oprsu]|github_pat|sk|pypi|xox[abp]|glpat)[_-][A-Za-z0-9_-]{16,}")
"""Tokens that say what they are: of the hub, of code hosts, of model and package services."""
_IN_ADDRESS = re.compile(r"(://[^\s/:@]*):[^\s/]*@")
"""user:password@ in an address."""
_NAMES = re.compile(r"(?:TOKEN|_KEY|PASSWORD|SECRET|PGPASS)(?:_|$)", re.IGNORECASE)
_SHORTEST = 8
"""Characters of the shortest value that counts as a secret: "1" and "true" are none."""


def without_secrets(text: str) -> str:
    """Text with tokens, passwords in addresses, and this process's own secrets left out.

    Own secrets are the values of environment variables that are named like one (HF_TOKEN,
    WANDB_API_KEY, PGPASSWORD).

    Args:
        text: Any text; one that a library wrote, say.

    Returns:
        The text, "(left out)" where a secret stood.
    """
    own = (value for name, value in os.environ.items() if _NAMES.search(name))
    for value in sorted({one for one in own if len(one) >= _SHORTEST}, key=len, reverse=True):
        text = text.replace(value, LEFT_OUT)
    return _IN_ADDRESS.sub(rf"\1:{LEFT_OUT}@", _KNOWN.sub(LEFT_OUT, text))
