"""A configuration beside others: beside the published recipe, and what a run began with; and how the end of a
run compares with what its recipe reproduces. Imports no torch.
"""

from collections.abc import Mapping, Sequence, Sized
from typing import Any

from omegaconf import OmegaConf

from reconverge.base.environment import ROOT
from reconverge.base.imagenet import DATASETS
from reconverge.config.messages import spelled
from reconverge.config.setting import flat
from reconverge.config.settings import CLASSIFY, SCORES, Train


def notices(cfg: Train, overrides: Sequence[str], batch_norm: bool = False) -> list[str]:
    """What might not be meant: a batch that lr was not chosen for, an EMA with BatchNorm, fine-tuning's
    settings without pre-trained weights, what differs from the published recipe. `overrides`: of the command
    line; `batch_norm`: whether the model has any.
    """
    found = []
    if (
        cfg.batch != cfg.recipe.batch
        and not cfg.optim.lr_batch
        and not any(argument.startswith("optim.lr=") for argument in overrides)
    ):
        found.append(
            f"batch={cfg.batch} is not the recipe's {cfg.recipe.batch}: the learning rate is not rescaled and"
            f" stays {cfg.optim.lr:g}; the linear rule would give"
            f" optim.lr={cfg.optim.lr * cfg.batch / cfg.recipe.batch:g}"
        )
    if cfg.task == CLASSIFY and cfg.evaluate.size != cfg.augment.size:
        found.append(
            f"training images have {cfg.augment.size} px (augment.size), validation images"
            f" {cfg.evaluate.size} px (evaluate.size): neither setting follows the other"
        )
    if batch_norm and cfg.ema.decay is not None:
        found.append(
            f"ema.decay={cfg.ema.decay:g} with a model that has BatchNorm: the paper trained such models"
            " without EMA, which severely hurts them (recipe=in1k_roadmap has none); ema.decay=null: no EMA"
        )
    if cfg.init is None:
        if cfg.recipe.starts_from:
            found.append(
                f"recipe={cfg.recipe.name} expects pre-trained weights ({cfg.recipe.starts_from}), but init="
                " is not given: training starts from random weights"
            )
        if cfg.optim.layer_decay != 1:
            found.append(
                f"optim.layer_decay={cfg.optim.layer_decay:g} is for fine-tuning: from random weights the"
                " first layers learn too slowly with it"
            )
        if 0 < cfg.model.head_init_scale < 1:
            found.append(
                f"model.head_init_scale={cfg.model.head_init_scale:g} is for fine-tuning: from random weights"
                " the first steps learn too slowly with it"
            )
    elif cfg.recipe.dataset and not cfg.recipe.starts_from:
        found.append(
            f"init={cfg.init} gives pre-trained weights, but recipe={cfg.recipe.name} was published for"
            " training from random weights"
        )
    found += [
        f"{key}={spelled(now)} differs from recipe={cfg.recipe.name}, published with {spelled(then)} ({help})"
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


# ---- the end of a run ----


def comparison(
    cfg: Train, total: int, step: int, training: Sized, validation: Sized | None, scores: Mapping[str, float]
) -> str | None:
    """The run's score after `step` of `total` (percent, raw and EMA) beside the published one, or why they
    cannot be compared.

    That of the EMA weights where the recipe keeps them, as published. None for a recipe without published
    numbers.
    """
    recipe = cfg.recipe
    if not recipe.expected or recipe.noise is None:
        return None
    if cfg.model.name not in recipe.expected:
        score = SCORES[cfg.task][1]
        return f"not comparable: no {score} of {cfg.model.name} with recipe={recipe.name} is published"
    expected = recipe.expected[cfg.model.name]
    if reasons := _reasons(cfg, total, step, training, validation, scores):
        return f"published {expected:g} %: not comparable, {'; '.join(reasons)}"
    above = (scores["ema"] if "ema" in scores else scores["raw"]) - expected
    # Both are rounded: a difference of exactly the band is within it.
    verdict = (
        "within the noise band" if abs(above) <= recipe.noise + 1e-9 else "above" if above > 0 else "below"
    )
    return f"published {expected:g} ± {recipe.noise:g} %: {verdict} ({above:+.2f})"


def _reasons(
    cfg: Train, total: int, step: int, training: Sized, validation: Sized | None, scores: Mapping[str, float]
) -> list[str]:
    """What keeps the two from being compared, the gravest first."""
    reasons = []
    data, held_out = DATASETS[str(cfg.recipe.dataset)], len(validation) if validation is not None else 0
    if (len(training), held_out) != (data.training, data.validation):
        reasons.append(
            f"other data ({len(training):,} training and {held_out:,} validation images, not"
            f" {data.training:,} and {data.validation:,})"
        )
    if (cfg.init is None) != (cfg.recipe.starts_from is None):
        reasons.append(f"from {cfg.init or 'scratch'}, not from {cfg.recipe.starts_from or 'scratch'}")
    if step != total:
        reasons.append(f"other steps ({step:,} of {total:,})")
    if not scores:
        reasons.append("not evaluated")
    others = departures(cfg)
    reasons += [f"other {key} ({now}, not {then})" for key, then, now, _ in others[:4]]
    if others[4:]:
        reasons.append(f"{len(others[4:])} more settings")
    return reasons
