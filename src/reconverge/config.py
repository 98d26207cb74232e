"""From the command line to plain, checked dataclasses. The only file that says hydra or omegaconf; imports no
torch.

Hydra composes the yaml files and the overrides, the schema of settings.py refuses what it does not know, and
every refusal becomes three lines: what was given, what is allowed, what to change.
"""

import difflib
import itertools
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ValueType
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, MissingMandatoryValue, OmegaConfBaseException
from yaml import YAMLError

from reconverge.environment import ROOT
from reconverge.errors import Exit, Stop
from reconverge.settings import Eval, Train

Schema = TypeVar("Schema", Train, Eval)
Loaded = TypeVar("Loaded")

FLAGS = (
    "-h",
    "--help",
    "--cfg",
    "-c",
    "--resolve",
    "--package",
    "-p",
    "--shell-completion",
    "-sc",
    "--info",
    "-i",
)
LISTED = (ValueType.CHOICE_SWEEP, ValueType.SIMPLE_CHOICE_SWEEP, ValueType.RANGE_SWEEP)


def from_command_line(conf: Path, name: str, schema: type[Schema]) -> Schema:
    """Compose `conf/name.yaml` with sys.argv. Ends the process (exit 0) after --help, --cfg and completion.

    Errors: Stop(USAGE).
    """
    for argument in sys.argv[1:]:
        _refuse_override(argument)
    ConfigStore.instance().store(name="schema", node=schema)
    try:
        if any(argument.startswith("-") for argument in sys.argv[1:]):
            return _typed(_answered(conf, name), schema)
        with hydra.initialize_config_dir(str(conf.absolute()), job_name=name, version_base="1.3"):
            return _typed(hydra.compose(name, sys.argv[1:]), schema)
    except (
        HydraException,
        OmegaConfBaseException,
        ValueError,
    ) as error:  # ValueError: a group set to null or a number
        raise _explain(error, schema, conf) from None


def _answered(conf: Path, name: str) -> DictConfig:
    """Let Hydra answer --help, --cfg or completion, which ends the process; it would compose twice where it
    goes on.
    """
    composed: list[DictConfig] = []
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise, instead of a report of Hydra's own and exit 1
    hydra.main(version_base="1.3", config_path=str(conf), config_name=name)(composed.append)()
    if not composed:
        sys.exit(0)
    return composed[0]  # flags that ask nothing, such as --package alone


def combinations(arguments: list[str]) -> list[list[str]]:
    """Of key=a,b and key=range(0,3) each combination of one value a key, in Hydra's grammar.

    Errors: Stop(USAGE).
    """
    choices = []
    for argument in arguments:
        _refuse_override(argument)
        try:
            override = None if argument.startswith("-") else OverridesParser.create().parse_override(argument)
        except HydraException as error:
            raise _explain(error, Train) from None
        if override is None or (override.is_sweep_override() and override.value_type not in LISTED):
            raise Stop(
                Exit.USAGE,
                f"-m with {argument}",
                "key=value, key=value,value,... and key=range(0,3)",
                f"-m without {argument}",
            )
        swept = override.sweep_string_iterator() if override.is_sweep_override() else []
        choices.append([f"{override.key_or_group}={value}" for value in swept] or [argument])
    return [list(combination) for combination in itertools.product(*choices)]


def of_training(overrides: list[str]) -> Train:
    """What train.py composes with these arguments, which sys.argv takes over. Errors: Stop(USAGE)."""
    sys.argv = ["train.py", *overrides]
    return from_command_line(ROOT / "conf", "config", Train)


def from_text(text: str, schema: type[Schema]) -> Schema:
    """The configuration that `to_text` wrote.

    Errors: Stop(USAGE), Stop(DAMAGED) for text that was cut off or is no YAML.
    """
    try:
        return _typed(OmegaConf.create(text), schema)
    except YAMLError as error:
        where = " ".join(str(error).split())
        raise Stop(
            Exit.DAMAGED,
            f"config.yaml: {where}",
            "the file as the run wrote it",
            "restore it, or run=NAME for a new run",
        ) from None
    except OmegaConfBaseException as error:
        raise _explain(error, schema) from None


