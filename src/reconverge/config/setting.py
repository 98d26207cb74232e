"""What a setting is: a field of a section with what it allows and means. Imports no torch."""

from collections.abc import Iterator
from dataclasses import field, fields, is_dataclass
from typing import Any

MISSING = "???"  # must be given by a yaml file or on the command line


def setting(
    default: Any,
    help: str,
    *,
    unit: str = "",
    source: str = "",
    heading: str = "",
    free: bool = False,
    choices: tuple[Any, ...] = (),
    low: float | None = None,
    high: float | None = None,
    pattern: str = "",
    task: str = "",
) -> Any:
    """A field of a section.

    `source`: where the default or the method comes from. `heading`: the title of the group that begins with
    this setting. `free`: it may change when a run is resumed, and R2 still holds. `low` and `high` are
    themselves allowed. `task`: the only task that reads it.
    """
    in_words = unit and unit.split()[0] in help  # the meaning says the unit already
    explained = help + (f"; {unit}" if unit and not in_words else "") + (f" ({source})" if source else "")
    metadata = {
        "help": explained,
        "meaning": help,
        "unit": unit,
        "source": source,
        "heading": heading,
        "free": free,
        "choices": choices,
        "low": low,
        "high": high,
        "pattern": pattern,
        "task": task,
        "default": default,
    }
    if isinstance(default, list | dict):
        return field(default_factory=lambda: default.copy(), metadata=metadata)
    return field(default=default, metadata=metadata)


def flat(section: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Each setting of a section and the sections below it: dotted key, value, metadata."""
    for one in fields(section):
        value = getattr(section, one.name)
        if is_dataclass(value):
            yield from flat(value, f"{prefix}{one.name}.")
        else:
            yield prefix + one.name, value, one.metadata


def section_of(schema: Any, dotted: str) -> Any:
    """The dataclass of a section such as data; None if there is none, as inside a table."""
    for part in filter(None, dotted.split(".")):
        sections = {one.name: one.type for one in fields(schema) if is_dataclass(one.type)}
        if (schema := sections.get(part)) is None:
            return None
    return schema


def help_of(schema: Any, key: str) -> str:
    """What a setting means; nothing for one that does not exist."""
    parent, _, name = key.rpartition(".")
    section = section_of(schema, parent)
    found: dict[str, Any] = {one.name: one.metadata for one in fields(section)} if section else {}
    return found.get(name, {}).get("help", "")
