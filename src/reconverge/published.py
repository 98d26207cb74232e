"""How the end of a run compares with what its recipe reproduces. Pure functions; imports no torch."""

from collections.abc import Mapping, Sized

from reconverge import config
from reconverge.clock import Clock
from reconverge.settings import Train
from reconverge.synsets import DATASETS


def comparison(
    cfg: Train, clock: Clock, step: int, training: Sized, validation: Sized | None, top1: Mapping[str, float]
) -> str | None:
    """The run's top-1 after `step` (percent, raw and EMA) beside the published one, or why they cannot be
    compared.

    That of the EMA weights where the recipe keeps them, as published. None for a recipe without published
    numbers.
    """
    recipe = cfg.recipe
    if not recipe.expected or recipe.noise is None:
        return None
    if cfg.model.name not in recipe.expected:
        return f"not comparable: no top-1 of {cfg.model.name} with recipe={recipe.name} is published"
    expected = recipe.expected[cfg.model.name]
    if reasons := _reasons(cfg, clock, step, training, validation, top1):
        return f"published {expected:g} %: not comparable, {'; '.join(reasons)}"
    above = (top1["ema"] if "ema" in top1 else top1["raw"]) - expected
    # Both are rounded: a difference of exactly the band is within it.
    verdict = (
        "within the noise band" if abs(above) <= recipe.noise + 1e-9 else "above" if above > 0 else "below"
    )
    return f"published {expected:g} ± {recipe.noise:g} %: {verdict} ({above:+.2f})"


def _reasons(
    cfg: Train, clock: Clock, step: int, training: Sized, validation: Sized | None, top1: Mapping[str, float]
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
    if step != clock.total:
        reasons.append(f"other steps ({step:,} of {clock.total:,})")
    if not top1:
        reasons.append("not evaluated")
    departures = config.departures(cfg)
    reasons += [f"other {key} ({now}, not {then})" for key, then, now, _ in departures[:4]]
    if departures[4:]:
        reasons.append(f"{len(departures[4:])} more settings")
    return reasons
