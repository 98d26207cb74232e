"""Loads weights of init= into a model. Every key of the file is reported, the head is loaded by a separate
rule, and position tables are resampled.
"""

import sys
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from reconverge.base import imagenet
from reconverge.base.errors import Exit, Stop
from reconverge.models import head
from reconverge.models.pyramid import Pyramid
from reconverge.weights import names, read
from reconverge.weights.names import Entry
from reconverge.weights.read import FLOATS, INTEGERS, Pretrained

SHOWN = 8  # names of one kind in a message; environment.json has them all
# The possible results for a key. The numbers of the first five are always printed; the others only if there
# are any. Resampled keys are also in "converted".
ALWAYS = ("loaded", "converted", "missing", "unexpected", "of another shape")
# "without use" are a classifier's own head and last norm in a segmenter, "initial" the segmenter's own heads.
RARE = ("resampled", "recomputed", "of the head", "without use", "initial")
POSITIONS = ("pos_embed", "relative_position_bias_table")
# Not weights: old files of Swin have the first two, and old files of ResNet lack the last.
BUFFERS = ("relative_position_index", "attn_mask", "num_batches_tracked")


@torch.no_grad()
def load(net: nn.Module, init: str, strict: bool, head: str, classes: list[str]) -> dict[str, Any]:
    """Load the weights that `init` names into `net`, whose head has one row for each of `classes`. Rows that
    are not loaded keep their initial weights. A segmenter takes a whole segmenter, or a classifier as its
    backbone.

    `strict`, `head`: the settings init_strict and init_head. Returns, for environment.json, the source of the
    weights and the keys by result. Errors: Stop(USAGE, MISSING, DAMAGED, PERMISSION); then `net` is
    unchanged.
    """
    found = read.read(init)
    layout, entries = names.converted(_stripped(found.tensors, init))
    if isinstance(net, Pyramid) and not any(entry.name.startswith("body.") for entry in entries):
        entries, keys = _resampled(net.body, entries)
        entries = _below_body(net, entries, keys)
    else:
        entries, keys = _resampled(net, entries)
    own = net.state_dict()
    head_names = _head_names(net)
    fitting, head_entries = _sorted(entries, own, head_names, keys)
    _refuse_partial(init, found, keys, strict)
    for entry in (*fitting, *head_entries):
        _refuse_values(init, entry, own[entry.name])
    said, notices = _load_head(own, head_names, head_entries, head, found, classes, init)
    for entry in fitting:
        own[entry.name].copy_(entry.tensor)  # a state dict shares its memory with the model
    return {
        "given": init,
        **found.origin,
        "layout": layout,
        "head": said,
        "notices": notices,
        "keys": {kind: names for kind, names in keys.items() if names or kind in ALWAYS},
    }


def _refuse_values(init: str, entry: Entry, own: Tensor) -> None:
    """Errors: Stop(USAGE) for numbers of another kind than the weight's, such as int8 without its scale;
    Stop(DAMAGED) for values that are not finite once they have the type of the weight.
    """
    tensor, kind = entry.tensor, "floating-point numbers" if own.is_floating_point() else "integers"
    allowed = FLOATS if own.is_floating_point() else INTEGERS
    if tensor.dtype not in allowed or tensor.layout != torch.strided or tensor.device.type != "cpu":
        how = f"{tensor.dtype}".removeprefix("torch.")
        how += "" if tensor.layout == torch.strided else f", {tensor.layout}".replace("torch.", "")
        raise Stop(
            Exit.USAGE,
            f"init={init}: {entry.given} consists of {how}"
            + (" without values" if tensor.device.type == "meta" else ""),
            f"{kind}: {', '.join(str(dtype).removeprefix('torch.') for dtype in allowed)}",
            "weights that are not quantized, saved as float32",
        )
    if not tensor.to(own.dtype).isfinite().all():
        cast = "" if not tensor.isfinite().all() else f" as {own.dtype}".replace("torch.", "")
        raise Stop(
            Exit.DAMAGED,
            f"init={init}: {entry.given} has values that are not finite{cast}",
            "weights with finite values only",
            "use another file or checkpoint",
        )


def table(origin: dict[str, Any]) -> dict[str, str]:
    """The result of `load` as rows (name -> text): source, counts, keys that were not loaded, the head."""
    keys = origin["keys"]
    counts = ", ".join(f"{len(keys[kind])} {kind}" for kind in (*ALWAYS, *RARE) if kind in keys)
    rows = {
        "init": f"{origin['text']}; sha256 {origin['sha256'][:12]}",
        "weights": counts + (f" (from the names of the {origin['layout']})" if origin["layout"] else ""),
    }
    rows |= {kind: _listed(keys[kind]) for kind in (*ALWAYS[2:], *RARE[:2]) if keys.get(kind)}
    return rows | {"head": origin["head"]}


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _stripped(tensors: dict[str, Tensor], init: str) -> dict[str, Tensor]:
    stripped = {names.stripped(name): tensor for name, tensor in tensors.items()}
    if len(stripped) < len(tensors):
        twice = [name for name, count in Counter(map(names.stripped, tensors)).items() if count > 1]
        raise Stop(
            Exit.USAGE,
            f"init={init} has {_listed(twice)} more than once, with and without a prefix such as module.",
            "a file that has each weight once",
            "save the state_dict() of the model without DistributedDataParallel or torch.compile",
        )
    return stripped


