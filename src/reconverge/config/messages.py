"""What explains a refusal in three lines: Hydra's and OmegaConf's errors, and what is no override."""

import difflib
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import InterpolationKeyError, MissingMandatoryValue, OmegaConfBaseException

from reconverge.base.environment import ROOT
from reconverge.base.errors import Exit, Stop
from reconverge.config import foreign
from reconverge.config.setting import flat, help_of, section_of
from reconverge.config.settings import Eval, Train

# Of Hydra's flags those that ask for something and end there, or say how.
FLAGS = ("-h", "--help", "--cfg", "-c", "--resolve", "--package", "-p", "--shell-completion", "-sc",
    "--info", "-i", "--version")  # fmt: skip
# What train.py and eval.py take themselves, for the list of what is allowed.
OWN_FLAGS = {Train: ("--check", "-m"), Eval: ()}
COMPLETION = ("install", "uninstall", "query")  # keys that --shell-completion takes, and no settings
NEGATIVES = ("none", "null", "no", "off", "false", "never", "0")  # in any case: somebody wants it off
MANY = 20  # names; a longer list is shortened by its folders


def refuse_override(argument: str, schema: type) -> None:
    """Errors: Stop(USAGE) for what is neither one of FLAGS nor key=value with a key that exists."""
    key, _, value = argument.lstrip("+~-").partition("=")
    if argument.startswith("-"):
        flags = [*(flag for flag in FLAGS if flag.startswith("--")), *OWN_FLAGS[schema]]
        if argument.split("=")[0] not in FLAGS:
            near = closest(argument.split("=")[0], set(flags) - {argument}, 0.75)
            raise Stop(
                Exit.USAGE,
                argument,
                f"key=value, without dashes, or {' '.join(flags)}",
                near or suggestion(key, value, schema),
            )
    elif argument.startswith(("+", "~")):
        raise Stop(
            Exit.USAGE,
            argument,
            "key=value, with a key that exists: none can be added or removed",
            suggestion(key, value, schema),
        )
    elif argument.startswith("hydra"):
        raise Stop(
            Exit.USAGE, argument, "the settings of reconverge; the run's folder is set by run=NAME", "drop it"
        )
    elif "/" in argument and "=" not in argument:
        raise Stop(
            Exit.USAGE,
            argument,
            "key=value",
            f"a key before it, such as init={argument} or, to evaluate, checkpoint={argument}",
        )
    elif "/" in key:
        group, _, folder = key.partition("/")
        file = f"{group}={folder}/{value or 'NAME'}"
        raise Stop(Exit.USAGE, argument, f"a file of a folder as {group}=FOLDER/NAME", file)
    elif key and value and key not in COMPLETION and not _exists(key, schema):
        parent, section = _parent(key, schema)
        raise Stop(
            Exit.USAGE,
            f"{argument}: there is no setting {key}",
            _names(parent, section, schema),
            suggestion(key, value, schema),
        )
    elif (group := section_of(schema, key)) and value and not (ROOT / "conf" / key).is_dir():
        raise Stop(
            Exit.USAGE,
            f"{argument}: {key} is a section, not a value",
            _names(key, group, schema),
            (foreign.advice("optimizer", value) if key == "optim" else None) or f"{key}.SETTING={value}",
        )


def closest(given: str, allowed: Any, cutoff: float = 0.6) -> str | None:
    """The most similar of the names; None if none is so similar that it can be meant."""
    found = difflib.get_close_matches(given, list(map(str, allowed)), n=1, cutoff=cutoff)
    return found[0] if found else None


def suggestion(key: str, value: str, schema: type) -> str:
    """What is probably meant by a key=value whose key does not exist, or where to look."""
    keys = [name for name, *_ in flat(schema())]
    keys += [one.name for one in fields(schema) if section_of(schema, one.name)]
    end, value = key.rpartition(".")[2], value or "..."
    if key in keys:
        return f"{key}={value}"
    if said := foreign.advice(key, value, schema is Eval):
        return said
    if same := [name for name in keys if name.rpartition(".")[2] == end]:
        return " or ".join(f"{name}={value}" for name in same[:3])
    parent, section = _parent(key, schema)
    if parent:
        inside = closest(end, [one.name for one in fields(section)])
        near = f"{parent}.{inside}" if inside else None
    else:
        ends = {name.rpartition(".")[2]: name for name in reversed(keys)}
        near = closest(key, keys, 0.75) or ends.get(closest(end, ends, 0.75) or "")
    return f"{near}={value}" if near else f"python {_script(schema)} --help lists the settings"


def _script(schema: type) -> str:
    return "train.py" if schema is Train else "eval.py"


def _exists(key: str, schema: type) -> bool:
    """Whether a setting or section has this name; what is inside a table such as recipe.drop_path counts."""
    parent, section = _parent(key, schema)
    name = key.removeprefix(parent).lstrip(".").partition(".")[0]
    return name in {one.name for one in fields(section)}


def _parent(key: str, schema: type) -> tuple[str, Any]:
    """The innermost section that `key` names before its last part: dotted name and dataclass."""
    parent = key.rpartition(".")[0]
    while (section := section_of(schema, parent)) is None:
        parent = parent.rpartition(".")[0]
    return parent, section


def _names(parent: str, section: Any, schema: type) -> str:
    """What a section has; of the whole, where they are listed."""
    if not parent:
        return f"the settings that python {_script(schema)} --help lists"
    return f"{parent}: {', '.join(sorted(one.name for one in fields(section)))}"


