"""From the command line to plain, checked dataclasses. The only file that says hydra or omegaconf; imports no torch.

Hydra composes the yaml files and the overrides, the schema of settings.py refuses what it does not know, and every
refusal becomes three lines: what was given, what is allowed, what to change.
"""

import difflib
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, MissingMandatoryValue, OmegaConfBaseException
from yaml import YAMLError

from reconverge.environment import ROOT
from reconverge.errors import Exit, Stop
from reconverge.settings import Data, Eval, Train

Schema = TypeVar("Schema", Train, Eval)
Loaded = TypeVar("Loaded")

FLAGS = ("-h", "--help", "--cfg", "-c", "--resolve", "--package", "-p", "--shell-completion", "-sc", "--info", "-i")


def from_command_line(conf: Path, name: str, schema: type[Schema]) -> Schema:
    """Compose `conf/name.yaml` with sys.argv. Ends the process (exit 0) after --help, --cfg and completion. Errors: Stop(USAGE)."""
    for argument in sys.argv[1:]:
        _refuse_override(argument)
    ConfigStore.instance().store(name="schema", node=schema)
    try:
        if any(argument.startswith("-") for argument in sys.argv[1:]):
            return _typed(_answered(conf, name), schema)
        with hydra.initialize_config_dir(str(conf.absolute()), job_name=name, version_base="1.3"):
            return _typed(hydra.compose(name, sys.argv[1:]), schema)
    except (HydraException, OmegaConfBaseException, ValueError) as error:  # ValueError: a group set to null or a number
        raise _explain(error, schema, conf) from None


def _answered(conf: Path, name: str) -> DictConfig:
    """Let Hydra answer --help, --cfg or completion, which ends the process; it would compose twice where it goes on."""
    composed: list[DictConfig] = []
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise, instead of a report of Hydra's own and exit 1
    hydra.main(version_base="1.3", config_path=str(conf), config_name=name)(composed.append)()
    if not composed:
        sys.exit(0)
    return composed[0]  # flags that ask nothing, such as --package alone


def of_training(overrides: list[str]) -> Train:
    """What train.py composes with these arguments, which sys.argv takes over. Errors: Stop(USAGE)."""
    sys.argv = ["train.py", *overrides]
    return from_command_line(ROOT / "conf", "config", Train)


def from_text(text: str, schema: type[Schema]) -> Schema:
    """The configuration that `to_text` wrote. Errors: Stop(USAGE), Stop(DAMAGED) for text that was cut off or is no YAML."""
    try:
        return _typed(OmegaConf.create(text), schema)
    except YAMLError as error:
        where = " ".join(str(error).split())
        raise Stop(Exit.DAMAGED, f"config.yaml: {where}", "the file as the run wrote it", "restore it, or run=NAME for a new run") from None
    except OmegaConfBaseException as error:
        raise _explain(error, schema) from None