def _resampled(net: nn.Module, entries: list[Entry]) -> tuple[list[Entry], dict[str, list[str]]]:
    """The entries, with position tables resampled to the model's resolution, if it has such tables; and the
    keys by result. timm's checkpoint_filter_fn of the model does the resampling.
    """
    keys: dict[str, list[str]] = {kind: [] for kind in (*ALWAYS, *RARE)}
    adapt = getattr(sys.modules[type(net).__module__], "checkpoint_filter_fn", None)
    if adapt is None or not any(name.endswith(POSITIONS) for name in net.state_dict()):
        return entries, keys
    try:
        adapted = adapt({entry.name: entry.tensor for entry in entries}, net)
    except (AttributeError, KeyError, RuntimeError, ValueError, IndexError):
        return entries, keys  # weights of another architecture: _refuse_partial will report them
    came = {id(entry.tensor): entry for entry in entries}
    by_name = {entry.name: entry for entry in entries}
    result = []
    for name, tensor in adapted.items():
        entry = by_name.get(name)
        # timm may have renamed the tensor, replaced it, or made it from several tensors.
        if entry is None or entry.tensor is not tensor:
            entry = came.get(id(tensor)) or entry or Entry(name, name, tensor)
        if tensor.shape != entry.tensor.shape:
            keys["resampled"].append(f"{entry.given} {tuple(entry.tensor.shape)} to {tuple(tensor.shape)}")
        result.append(Entry(name, entry.given, tensor))
    gone = {entry.given for entry in entries} - {entry.given for entry in result}
    for name in sorted(gone):
        keys["recomputed" if name.endswith(BUFFERS) else "unexpected"].append(name)
    return result, keys


def _below_body(net: Pyramid, entries: list[Entry], keys: dict[str, list[str]]) -> list[Entry]:
    """A classifier's entries for the backbone of a segmenter. `keys` gets what has no use there, and the
    weights that only a segmenter has.
    """
    below = [entry._replace(name=f"body.{entry.name}") for entry in entries]
    keys["without use"] = [entry.given for entry in below if entry.name in net.dropped]
    keys["initial"] = [name for name in net.state_dict() if not name.startswith("body.")]
    return [entry for entry in below if entry.name not in net.dropped]


def _sorted(
    entries: list[Entry], own: dict[str, Tensor], head_names: list[str], keys: dict[str, list[str]]
) -> tuple[list[Entry], list[Entry]]:
    """The entries that fit a weight of the model, and the entries of the head, with any number of rows.

    `keys` gets the result for every key.
    """
    fitting, head_entries, met = [], [], set(keys["initial"])
    resampled = {text.partition(" ")[0] for text in keys["resampled"]}
    for entry in entries:
        if entry.name not in own or entry.name in met:  # in met: two keys of the file name one weight
            keys["unexpected"].append(entry.given)
            continue
        met.add(entry.name)
        wanted = own[entry.name].shape
        if entry.name in head_names and entry.tensor.shape[1:] == wanted[1:]:
            head_entries.append(entry)
            keys["of the head"].append(entry.given)
        elif entry.tensor.shape != wanted:
            keys["of another shape"].append(f"{entry.given} {tuple(entry.tensor.shape)} for {tuple(wanted)}")
        else:
            fitting.append(entry)
            keys[
                "loaded" if entry.name == entry.given and entry.given not in resampled else "converted"
            ].append(entry.given)
    for name in own:
        if name not in met and (name not in head_names or head_entries):
            keys["recomputed" if name.endswith(BUFFERS) else "missing"].append(name)
    return fitting, head_entries


def _head_names(net: nn.Module) -> list[str]:
    """Names of the head's weights in the state dict."""
    heads = head.classifiers(net)
    prefixes = {module: name for name, module in net.named_modules() if module in heads}
    return [f"{prefixes[one]}.{part}" for one in heads for part in one.state_dict()]


