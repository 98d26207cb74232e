"""Learning rate, parameter groups and the optimizer: pure functions of their settings."""

import math

import torch
from torch import nn

from reconverge.settings import Optim


def learning_rate(optim: Optim, step: int, total: int, warmup: int) -> float:
    """Learning rate of step 0..total-1, of which the first `warmup` warm up (official code's cosine_scheduler).

    The warm-up is linspace(0, lr, warmup), both ends included; then min_lr + (lr - min_lr) (1 + cos(pi i / n)) / 2 for
    i = 0..n-1 with n = total - warmup, so that lr itself comes twice.
    """
    if step < warmup:
        return optim.lr if 0 < step == warmup - 1 else step * (optim.lr / max(1, warmup - 1))
    return optim.min_lr + 0.5 * (optim.lr - optim.min_lr) * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups: decayed; and not decayed: what has one dimension (norms, layer scale), biases, and the model's own exceptions.

    Each holds `names` beside `params`, and an `lr_scale` that multiplies the learning rate (official code's optim_factory).
    """
    exempt = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()  # type: ignore[operator]
    groups = {rate: {"params": [], "names": [], "weight_decay": rate, "lr_scale": 1.0} for rate in dict.fromkeys((weight_decay, 0.0))}
    for name, parameter in model.named_parameters():
        plain = parameter.ndim <= 1 or name.endswith(".bias") or name in exempt
        group = groups[0.0 if plain else weight_decay]
        group["params"].append(parameter)  # type: ignore[attr-defined]
        group["names"].append(name)  # type: ignore[attr-defined]
    return [group for group in groups.values() if group["params"]]


def adamw(model: nn.Module, optim: Optim, fused: bool) -> torch.optim.AdamW:
    first, second = optim.betas
    groups = parameter_groups(model, optim.weight_decay)
    return torch.optim.AdamW(groups, lr=optim.lr, betas=(first, second), eps=optim.eps, fused=fused, foreach=not fused)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]


def state_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The moments and step counts of every parameter, as "name/exp_avg" and so on, for a checkpoint."""
    return {
        f"{name}/{kind}": tensor
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
        for kind, tensor in optimizer.state[parameter].items()
    }


def load_state_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Set what `state_tensors` gave. Only tensors: rates and flags such as fused stay those of this optimizer."""
    named = [pair for group in optimizer.param_groups for pair in zip(group["names"], group["params"], strict=True)]
    index = {name: index for index, (name, _) in enumerate(named)}
    state: dict[int, dict] = {}
    for key, tensor in tensors.items():
        name, _, kind = key.rpartition("/")
        parameter = named[index[name]][1]
        if tensor.shape == parameter.shape:  # in the parameter's memory format: fused AdamW reads both in the order of memory
            tensor = torch.empty_like(parameter.data).copy_(tensor)
        state.setdefault(index[name], {})[kind] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def update(optimizer: torch.optim.AdamW, skip: torch.Tensor) -> None:
    """One step, suppressed on the device where `skip` (a float scalar there) is 1; unfused AdamW cannot, so there the host waits for it."""
    if optimizer.defaults["fused"]:
        optimizer.found_inf = skip  # type: ignore[attr-defined]
        optimizer.step()
    elif not skip.item():
        optimizer.step()
    optimizer.zero_grad()