def to_text(config: Train | Eval) -> str:
    """Resolved YAML, every setting in the order of the schema."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _typed(config: Any, schema: type[Loaded]) -> Loaded:
    # Through a plain container: merged as it is, the composed configuration would bring keys that the schema lacks.
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
            f"{key}={_nearest(str(value), checks['choices'])}",
        )
    low, high = checks["low"], checks["high"]
    if (low is not None and not value >= low) or (high is not None and not value <= high):
        bounds = " and ".join([f"at least {low}"] * (low is not None) + [f"at most {high}"] * (high is not None))
        raise Stop(
            Exit.USAGE, f"{key}={value}", f"{key}: {bounds} ({checks['help']})", f"{key}={low if low is not None and value < low else high}"
        )
    if checks["pattern"] and not re.fullmatch(checks["pattern"], str(value)):
        raise Stop(Exit.USAGE, f"{key}={value}", f"{key}: {checks['help']}; it matches {checks['pattern']}", f"another {key}")


def _refuse_override(argument: str) -> None:
    if argument.startswith("-"):
        if argument.split("=")[0] not in FLAGS:
            raise Stop(Exit.USAGE, argument, f"key=value, or {' '.join(FLAGS)}", "python train.py --help")
    elif argument.startswith(("+", "~")):
        raise Stop(Exit.USAGE, argument, "key=value, with a key that exists: none can be added or removed", argument.lstrip("+~"))
    elif "/" in (group := argument.partition("=")[0]):
        group, _, folder = group.partition("/")
        name = argument.partition("=")[2] or "NAME"
        raise Stop(Exit.USAGE, argument, f"a file of a folder as {group}=FOLDER/NAME", f"{group}={folder}/{name}")
    elif argument.startswith("hydra"):
        raise Stop(Exit.USAGE, argument, "the settings of reconverge; the run's folder is set by run=NAME", "drop it")


def _nearest(given: str, allowed: Any) -> str:
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
        options = sorted(str(path.relative_to(conf / group).with_suffix("")) for path in (conf / group).rglob("*.yaml"))
        return Stop(Exit.USAGE, f"{group}={choice}", f"{group}: {', '.join(options)}", f"{group}={_nearest(choice, options)}")
    if isinstance(error, OverrideParseException):
        return Stop(
            Exit.USAGE, error.override, "key=value; quote what the shell or Hydra's grammar would read otherwise", "'key=\"value\"'"
        )
    if isinstance(cause, InterpolationKeyError):
        return _missing_size(cause)
    if isinstance(cause, MissingMandatoryValue):
        key = str(cause.full_key)
        return Stop(Exit.USAGE, f"nothing for {key}", f"{key}: {_help(schema, key)}", f"{key}=...")
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
                f"{parent + '.' if parent else ''}{_nearest(name, known)}",
            )
        kind = next(field.type for field in fields(section) if field.name == name)  # type: ignore[arg-type]
        kind = kind.__name__ if type(kind) is type else kind  # dict[str, float] says more than its name
        reason = str(cause).splitlines()[0]
        return Stop(Exit.USAGE, f"{key}: {reason}", f"{key}: {kind}: {_help(schema, key)}", f"{key}=... of that type")
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
        schema = next((field.type for field in fields(schema) if field.name == part and is_dataclass(field.type)), None)
        if schema is None:
            return None
    return schema


def _help(schema: Any, key: str) -> str:
    parent, _, name = key.rpartition(".")
    section = _section(schema, parent)
    return next((field.metadata.get("help", "") for field in fields(section) if field.name == name), "") if section else ""


# ---- what the parts must agree on -----------------------------------------------------------------------------------


def check(cfg: Train) -> None:
    """Refuse combinations that cannot be trained. Errors: Stop(USAGE)."""
    if cfg.microbatch % 2 or cfg.batch % cfg.microbatch:
        fitting = [size for size in range(2, cfg.batch + 1, 2) if cfg.batch % size == 0]
        nearest = min(fitting, key=lambda size: abs(size - cfg.microbatch), default=None)
        if nearest is None:
            raise Stop(Exit.USAGE, f"batch={cfg.batch}", "an even batch: Mixup pairs the images of a microbatch", f"batch={cfg.batch + 1}")
        raise Stop(
            Exit.USAGE,
            f"microbatch={cfg.microbatch} with batch={cfg.batch}",
            f"even numbers that divide the batch: {', '.join(map(str, fitting))}",
            f"microbatch={nearest}",
        )
    if cfg.forward_images and cfg.forward_images % cfg.microbatch and cfg.microbatch % cfg.forward_images:
        fitting = [size for size in range(1, cfg.microbatch + 1) if cfg.microbatch % size == 0]
        raise Stop(
            Exit.USAGE,
            f"forward_images={cfg.forward_images} with microbatch={cfg.microbatch}",
            f"what divides a microbatch ({', '.join(map(str, fitting))}), or multiples of it",
            f"forward_images={min(fitting, key=lambda size: abs(size - int(cfg.forward_images or 0)))}",
        )
    if cfg.optim.warmup_epochs >= cfg.epochs:
        raise Stop(
            Exit.USAGE,
            f"optim.warmup_epochs={cfg.optim.warmup_epochs} with epochs={cfg.epochs}",
            "a warm-up shorter than the schedule",
            f"optim.warmup_epochs={cfg.epochs // 15} or more epochs",
        )
    for key, size in (("augment.size", cfg.augment.size), ("evaluate.size", cfg.evaluate.size)):
        if cfg.model.image_size not in (None, size):
            raise Stop(
                Exit.USAGE,
                f"{key}={size} with model={cfg.model.name} for images of {cfg.model.image_size} px",
                "the size that it is built for, in training and evaluation",
                f"augment.size={cfg.model.image_size} evaluate.size={cfg.model.image_size}",
            )
    for key, pair, low, high in (
        ("augment.scale", cfg.augment.scale, 0.0, 1.0),
        ("augment.ratio", cfg.augment.ratio, 0.0, float("inf")),
    ):
        if len(pair) != 2 or not low < pair[0] <= pair[1] <= high:
            raise Stop(Exit.USAGE, f"{key}={pair}", f"[smallest, largest], above {low}, at most {high}", f"{key}=[{max(low, 0.08)},1.0]")
    if len(cfg.optim.betas) != 2 or not all(0 <= beta < 1 for beta in cfg.optim.betas):
        raise Stop(Exit.USAGE, f"optim.betas={cfg.optim.betas}", "two numbers from 0 up to, but not, 1", "optim.betas=[0.9,0.999]")
    if cfg.init is None:
        for key, unread in (("init_head", cfg.init_head != "auto"), ("init_strict", not cfg.init_strict)):
            if unread:
                raise Stop(Exit.USAGE, f"{key}={getattr(cfg, key)} without init", _help(Train, "init"), f"init=..., or {key} as it was")
    known = {key for key, *_ in flat(cfg)} | {"code", "versions", "data", "hardware"}
    for name in cfg.resume_allow:
        if name not in known:
            raise Stop(
                Exit.USAGE,
                f"resume_allow={name}",
                "a setting, or code, data, versions, hardware",
                f"resume_allow=[{_nearest(name, known)}]",
            )
    if cfg.augment.repeats > cfg.batch // cfg.microbatch:
        raise Stop(
            Exit.USAGE,
            f"augment.repeats={cfg.augment.repeats} with {cfg.batch // cfg.microbatch} microbatches a step",
            "at most as many repeats as microbatches: each repeat of an image lies in another one",
            f"a smaller microbatch=, or augment.repeats={cfg.batch // cfg.microbatch}",
        )
    check_data(cfg.data)
    if cfg.data.val is None and cfg.evaluate_every != "never":
        raise Stop(
            Exit.USAGE,
            f"data.val=null with evaluate_every={cfg.evaluate_every}",
            "never: there is nothing to evaluate on",
            "evaluate_every=never, or data.val=FOLDER",
        )
    if cfg.data.kind == "trained":
        raise Stop(Exit.USAGE, "data=trained", "the data of a run: for eval.py only", "data=digits or data=folder data.root=...")
    if cfg.precision == "tf32" and cfg.device == "cpu":
        raise Stop(Exit.USAGE, "precision=tf32 with device=cpu", "fp32, bf16, fp16 on a CPU", "precision=fp32")


def check_data(data: Data) -> None:
    for key, triple in (("data.mean", data.mean), ("data.std", data.std)):
        if len(triple) != 3 or (key == "data.std" and not all(value > 0 for value in triple)):
            raise Stop(Exit.USAGE, f"{key}={triple}", "three numbers, for R, G, B in 0..1; deviations above 0", f"{key}=[0.5,0.5,0.5]")
    if data.kind in ("folder", "shards") and not data.root:
        raise Stop(Exit.USAGE, f"data={data.name} without data.root", _help(Train, "data.root"), "data.root=/path")
    if data.window != "all" and data.kind != "shards":
        raise Stop(
            Exit.USAGE, f"data.window={data.window} with data={data.name}", "windows of shards", "data.window=all, or reconverge prepare"
        )
    if data.stage is not None and data.window == "all":
        raise Stop(
            Exit.USAGE,
            "data.stage with data.window=all",
            "windows: what comes next must be a few shards to be copied ahead",
            "data.window=8, say, or data.stage=null",
        )


def evaluation_data(given: Data, trained: Data) -> Data:
    """The data that eval.py reads: that of the run with what the command line changes, or another, normalised as the run's.

    Errors: Stop(USAGE).
    """
    named = {argument.partition("=")[0].removeprefix("data.") for argument in sys.argv if argument.startswith("data.")}
    if given.kind == "trained":
        return replace(trained, **{name: getattr(given, name) for name in named})
    check_data(given)
    return replace(given, **{name: getattr(trained, name) for name in {"mean", "std"} - named})


def notices(cfg: Train) -> list[str]:
    """What might not be meant: a batch that lr was not chosen for, fine-tuning's settings from scratch, what differs from the published recipe."""
    found = []
    if cfg.batch != cfg.recipe.batch and not cfg.optim.lr_batch and not any(argument.startswith("optim.lr=") for argument in sys.argv):
        found.append(
            f"batch={cfg.batch} is not the recipe's {cfg.recipe.batch}: the learning rate is not rescaled and stays {cfg.optim.lr:g}; "
            f"the linear rule would give optim.lr={cfg.optim.lr * cfg.batch / cfg.recipe.batch:g}"
        )
    if cfg.init is None:
        if cfg.recipe.starts_from:
            found.append(f"the run starts from scratch, and recipe={cfg.recipe.name} from {cfg.recipe.starts_from}")
        if cfg.optim.layer_decay != 1:
            found.append(f"optim.layer_decay={cfg.optim.layer_decay:g} is for fine-tuning: from scratch it holds back the first layers")
        if 0 < cfg.model.head_init_scale < 1:
            found.append(f"model.head_init_scale={cfg.model.head_init_scale:g} is for fine-tuning: from scratch it stalls the first steps")
    elif cfg.recipe.dataset and not cfg.recipe.starts_from:
        found.append(f"the run starts from init={cfg.init}, and recipe={cfg.recipe.name} from scratch")
    found += [f"{key}={now} is not recipe={cfg.recipe.name}: published {then} ({help})" for key, then, now, help in departures(cfg)]
    return found


def departures(cfg: Train) -> list[tuple[str, Any, Any, str]]:
    """The settings that are not as published, of a recipe that reproduces a published run: key, published, now, what it is and its source.

    Read from the files of the recipe and the model; what may change on resume (free) decides no result and is left out.
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