def _refuse_partial(init: str, found: Pretrained, keys: dict[str, list[str]], strict: bool) -> None:
    fit = len(keys["loaded"]) + len(keys["converted"])
    refused = [kind for kind in ("missing", "unexpected", "of another shape") if keys[kind]]
    if fit and not (strict and refused):
        return
    counts = ", ".join(f"{len(keys[kind])} {kind}" for kind in ALWAYS)
    names = "".join(f"\n           {kind:<16} {_listed(keys[kind])}" for kind in refused)
    made_for = (
        f" (these weights are of {found.origin['architecture']})" if "architecture" in found.origin else ""
    )
    raise Stop(
        Exit.USAGE,
        f"init={init}: {counts}{names}",
        "weights of exactly this model; only the head may differ" + ("" if fit else ". No weight fits here"),
        f"choose the model= of these weights{made_for}"
        + (f", or init_strict=false to load only the {fit} that fit" if fit else ""),
    )


def _load_head(
    own: dict[str, Tensor],
    names: list[str],
    entries: list[Entry],
    rule: str,
    found: Pretrained,
    classes: list[str],
    init: str,
) -> tuple[str, list[str]]:
    """Load the head's rows by the rule of init_head. Returns a text about it, and what might not be meant.

    Errors: Stop(USAGE).
    """
    rows = len(entries[0].tensor) if len(entries) == len(names) else 0
    theirs = found.classes if found.classes and len(found.classes) == rows else None
    by_count = "" if theirs else f"; assumed to be ImageNet's {rows} synsets, from their number"
    theirs = theirs or imagenet.of_head(rows)
    notices = []
    if rule == "auto":
        rule = "keep" if rows and theirs == classes else "fresh"
        if rule == "fresh" and rows == len(classes):
            notices = [_by_position(rows, theirs, classes)]
    if rule == "fresh":
        return f"fresh, {len(classes)} classes; {_why_fresh(rows, theirs, classes)}", notices
    if not rows:
        raise Stop(
            Exit.USAGE,
            f"init_head={rule}, but init={init} has no head of the model's width",
            "weights with a head of the model's width",
            "init_head=fresh, which keeps the initial weights of the head",
        )
    if rule == "mapped":
        return _map_rows(own, entries, theirs or [], classes) + by_count, notices
    if rows != len(classes):
        raise Stop(
            Exit.USAGE,
            f"init_head=keep, but the head has {rows} classes and the data {len(classes)}",
            "a head with as many classes as the data",
            "init_head=mapped to load rows by the names of classes, or init_head=fresh",
        )
    for entry in entries:
        own[entry.name].copy_(entry.tensor)
    if theirs == classes:
        return f"kept, {rows} classes{by_count}", notices
    how = "differ" if theirs else "are unknown"
    return f"kept, {rows} classes by position: their names {how}", notices


def _by_position(rows: int, theirs: list[str] | None, classes: list[str]) -> str:
    """A notice about a head that gets new weights although it has as many rows as the data have classes."""
    here = f"the data's {rows} ({', '.join(classes[:3])}, ...)"
    if theirs is None:
        why, mapped = f"the file does not name its {rows} classes", ""
    else:
        common = len(set(theirs) & set(classes))
        why = f"{common} of the {rows} names match" + (", in another order" if common == rows else "")
        mapped = "; init_head=mapped loads the rows whose names match" if common else ""
    return (
        f"the head gets new weights, because its classes are not {here}: {why}. If they are the same classes"
        f" in the same order, init_head=keep loads the head by position, as the published code does{mapped}"
    )


def _why_fresh(rows: int, theirs: list[str] | None, classes: list[str]) -> str:
    if not rows:
        return "the file has no complete head"
    if theirs == classes:
        return f"the {rows} rows of the file have the same classes, but are not used"
    if theirs is None and rows == len(classes):
        return f"the file does not name its {rows} classes; init_head=keep would load them by position"
    return f"the {rows} classes of the file are different ones"


def _map_rows(own: dict[str, Tensor], entries: list[Entry], theirs: list[str], classes: list[str]) -> str:
    """Each class of the data gets the row with its name. Classes that the file lacks keep initial weights.

    Errors: Stop(USAGE).
    """
    index = {label: row for row, label in enumerate(theirs)}
    pairs = [(row, index[label]) for row, label in enumerate(classes) if label in index]
    if not pairs:
        reason = "none of which has the name of a class of the data" if theirs else "whose names are unknown"
        raise Stop(
            Exit.USAGE,
            f"init_head=mapped with a head of {len(entries[0].tensor)} classes, {reason}",
            "classes with common names (for ImageNet: synset ids)",
            "init_head=fresh, or init_head=keep if both have the same classes in the same order",
        )
    to, of = torch.tensor(pairs).T
    for entry in entries:
        weight = own[entry.name]
        weight[to.to(weight.device)] = entry.tensor[of].to(weight)
    lacking = [label for label in classes if label not in index]
    fresh = f"; initial weights for {_listed(lacking)}" if lacking else ""
    return f"mapped by name, {len(pairs)} of {len(classes)} classes from {len(theirs)}{fresh}"
