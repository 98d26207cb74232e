"""From the command line to plain, checked dataclasses; imports no torch.

Hydra composes the yaml files and the overrides, the schema of settings.py refuses what it does not know, and
every refusal becomes three lines: what was given, what is allowed, what to change.
"""

import itertools
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import hydra
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ValueType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from reconverge.base import environment
from reconverge.base.environment import ROOT
from reconverge.base.errors import Exit, Stop
from reconverge.base.terminal import say
from reconverge.config import listing
from reconverge.config.messages import refusal, refuse_override
from reconverge.config.overrides import escaped, literal, several
from reconverge.config.rules import check_value
from reconverge.config.setting import flat
from reconverge.config.settings import Eval, Train

Schema = TypeVar("Schema", Train, Eval)
Loaded = TypeVar("Loaded")


def data_name(name: str, root: str | None) -> str:
    """What tells the data apart in the default name of a run: `name`, and for the general data=folder and
    data=shards the name of the folder that they read. The resolver ${data_name:...} of conf/.
    """
    if name not in ("folder", "shards") or root is None:
        return name
    folder = os.path.basename(os.path.abspath(os.path.expanduser(root)))
    return re.sub(r"[^A-Za-z0-9._-]+", "-", folder).strip("-.") or name


OmegaConf.register_new_resolver("data_name", data_name, replace=True)

LISTED = (ValueType.CHOICE_SWEEP, ValueType.SIMPLE_CHOICE_SWEEP, ValueType.RANGE_SWEEP)


def composed(conf: Path, name: str, schema: type[Schema], overrides: Sequence[str]) -> Schema:
    """Compose `conf/name.yaml` with the arguments of a command line.

    Ends the process (exit 0) after --help, --version, --cfg and completion. Errors: Stop(USAGE).
    """
    for argument in overrides:
        refuse_override(argument, schema)
    overrides = [literal(argument, schema) for argument in overrides]
    ConfigStore.instance().store(name="schema", node=schema)
    try:
        if any(argument.startswith("-") for argument in overrides):
            return _typed(_resolved(_answered(conf, name, schema, overrides)), schema)
        return _typed(_resolved(_hydras(conf, name, overrides)), schema)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        # ValueError: a group that was set to null or a number
        raise refusal(error, schema, conf) from None


def of_training(overrides: Sequence[str]) -> Train:
    """What train.py composes with these arguments. Errors: Stop(USAGE)."""
    return composed(ROOT / "conf", "config", Train, overrides)


def _hydras(conf: Path, name: str, overrides: Sequence[str]) -> DictConfig:
    with hydra.initialize_config_dir(str(conf.absolute()), job_name=name, version_base="1.3"):
        return hydra.compose(name, list(overrides))


def _answered(conf: Path, name: str, schema: type, overrides: Sequence[str]) -> DictConfig:
    """Answer --version; let Hydra answer --help, --cfg or completion; each ends the process. (Hydra would
    compose twice where it goes on.)
    """
    if "--version" in overrides:
        say(environment.in_words())
        sys.exit(0)
    found: list[DictConfig] = []
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise, instead of a report of Hydra's own and exit 1
    before, sys.argv = sys.argv, [sys.argv[0], *overrides]  # hydra.main has no other way to be told
    try:
        hydra.main(version_base="1.3", config_path=str(conf), config_name=name)(found.append)()
    except SystemExit:  # Hydra ends after --help, and the settings are still to be listed
        if {"-h", "--help"}.isdisjoint(overrides):
            raise
        plain = [argument for argument in overrides if not argument.startswith("-")]
        values: Any = OmegaConf.to_container(_hydras(conf, name, plain), resolve=True)
        listing.print_settings(schema, values)
    finally:
        sys.argv = before
    if not found:
        sys.exit(0)
    return found[0]  # flags that ask nothing, such as --package alone


def combinations(arguments: Sequence[str]) -> list[list[str]]:
    """Of key=a,b and key=range(0,3) each combination of one value a key: settings of text literally, with
    `\\,` for a comma, others in Hydra's grammar.

    Errors: Stop(USAGE).
    """
    choices = []
    for argument in arguments:
        refuse_override(argument, Train)
        if (of_text := several(argument, Train)) is not None:
            choices.append(of_text)
            continue
        try:
            override = None if argument.startswith("-") else OverridesParser.create().parse_override(argument)
        except HydraException as error:
            raise refusal(error, Train) from None
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


def from_text(text: str, schema: type[Schema]) -> Schema:
    """The configuration that `to_text` wrote.

    Errors: Stop(USAGE), Stop(DAMAGED) for text that was cut off or is no YAML.
    """
    try:
        values = yaml.safe_load(text)
        if not isinstance(values, dict):
            raise yaml.YAMLError(f"{type(values).__name__} in place of a table of settings")
        return _typed(values, schema)
    except yaml.YAMLError as error:
        where = " ".join(str(error).split())
        raise Stop(
            Exit.DAMAGED,
            f"config.yaml: {where}",
            "the file as the run wrote it",
            "restore it, or run=NAME for a new run",
        ) from None
    except OmegaConfBaseException as error:
        raise refusal(error, schema) from None


def to_text(config: Train | Eval) -> str:
    """YAML of every setting, in the order of the schema. Plain YAML: a `${...}` in it is text."""
    return yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True)


def write_conf(folder: Path, config: Train) -> None:
    """Write a config.yaml into `folder`, from which a train.py with this folder as its conf/ composes exactly
    `config`. The files of conf/ may have changed meanwhile.
    """
    quiet = [{f"override hydra/{name}_logging": "none"} for name in ("job", "hydra")]
    hydra = {"output_subdir": None, "run": {"dir": "."}}
    text = {
        "defaults": ["schema", "_self_", *quiet],
        "hydra": hydra,
        **escaped(asdict(config)),
    }
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(text)))


def _resolved(config: DictConfig) -> Any:
    return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)


def _typed(values: Any, schema: type[Loaded]) -> Loaded:
    """Of a plain container: merged as it is, a composed configuration would bring keys that the schema lacks.

    A `${...}` that is still in it is text: the file of a run is not asked for variables of the environment.
    """
    loaded: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), escaped(values)))
    for key, value, checks in flat(loaded):
        check_value(key, value, checks)
    return loaded
