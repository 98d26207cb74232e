"""All settings with what they mean, for `--help` and, as `python -m reconverge.config.listing`, for
docs/settings.md.
"""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from types import NoneType
from typing import Any, NamedTuple, get_args

from rich.table import Table
from rich.text import Text

from reconverge.base.terminal import console
from reconverge.config.setting import MISSING
from reconverge.config.settings import Eval, Train


class Setting(NamedTuple):
    key: str  # dotted
    type: Any
    default: Any
    metadata: Any

    def type_name(self) -> str:
        """As a person says it: `float or null`."""
        kinds = [one for one in get_args(self.type) if one is not NoneType]
        if NoneType in get_args(self.type):
            return f"{kinds[0].__name__} or null"
        return str(self.type) if get_args(self.type) else getattr(self.type, "__name__", str(self.type))

    def allowed(self) -> str:
        """The values that are allowed; nothing if the type says it all."""
        checks = self.metadata
        if checks["choices"]:
            return ", ".join(map(text, checks["choices"]))
        if checks["low"] is None:
            return ""
        return f"{checks['low']:g} " + (f"to {checks['high']:g}" if checks["high"] is not None else "or more")


def groups(schema: Any, prefix: str = "") -> Iterator[tuple[str, list[Setting]]]:
    """The settings in the order of the schema: title of a group, its settings."""
    default, title = schema(), schema.__doc__
    group: list[Setting] = []
    sections = []
    for one in fields(schema):
        if is_dataclass(one.type):
            sections.append((one.type, f"{prefix}{one.name}."))
            continue
        if one.metadata["heading"] and group:
            yield title, group
            group = []
        title = one.metadata["heading"] or title
        group.append(Setting(prefix + one.name, one.type, getattr(default, one.name), one.metadata))
    yield title + (f": {prefix}*" if prefix else ""), group
    for section, dotted in sections:
        yield from groups(section, dotted)


def text(value: Any) -> str:
    """A value as it is written on the command line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {text(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(text, value)) + "]"
    if isinstance(value, float):
        return f"{value:g}"
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))


def print_settings(schema: Any, values: dict[str, Any]) -> None:
    """Name, value and meaning of each setting. `values`: of a composed command line, by section."""
    for title, settings in groups(schema):
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(no_wrap=True)
        table.add_column(ratio=1)
        for one in settings:
            value: Any = values
            for part in one.key.split("."):
                value = value[part] if isinstance(value, dict) and part in value else one.default
            short = text(value) if not isinstance(value, dict) else "{...}"
            table.add_row(Text(f"{one.key}={'' if value == MISSING else short}"), Text(one.metadata["help"]))
        console.print(Text(f"\n== {title} =="))
        console.print(table, width=min(console.width, 120), soft_wrap=False, highlight=False)


def markdown() -> str:
    """docs/settings.md."""
    page = [
        "# Settings\n",
        "*Written by `python -m reconverge.config.listing > docs/settings.md` from"
        " [settings.py](../src/reconverge/config/settings.py). A test keeps it current.*\n",
        "Give a setting as `key=value` on the command line, in a recipe or in another file of `conf/`:"
        " `python train.py model=convnext_t optim.lr=1e-3 mix.mixup=0`. The defaults below are those of the"
        " program; a recipe replaces many of them. `python train.py recipe=in1k model=convnext_t --help`"
        " lists the values that this command would use.\n",
        "**Resume** says whether a setting may change when a run is resumed. *yes*: the bits stay the same,"
        " except where the meaning says otherwise (`forward_images`, `resume_allow`, `data.on_bad_image`);"
        " another device may be refused as other hardware. *no*: refused with exit code 78 (see"
        " [resume](training.md#resume)). The tables of the paper are those of"
        " [A ConvNet for the 2020s](https://arxiv.org/abs/2201.03545).\n",
    ]
    for program, schema in (("train.py", Train), ("eval.py", Eval)):
        found = [group for group in groups(schema) if program == "train.py" or ": data." not in group[0]]
        page += [f"\n# {program}\n"]
        if program == "eval.py":
            page += ["`data=NAME` and all settings of [data.*](#the-data-set-data) are those of train.py.\n"]
        page += ["\n".join(f"- [{name}](#{_anchor(name)})" for name, _ in found), ""]
        for title, settings in found:
            page += [f"## {title}\n", *_rows(settings, resumes=program == "train.py"), ""]
    return "\n".join(page)


def _rows(settings: list[Setting], resumes: bool) -> Iterator[str]:
    header = ["setting", "type", "default", "meaning", "unit", "allowed", "source", *["resume"] * resumes]
    yield _row(header)
    yield _row(["---"] * len(header))
    for one in settings:
        about = one.metadata
        default = "" if one.default == MISSING else f"`{text(one.default)}`"
        cells = [f"`{one.key}`", one.type_name(), default, about["meaning"], about["unit"], one.allowed()]
        yield _row([*cells, about["source"], *["yes" if about["free"] else "no"] * resumes])


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _anchor(title: str) -> str:
    """GitHub's address of a heading."""
    return "".join(c for c in title.lower().replace(" ", "-") if c.isalnum() or c in "-_")


if __name__ == "__main__":
    print(markdown(), end="")
