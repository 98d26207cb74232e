"""What explains a refusal in three lines: Hydra's and OmegaConf's errors, and what is no override."""

import difflib
from dataclasses import fields
from pathlib import Path
from typing import Any

from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import InterpolationKeyError, MissingMandatoryValue, OmegaConfBaseException

from reconverge.base.errors import Exit, Stop
from reconverge.config.settings import help_of, section_of

# Of Hydra's flags those that ask for something and end there, or say how.
FLAGS = ("-h", "--help", "--cfg", "-c", "--resolve", "--package", "-p", "--shell-completion", "-sc",
    "--info", "-i", "--version")  # fmt: skip


def refuse_override(argument: str) -> None:
    """Errors: Stop(USAGE) for an argument that is neither key=value nor one of FLAGS."""
    if argument.startswith("-"):
        if argument.split("=")[0] not in FLAGS:
            raise Stop(Exit.USAGE, argument, f"key=value, or {' '.join(FLAGS)}", "python train.py --help")
    elif argument.startswith(("+", "~")):
        raise Stop(
            Exit.USAGE,
            argument,
            "key=value, with a key that exists: none can be added or removed",
            argument.lstrip("+~"),
        )
    elif "/" in argument and "=" not in argument:
        raise Stop(
            Exit.USAGE,
            argument,
            "key=value",
            f"a key before it, such as init={argument} or, to evaluate, checkpoint={argument}",
        )
    elif "/" in (group := argument.partition("=")[0]):
        group, _, folder = group.partition("/")
        name = argument.partition("=")[2] or "NAME"
        raise Stop(
            Exit.USAGE, argument, f"a file of a folder as {group}=FOLDER/NAME", f"{group}={folder}/{name}"
        )
    elif argument.startswith("hydra"):
        raise Stop(
            Exit.USAGE, argument, "the settings of reconverge; the run's folder is set by run=NAME", "drop it"
        )


def closest(given: str, allowed: Any) -> str:
    found = difflib.get_close_matches(given, list(map(str, allowed)), n=1, cutoff=0)
    return found[0] if found else str(next(iter(allowed), ""))


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
            f"{group}: {', '.join(options)}",
            f"{group}={closest(choice, options)}",
        )
    if isinstance(error, OverrideParseException):
        return Stop(
            Exit.USAGE,
            error.override,
            "key=value; quote what the shell or Hydra's grammar would read otherwise",
            "'key=\"value\"'",
        )
    if isinstance(cause, InterpolationKeyError):
        return _missing_size(cause)
    if isinstance(cause, MissingMandatoryValue):
        key = str(cause.full_key)
        return Stop(Exit.USAGE, f"nothing for {key}", f"{key}: {help_of(schema, key)}", f"{key}=...")
    if isinstance(cause, OmegaConfBaseException):
        key = str(cause.full_key or cause.key)
        parent, _, name = key.rpartition(".")
        while (section := section_of(schema, parent)) is None:  # inside a table such as recipe.drop_path
            parent, _, name = parent.rpartition(".")
            key = f"{parent}.{name}" if parent else name
        known = {field.name for field in fields(section)}
        if name not in known:
            return Stop(
                Exit.USAGE,
                f"the setting {key}, which does not exist ({where})",
                f"{parent + ': ' if parent else ''}{', '.join(sorted(known))}",
                f"{parent + '.' if parent else ''}{closest(name, known)}",
            )
        kind = next(field.type for field in fields(section) if field.name == name)  # type: ignore[arg-type]
        kind = kind.__name__ if type(kind) is type else kind  # dict[str, float] says more than its name
        reason = str(cause).splitlines()[0]
        return Stop(
            Exit.USAGE,
            f"{key}: {reason}",
            f"{key}: {kind}: {help_of(schema, key)}",
            f"{key}=... of that type",
        )
    return Stop(Exit.USAGE, where, "what python train.py --help shows", "the override")


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
