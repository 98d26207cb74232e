"""What a machine preset (conf/machine/NAME.yaml, chosen by machine=NAME) gave a configuration, and what it
costs. Imports no torch.
"""

from collections.abc import Iterator
from typing import Any

import yaml

from reconverge.base.environment import ROOT
from reconverge.base.errors import Exit, Stop
from reconverge.config.messages import spelled
from reconverge.config.setting import flat
from reconverge.config.settings import Train


def given(cfg: Train) -> dict[str, Any]:
    """The settings that the preset of `cfg` names (dotted), with its values; the recipe and the command line
    may have replaced them. Nothing for machine=auto, and for a preset whose file is gone.
    """
    path = ROOT / "conf" / "machine" / f"{cfg.machine.name}.yaml"
    values = yaml.safe_load(path.read_text()) if path.is_file() else {}
    return {key: value for key, value in _dotted(values) if key != "machine.name"}


def _dotted(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def in_words(cfg: Train) -> str:
    """What the preset gave, what of it was replaced, and the promises that it costs; "" for machine=auto."""
    preset = given(cfg)
    if not preset:
        return ""
    now = {key: value for key, value, _ in flat(cfg)}
    kept = [name for name, value in preset.items() if now[name] == value]
    text = f"{cfg.machine.name}: {' '.join(f'{name}={spelled(preset[name])}' for name in kept)}"
    if replaced := [f"{name}={spelled(now[name])}" for name in preset if name not in kept]:
        text += f"; replaced by the recipe or the command line: {' '.join(replaced)}"
    costs = "no promise" if cfg.deterministic else "R1 and R2 (deterministic=false: other bits each time)"
    return f"{text}; costs {costs}"


def refuse_without_gpu(cfg: Train, gpu: bool) -> None:
    """Errors: Stop(USAGE) for a preset that needs a GPU where there is none (`gpu`)."""
    if cfg.device == "cuda" and given(cfg).get("device") == "cuda" and not gpu:
        raise Stop(
            Exit.USAGE,
            f"machine={cfg.machine.name}, but torch finds no GPU",
            "machine=auto or cpu; gpu_* only with an NVIDIA GPU and a driver that torch can use",
            "machine=auto; for a GPU, check nvidia-smi and torch.cuda.is_available()",
        )
