r"""Print a node's --node-config, from the environment variables of node.sh.

Flower splits the text at spaces and quotes, even at escaped quotes, and reads each
value as TOML. So special characters are written as TOML escapes such as ``\U00000022``.
"""

import os
import re
import sys
from collections.abc import Mapping

import yaml

# Node-config keys and the environment variables with their values.
KEYS = {"data-path": "DATA_PATH", "site": "SITE", "policy": "POLICY"}
PATHS = ("DATA_PATH", "POLICY")
NOT_PLAIN = re.compile(r"[^A-Za-z0-9 ./_+=,:@~-]")


def quoted(text: str) -> str:
    """Return a text as a TOML string that contains no further quote or backslash."""
    return '"' + NOT_PLAIN.sub(lambda m: f"\\U{ord(m[0]):08X}", text) + '"'


def node_config(environment: Mapping[str, str]) -> str:
    """Return the text for --node-config.

    Parameters
    ----------
    environment : mapping of str to str
        ``DATA_PATH``, ``SITE`` and optionally ``POLICY``.

    Returns
    -------
    str

    Raises
    ------
    ValueError
        If a path is relative, or a value is not UTF-8.
    """
    parts = []
    for key, variable in KEYS.items():
        value = environment.get(variable, "")
        if not value:
            continue
        if variable in PATHS and not os.path.isabs(value):
            raise ValueError(
                f"{variable} = {value!r} is relative, and Flower runs in a folder of "
                "its own: give an absolute path"
            )
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{variable} = {value!r} is no UTF-8: rename it") from None
        parts.append(f"{key}={quoted(value)}")
    return " ".join(parts)


def check_trusted_entities(path: str) -> None:
    """Check that a file for --trusted-entities contains at least one key.

    Flower ignores an empty file, and would then run any code.

    Raises
    ------
    ValueError
        If the file is not a mapping of ids to ssh-ed25519 keys, or is empty.
    """
    try:
        with open(path, encoding="utf-8") as file:
            found = yaml.safe_load(file)
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"TRUSTED_ENTITIES = {path!r}: {reason}") from None
    if (
        not isinstance(found, dict)
        or not found
        or not all(
            isinstance(name, str)
            and isinstance(key, str)
            and key.startswith("ssh-ed25519 ")
            for name, key in found.items()
        )
    ):
        raise ValueError(
            f"TRUSTED_ENTITIES = {path!r} must have at least one line "
            "fpk_...: 'ssh-ed25519 KEY'"
        )


if __name__ == "__main__":
    try:
        if trusted := os.environ.get("TRUSTED_ENTITIES"):
            check_trusted_entities(trusted)
        print(node_config(os.environ))
    except ValueError as problem:
        sys.exit(f"node.sh: {problem}")