def to_text(config: Train | Eval) -> str:
    """Resolved YAML, every setting in the order of the schema."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def write_conf(folder: Path, config: Train) -> None:
    """Into `folder` a config.yaml of which a train.py beside it composes exactly `config`, whatever became of
    the files of conf/.
    """
    quiet = [{f"override hydra/{name}_logging": "none"} for name in ("job", "hydra")]
    hydra = {"output_subdir": None, "run": {"dir": "."}}
    text = {
        "defaults": ["schema", "_self_", *quiet],
        "hydra": hydra,
        **OmegaConf.to_container(OmegaConf.structured(config)),  # type: ignore[dict-item]
    }
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(text)))


def _typed(config: Any, schema: type[Loaded]) -> Loaded:
    # Through a plain container: merged as it is, the composed configuration would bring keys that the schema
    # lacks.
    plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    loaded: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), plain))
    for key, value, checks in flat(loaded):
        _check_value(key, value, checks)
    return loaded


def flat(section: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Each setting of a section and the sections below it: dotted key, value, metadata."""
    for field in fields(section):
        value = getattr(section, field.name)
        if is_dataclass(value):
            yield from flat(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value, field.metadata


def _check_value(key: str, value: Any, checks: Any) -> None:
    if value is None:
        return
    if checks["choices"] and value not in checks["choices"]:
        raise Stop(
            Exit.USAGE,
            f"{key}={value}",
            f"{key}: {', '.join(map(str, checks['choices']))}",
            f"{key}={closest(str(value), checks['choices'])}",
        )
    low, high = checks["low"], checks["high"]
    if (low is not None and not value >= low) or (high is not None and not value <= high):
        bounds = " and ".join(
            [f"at least {low}"] * (low is not None) + [f"at most {high}"] * (high is not None)
        )
        raise Stop(
            Exit.USAGE,
            f"{key}={value}",
            f"{key}: {bounds} ({checks['help']})",
            f"{key}={low if low is not None and value < low else high}",
        )
    if checks["pattern"] and not re.fullmatch(checks["pattern"], str(value)):
        raise Stop(
            Exit.USAGE,
            f"{key}={value}",
            f"{key}: {checks['help']}; it matches {checks['pattern']}",
            f"another {key}",
        )


def _refuse_override(argument: str) -> None:
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


def _explain(error: Exception, schema: type, conf: Path | None = None) -> Stop:
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
        while (section := _section(schema, parent)) is None:  # inside a table such as recipe.drop_path
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
    root = error.parent_node
    while root is not None and root._get_parent() is not None:
        root = root._get_parent()
    table = "microbatch" if str(error.full_key) == "microbatch" else "drop_path"
    recipe, model = OmegaConf.to_container(root["recipe"]), OmegaConf.to_container(root["model"])  # type: ignore[index]
    own = "model.drop_path=... microbatch=..." + (" ema.decay=..." if recipe["ema"] else "")  # type: ignore[index,call-overload]
    return Stop(
        Exit.USAGE,
        f"model={model['name']} (size {model['size']}) with recipe={recipe['name']}",  # type: ignore[index,call-overload]
        f"sizes that this recipe has an entry for: {', '.join(recipe[table])}",  # type: ignore[index,call-overload]
        f"a model of such a size, another recipe, or your own values: {own}",
    )


def _section(schema: Any, dotted: str) -> Any:
    for part in filter(None, dotted.split(".")):
        schema = next(
            (field.type for field in fields(schema) if field.name == part and is_dataclass(field.type)), None
        )
        if schema is None:
            return None
    return schema


def help_of(schema: Any, key: str) -> str:
    parent, _, name = key.rpartition(".")
    section = _section(schema, parent)
    return (
        next((field.metadata.get("help", "") for field in fields(section) if field.name == name), "")
        if section
        else ""
    )


# ---- comparing configurations ------------------------------------------------------------------------------


def notices(cfg: Train) -> list[str]:
    """What might not be meant: a batch that lr was not chosen for, fine-tuning's settings from scratch, what
    differs from the published recipe.
    """
    found = []
    if (
        cfg.batch != cfg.recipe.batch
        and not cfg.optim.lr_batch
        and not any(argument.startswith("optim.lr=") for argument in sys.argv)
    ):
        found.append(
            f"batch={cfg.batch} is not the recipe's {cfg.recipe.batch}: the learning rate is not rescaled and"
            f" stays {cfg.optim.lr:g}; the linear rule would give"
            f" optim.lr={cfg.optim.lr * cfg.batch / cfg.recipe.batch:g}"
        )
    if cfg.evaluate.size != cfg.augment.size:
        found.append(
            f"trained at augment.size={cfg.augment.size} and evaluated at evaluate.size={cfg.evaluate.size},"
            " which is set by itself"
        )
    if cfg.init is None:
        if cfg.recipe.starts_from:
            found.append(
                f"the run starts from scratch, and recipe={cfg.recipe.name} from {cfg.recipe.starts_from}"
            )
        if cfg.optim.layer_decay != 1:
            found.append(
                f"optim.layer_decay={cfg.optim.layer_decay:g} is for fine-tuning: from scratch it holds back"
                " the first layers"
            )
        if 0 < cfg.model.head_init_scale < 1:
            found.append(
                f"model.head_init_scale={cfg.model.head_init_scale:g} is for fine-tuning: from scratch it"
                " stalls the first steps"
            )
    elif cfg.recipe.dataset and not cfg.recipe.starts_from:
        found.append(f"the run starts from init={cfg.init}, and recipe={cfg.recipe.name} from scratch")
    found += [
        f"{key}={now} is not recipe={cfg.recipe.name}: published {then} ({help})"
        for key, then, now, help in departures(cfg)
    ]
    return found


def departures(cfg: Train) -> list[tuple[str, Any, Any, str]]:
    """The settings that are not as published, of a recipe that reproduces a published run: key, published,
    now, what it is and its source.

    Read from the files of the recipe and the model; what may change on resume (free) decides no result and is
    left out.
    """
    if cfg.recipe.dataset is None:
        return []
    size, recipe = cfg.model.size, _yaml("recipe", cfg.recipe.name)
    text: dict[str, Any] = {"batch": "${recipe.batch}", "model": {"size": size}}
    if size in recipe["recipe"]["drop_path"]:
        text["microbatch"] = f"${{recipe.microbatch.{size}}}"
        text["model"]["drop_path"] = f"${{recipe.drop_path.{size}}}"
    elif "ema" in recipe["recipe"]:  # whoever gave such a model its own values was told that there are none
        del recipe["ema"]["decay"]
    merged = OmegaConf.merge({"model": _yaml("model", cfg.model.name)}, text, recipe)
    published = OmegaConf.to_container(merged, resolve=True)
    found = []
    for key, now, checks in flat(cfg):
        then: Any = published
        for part in key.split("."):
            then = then.get(part, cfg) if isinstance(then, dict) else cfg
        if then is not cfg and then != now and not checks["free"]:
            found.append((key, then, now, checks["help"]))
    return found


def _yaml(group: str, name: str) -> Any:
    """What the file of conf/ says that gives its model or recipe this name; nothing if there is none."""
    for path in sorted((ROOT / "conf" / group).rglob("*.yaml")):
        if f"name: {name}\n" in path.read_text():
            return OmegaConf.to_container(OmegaConf.load(path))
    return {"recipe": {"batch": None, "drop_path": {}}} if group == "recipe" else {}


def differences(old: Train, new: Train) -> list[tuple[str, Any, Any]]:
    """The settings that a resumed run may not change without being told so: key, value then, value now."""
    before = {key: value for key, value, _ in flat(old)}
    return [
        (key, before[key], value)
        for key, value, checks in flat(new)
        if not checks["free"] and before[key] != value and not (key == "threads" and value is None)
    ]
