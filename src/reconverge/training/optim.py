"""Learning rate, parameter groups and the optimizer, as functions of their settings."""

import math

import torch
from torch import nn
from torch.nn.utils import get_total_norm

from reconverge.config.settings import Optim
from reconverge.models.layers import layers
from reconverge.training.clock import Clock


def learning_rate(optim: Optim, step: int, clock: Clock) -> float:
    """Learning rate of step 0..total-1, multiplied by clock.lr_factor.

    convnext (official code's cosine_scheduler): the warm-up is linspace(warmup_lr, lr, warmup) with both
    ends; then min_lr + (lr - min_lr) (1 + cos(pi i / n)) / 2 for i = 0..n-1 with n = total - warmup. So lr
    itself is used twice.

    swin, deit: timm's CosineLRScheduler, whose warm-up ends one step before it reaches lr. Both codes set the
    rate of number i after step i (swin) or epoch i (deit), so each rate is used one step or epoch later than
    its number says, and the first rate is used twice. In deit the cosine starts at the beginning of training,
    and the warm-up replaces its first part.

    poly (mmcv's PolyLrUpdaterHook of power 1): min_lr + (lr - min_lr) (1 - i / total) for i = 0..total-1; in
    the warm-up this is multiplied by a factor that grows linearly from warmup_lr / lr to 1.
    """
    if optim.schedule == "poly":
        rate = optim.min_lr + (optim.lr - optim.min_lr) * (1 - step / clock.total)
        if step < clock.warmup:
            rate *= 1 - (1 - step / clock.warmup) * (1 - optim.warmup_lr / optim.lr)
        return rate * clock.lr_factor
    if optim.schedule == "convnext":
        at, total, warmup, past, last = step, clock.total, clock.warmup, clock.warmup, clock.warmup - 1
    else:
        unit = clock.steps_per_epoch if optim.schedule == "deit" else 1
        at, total, warmup = max(0, step // unit - 1), clock.total // unit, clock.warmup // unit
        past, last = (0 if optim.schedule == "deit" else warmup), warmup
    if at < warmup:
        rate = (
            optim.lr
            if 0 < at == last
            else optim.warmup_lr + at * ((optim.lr - optim.warmup_lr) / max(1, last))
        )
    else:
        rate = optim.min_lr + 0.5 * (optim.lr - optim.min_lr) * (
            1 + math.cos(math.pi * (at - past) / (total - past))
        )
    return rate * clock.lr_factor


def parameter_groups(model: nn.Module, optim: Optim) -> list[dict]:
    """Two groups for each layer, with and without weight decay. Parameters without weight decay are those
    with one dimension (norms, layer scale), biases, and the model's own exceptions.

    Without layer decay the whole model is one layer. Each group has `params`, their `names`, its `layer`, and
    `lr_scale`, a factor for the learning rate: layer_decay ** (number of layers above it), as in the official
    code's optim_factory. Errors: Stop(USAGE).
    """
    exempt = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()  # type: ignore[operator]
    layer_of = layers(model, optim.layer_groups) if optim.layer_decay != 1 else {}
    head = max(layer_of.values(), default=0)
    groups: dict[tuple[int, float], dict] = {}
    for name, parameter in model.named_parameters():
        plain = parameter.ndim <= 1 or name.endswith(".bias") or name in exempt
        layer, decay = layer_of.get(name, 0), 0.0 if plain else optim.weight_decay
        empty = {
            "params": [],
            "names": [],
            "weight_decay": decay,
            "layer": layer,
            "lr_scale": optim.layer_decay ** (head - layer),
        }
        group = groups.setdefault((layer, -decay), empty)
        group["params"].append(parameter)
        group["names"].append(name)
    return [groups[key] for key in sorted(groups)]


def adamw(model: nn.Module, optim: Optim, fused: bool) -> torch.optim.AdamW:
    first, second = optim.betas
    groups = parameter_groups(model, optim)
    return torch.optim.AdamW(
        groups, lr=optim.lr, betas=(first, second), eps=optim.eps, fused=fused, foreach=not fused
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]


def state_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """AdamW's moments and step counts for a checkpoint, named "PARAMETER/exp_avg" and so on."""
    return {
        f"{name}/{kind}": tensor
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
        for kind, tensor in optimizer.state[parameter].items()
    }


def expected_state(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """What `state_tensors` returns after an update, as to names, shapes and dtypes: for each parameter that
    is trained two moments and a step count. The values are nothing.
    """
    count, found = torch.zeros(()), dict[str, torch.Tensor]()
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            if parameter.requires_grad:
                found |= {f"{name}/step": count}
                found |= {f"{name}/{kind}": parameter for kind in ("exp_avg", "exp_avg_sq")}
    return found


def load_state_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Load the tensors that `state_tensors` returned.

    Learning rates and flags such as fused stay as they are in this optimizer.
    """
    named = [
        pair for group in optimizer.param_groups for pair in zip(group["names"], group["params"], strict=True)
    ]
    index = {name: index for index, (name, _) in enumerate(named)}
    state: dict[int, dict] = {}
    for key, tensor in tensors.items():
        name, _, kind = key.rpartition("/")
        parameter = named[index[name]][1]
        # Fused AdamW reads parameter and moments in memory order, so both need the same memory format.
        if tensor.shape == parameter.shape:
            tensor = torch.empty_like(parameter.data).copy_(tensor)
        state.setdefault(index[name], {})[kind] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def update(optimizer: torch.optim.AdamW, skip: torch.Tensor) -> None:
    """One optimizer step, or none if `skip`, a float scalar on the device, is 1.

    Fused AdamW reads `skip` on the device. Without fused=true, the host waits for its value.
    """
    if optimizer.defaults["fused"]:
        optimizer.found_inf = skip  # type: ignore[attr-defined]
        optimizer.step()
    elif not skip.item():
        optimizer.step()


def floats(model: nn.Module) -> list[torch.Tensor]:
    """The weights and buffers of a model that can be infinite or NaN."""
    tensors = [tensor.detach() for tensor in (*model.parameters(), *model.buffers())]
    return [tensor for tensor in tensors if tensor.is_floating_point() and tensor.numel()]


def checked(floats: list[torch.Tensor], norm: torch.Tensor) -> torch.Tensor:
    """The gradient's `norm`, or -inf if an update left a number among `floats` that is not finite. It stays
    on the device: the host learns of both by one number, when the log is written.
    """
    largest = get_total_norm(floats, norm_type=math.inf)
    return torch.where(largest.isfinite(), norm, -math.inf)
