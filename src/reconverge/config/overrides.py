"""Arguments of the command line as Hydra takes them. Text is taken literally: Hydra's grammar would read
run=1.10 as a number, and refuse a path with a comma or a bracket. Imports no torch.
"""

import re
from dataclasses import fields
from types import NoneType
from typing import Any, get_args

from reconverge.config.setting import section_of

TEXT = (str, str | None)


def literal(argument: str, schema: type) -> str:
    """`key=value` with the value quoted for Hydra, if it is a setting of text; other arguments as they are.

    null stays null for a setting that may be null, and what is in quotes already stays in Hydra's grammar.
    """
    key, equals, value = argument.partition("=")
    kind = _type(schema, key)
    if not equals or not _is_text(kind, value) or _in_quotes(value):
        return argument
    return argument if value == "null" and NoneType in get_args(kind) else f"{key}={_quoted(value)}"


def several(argument: str, schema: type) -> list[str] | None:
    """Of a setting of text one argument for each value between commas; `\\,` is a comma. None for others."""
    key, equals, value = argument.partition("=")
    if not equals or not _is_text(_type(schema, key), value) or _in_quotes(value):
        return None
    return [f"{key}={one.replace(chr(92) + ',', ',')}" for one in re.split(r"(?<!\\),", value)]


def escaped(values: Any) -> Any:
    """A container in which OmegaConf will find no interpolation: a `${...}` that is left is text."""
    if isinstance(values, dict):
        return {key: escaped(value) for key, value in values.items()}
    if isinstance(values, list):
        return [escaped(value) for value in values]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", values) if isinstance(values, str) else values


def _type(schema: type, key: str) -> Any:
    parent, _, name = key.rpartition(".")
    section = section_of(schema, parent)
    return next((one.type for one in fields(section) if one.name == name), None) if section else None


def _is_text(kind: Any, value: str) -> bool:
    """eval.py's images are text or a list."""
    return kind in TEXT or (kind is Any and not value.startswith("["))


def _in_quotes(value: str) -> bool:
    return len(value) > 1 and value[0] == value[-1] and value[0] in "'\""


def _quoted(value: str) -> str:
    """In Hydra's quotes a backslash means something only before a quote, or before OmegaConf's `${`."""
    value = re.sub(r"(\\*)'", r"\1\1\\'", value)
    value = re.sub(r"(\\+)$", r"\1\1", value)
    return f"'{escaped(value)}'"