def another(key: str, value: Any, checks: Any) -> str:
    """What is probably meant by a value that is not allowed; `checks`: the setting's metadata."""
    text = str(value)
    words = [word for word in checks["pattern"].split("|") if word.isalpha()]
    choices = [*map(str, checks["choices"]), *words]
    off = [word for word in choices if word in ("none", "never", "off")]
    if said := foreign.VALUES.get((key, text.lower())):
        return said
    if text.lower() in NEGATIVES and off:
        return f"{key}={off[0]}"
    near = closest(text, choices, 0.55)
    if near:
        return f"{key}={near}"
    return f"{key}= with one of these" if checks["choices"] else f"{key}= in that form"


def refusal(error: Exception, schema: type, conf: Path | None = None) -> Stop:
    """What Hydra, reading the files of `conf`, or OmegaConf refused, in our three lines."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OmegaConfBaseException):
        cause = cause.__cause__ or cause.__context__
    where = str(error).splitlines()[0]
    if isinstance(error, MissingConfigException) and error.options is not None and conf is not None:
        group, _, choice = str(error.missing_cfg_file).partition("/")
        options = sorted(
            str(path.relative_to(conf / group).with_suffix("")) for path in (conf / group).rglob("*.yaml")
        )
        return Stop(
            Exit.USAGE,
            f"{group}={choice}",
            f"{group}: {_listed(options, choice)}",
            _another_file(group, choice, options),
        )
    if isinstance(error, OverrideParseException):
        key = str(error.override).partition("=")[0]
        return Stop(
            Exit.USAGE,
            error.override,
            "key=value with a number, a word, true, false, null, or a list such as [0.9,0.999]",
            f"{key}= in one of these forms, in quotes for the shell",
        )
    if isinstance(cause, InterpolationKeyError):
        return _missing_size(cause)
    if isinstance(cause, MissingMandatoryValue):
        key = str(cause.full_key)
        return Stop(Exit.USAGE, f"nothing for {key}", f"{key}: {help_of(schema, key)}", f"{key}=...")
    if isinstance(cause, OmegaConfBaseException):
        key = str(cause.full_key or cause.key)
        parent, section = _parent(key, schema)
        name = key.removeprefix(parent).lstrip(".").partition(".")[0]
        key = f"{parent}.{name}" if parent else name  # without what is inside a table
        field = next((field for field in fields(section) if field.name == name), None)
        if field is None:
            return Stop(
                Exit.USAGE,
                f"the setting {key}, which does not exist ({where})",
                _names(parent, section, schema),
                suggestion(key, "", schema),
            )
        kind: Any = field.type
        kind = kind.__name__ if type(kind) is type else kind  # dict[str, float] says more than its name
        reason = str(cause).splitlines()[0]
        change = f"{key}=... of that type"
        if reason.endswith("is not Optional"):
            change, reason = another(key, "null", field.metadata), "null is not allowed"
        return Stop(Exit.USAGE, f"{key}: {reason}", f"{key}: {kind}: {help_of(schema, key)}", change)
    if ambiguous := re.match(r"Ambiguous value for argument '(.*?)=(.*)'", where):
        key, value = ambiguous.groups()
        return Stop(
            Exit.USAGE,
            f"{key}={value}, which are several values",
            "one value for one run",
            f"-m {key}={value} for a run with each",
        )
    if "Config group override" in where:
        return Stop(
            Exit.USAGE,
            where,
            "the name of a file, for model, recipe, data, machine, tracker, debug",
            "recipe=demo",
        )
    return Stop(Exit.USAGE, where, f"what python {_script(schema)} --help shows", "the override")


def _listed(options: list[str], choice: str) -> str:
    """The files of a group; if they are many, those of the folder that is meant, or folders by name."""
    folder = choice.rpartition("/")[0]
    if len(options) > MANY and any(option.startswith(f"{folder}/") for option in options):
        options = [option for option in options if option.startswith(f"{folder}/")]
    elif len(options) > MANY:
        folders = sorted({option.partition("/")[0] for option in options if "/" in option})
        options = [option for option in options if "/" not in option] + [f"{one}/NAME" for one in folders]
    return ", ".join(options)


def _another_file(group: str, choice: str, options: list[str]) -> str:
    """What to type where conf/`group`/ has no file `choice`."""
    near = closest(choice, options, 0.85 if group == "model" else 0.6)
    if group == "data" and (choice.startswith(("/", ".", "~")) or not near):
        return f"data=folder data.root={choice if '/' in choice else '/path'}"
    timm = f"model=timm model.timm={choice}, if timm has a model of that name"
    if group == "model" and "/" not in choice:
        return f"model={near}; or {timm}" if near else timm
    return f"{group}={near}" if near else f"{group}= with one of these"


def spelled(value: Any) -> str:
    """A value as the command line takes it."""
    if isinstance(value, list | tuple):
        return f"[{','.join(map(spelled, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{spelled(entry)}' for key, entry in value.items())}}}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _missing_size(error: InterpolationKeyError) -> Stop:
    """`${recipe.drop_path.${model.size}}` found no entry: the recipe does not know this size of model."""
    root: Any = error.parent_node
    while root is not None and root._get_parent() is not None:
        root = root._get_parent()
    table = "microbatch" if str(error.full_key) == "microbatch" else "drop_path"
    found: Any = OmegaConf.to_container(root, resolve=False)
    recipe, model = found["recipe"], found["model"]
    own = "model.drop_path=... microbatch=..." + (" ema.decay=..." if recipe["ema"] else "")
    return Stop(
        Exit.USAGE,
        f"model={model['name']} (size {model['size']}) with recipe={recipe['name']}",
        f"sizes that this recipe has an entry for: {', '.join(recipe[table])}",
        f"a model of such a size, another recipe, or your own values: {own}",
    )
