"""The recipes against the published values, typed here by hand from the paper's tables and the official
repositories' settings.
"""

from typing import NamedTuple

import pytest
import yaml
from conftest import ROOT

from reconverge.base import imagenet
from reconverge.base.errors import Stop
from reconverge.config import published
from reconverge.training.clock import Clock

# Those of segmentation are in test_segment.py.
RECIPES = sorted(
    path.stem
    for path in (ROOT / "conf" / "recipe").glob("*.yaml")
    if "task" not in yaml.safe_load(path.read_text())["recipe"]
)
MODELS = {
    str(path.relative_to(ROOT / "conf" / "model").with_suffix("")): yaml.safe_load(path.read_text())
    for path in sorted((ROOT / "conf" / "model").rglob("*.yaml"))
}


class Values(NamedTuple):
    """Values of one published run, for all sizes of the model."""

    batch: int
    epochs: int
    lr: float
    min_lr: float
    warmup_lr: float
    warmup: int
    schedule: str
    layer_decay: float
    weight_decay: float
    clip: float | None
    mixup: float
    cutmix: float
    repeats: int
    size: int
    evaluation: tuple  # size, crop ratio, mode
    head: float


AT_224, AT_384 = (224, 0.875, "crop"), (384, 1.0, "squash")
# fmt: off
TABLE = {
    #                                batch epochs lr   min_lr wlr warm  form       decay wd    clip  mix  cut
    #   repeats px   evaluation head
    "in1k":                   Values(4096, 300, 4e-3, 1e-6, 0.0,  20, "convnext", 1.0, 0.05, None, 0.8, 1.0,
        1, 224, AT_224, 1.0),    # Table 5
    "in1k_iso":               Values(4096, 300, 4e-3, 1e-6, 0.0,  50, "convnext", 1.0, 0.05, None, 0.8, 1.0,
        1, 224, AT_224, 1.0),    # A.1
    "in1k_roadmap":           Values(4096, 300, 4e-3, 1e-6, 0.0,  20, "convnext", 1.0, 0.05, None, 0.8, 1.0,
        1, 224, AT_224, 1.0),    # A.1
    "in22k":                  Values(4096,  90, 4e-3, 1e-6, 0.0,   5, "convnext", 1.0, 0.05, None, 0.8, 1.0,
        1, 224, AT_224, 1.0),    # Table 5
    "ft_in1k_384":            Values( 512,  30, 5e-5, 1e-6, 0.0,   0, "convnext", 0.7, 1e-8, None, 0.0, 0.0,
        1, 384, AT_384, 0.001),  # Table 6
    "ft_in22k_in1k_224":      Values( 512,  30, 5e-5, 1e-6, 0.0,   0, "convnext", 0.8, 1e-8, None, 0.0, 0.0,
        1, 224, AT_224, 0.001),
    "ft_in22k_in1k_384":      Values( 512,  30, 5e-5, 1e-6, 0.0,   0, "convnext", 0.8, 1e-8, None, 0.0, 0.0,
        1, 384, AT_384, 0.001),
    "deit":                   Values(1024, 300, 1e-3, 1e-5, 1e-6,  5, "deit",     1.0, 0.05, None, 0.8, 1.0,
        3, 224, AT_224, 1.0),    # deit main.py
    "swin":                   Values(1024, 300, 1e-3, 1e-5, 1e-6, 20, "swin",     1.0, 0.05, 5.0,  0.8, 1.0,
        1, 224, AT_224, 1.0),    # config.py
    "swin_in22k":             Values(4096,  90, 1e-3, 1e-5, 1e-6,  5, "swin",     1.0, 0.05, 5.0,  0.8, 1.0,
        1, 224, AT_224, 1.0),    # *_22k.yaml
    "swin_ft_in1k_384":       Values(1024,  30, 4e-5, 4e-7, 4e-8,  5, "swin",     1.0, 1e-8, 5.0,  0.8, 1.0,
        1, 384, AT_384, 1.0),    # *_finetune.yaml
    "swin_ft_in22k_in1k_224": Values(1024,  30, 4e-5, 4e-7, 4e-8,  5, "swin",     1.0, 1e-8, 5.0,  0.8, 1.0,
        1, 224, AT_224, 1.0),
    "swin_ft_in22k_in1k_384": Values(1024,  30, 4e-5, 4e-7, 4e-8,  5, "swin",     1.0, 1e-8, 5.0,  0.8, 1.0,
        1, 384, AT_384, 1.0),
}

# recipe -> size -> stochastic depth, microbatch, EMA
SIZES = {
    "in1k":                   {"t": (0.1, 128, 0.9999), "s": (0.4, 128, 0.9999), "b": (0.5, 128, 0.9999),
        "l": (0.5, 64, 0.9999), "atto": (0.0, 128, 0.9999)},
    "in1k_iso":               {"iso_s": (0.1, 128, 0.9999), "iso_b": (0.2, 128, 0.9999),
        "iso_l": (0.5, 64, 0.9999)},
    "in1k_roadmap":           {"t": (0.1, 128, None), "b": (0.5, 128, None)},
    "in22k":                  {"t": (0.0, 32, None), "s": (0.0, 32, None), "b": (0.1, 32, None),
        "l": (0.1, 32, None), "xl": (0.2, 32, None)},
    "ft_in1k_384":            {"b": (0.8, 32, None), "l": (0.95, 32, None)},
    "ft_in22k_in1k_224":      {"t": (0.0, 32, None), "s": (0.1, 32, None), "b": (0.2, 32, None),
        "l": (0.3, 32, None), "xl": (0.4, 16, 0.9999)},
    "ft_in22k_in1k_384":      {"t": (0.0, 16, None), "s": (0.1, 16, None), "b": (0.2, 16, None),
        "l": (0.3, 16, None), "xl": (0.4, 8, 0.9999)},
    "deit":                   {"deit_s": (0.1, 256, None), "deit_b": (0.1, 64, None)},
    "swin":                   {"swin_t": (0.2, 128, None), "swin_s": (0.3, 128, None),
        "swin_b": (0.5, 64, None)},
    "swin_in22k":             {"swin_t": (0.1, 128, None), "swin_s": (0.2, 128, None),
        "swin_b": (0.2, 128, None), "swin_l": (0.2, 128, None)},
    "swin_ft_in1k_384":       {"swin_b": (0.5, 64, None)},
    "swin_ft_in22k_in1k_224": {"swin_t": (0.1, 64, None), "swin_s": (0.2, 64, None),
        "swin_b": (0.2, 64, None), "swin_l": (0.2, 64, None)},
    "swin_ft_in22k_in1k_384": {"swin_b": (0.2, 64, None), "swin_l": (0.2, 64, None)},
}

# Tables 10 and 11, in the order of the steps; the models' names begin with these numbers
ROADMAP_T = [78.82, 79.36, 79.51, 78.28, 80.50, 80.64, 79.92, 80.35, 80.57, 80.57, 80.47, 80.62, 81.27, 81.41,
    81.47, 81.97]
ROADMAP_B = [81.14, 81.33, 81.59, 80.54, 81.85, 82.64, 82.04, 82.32, 82.30, 82.27, 82.18, 82.19, 82.71, 83.17,
    83.35, 83.60]

# Tables 1 and 2: recipe -> model -> top-1
TOP1 = {
    "in1k":                   {"convnext_t": 82.1, "convnext_s": 83.1, "convnext_b": 83.8,
        "convnext_l": 84.3},
    "in1k_iso":               {"convnext_iso_s": 79.7, "convnext_iso_b": 82.0, "convnext_iso_l": 82.6},
    "in1k_roadmap":           {"convnext_t": 81.97, "convnext_b": 83.60},
    "in22k":                  {},
    "ft_in1k_384":            {"convnext_b": 85.1, "convnext_l": 85.5},
    "ft_in22k_in1k_224":      {"convnext_t": 82.9, "convnext_s": 84.6, "convnext_b": 85.8, "convnext_l": 86.6,
        "convnext_xl": 87.0},
    "ft_in22k_in1k_384":      {"convnext_t": 84.1, "convnext_s": 85.8, "convnext_b": 86.8, "convnext_l": 87.5,
        "convnext_xl": 87.8},
    "deit":                   {"deit_s": 79.8, "deit_b": 81.8},
    "swin":                   {"swin_t": 81.3, "swin_s": 83.0, "swin_b": 83.5},
    "swin_in22k":             {},
    "swin_ft_in1k_384":       {"swin_b_384": 84.5},
    "swin_ft_in22k_in1k_224": {"swin_b": 85.2, "swin_l": 86.3},
    "swin_ft_in22k_in1k_384": {"swin_b_384": 86.4, "swin_l_384": 87.3},
}
# fmt: on
OURS = {"demo", "finetune"}


def pairs():
    """(model, recipe, whether they fit), with one model for each size and image size, because recipes depend
    only on these.
    """
    kinds = {}
    for name, content in MODELS.items():
        if name != "timm":  # for any model.timm
            kinds.setdefault((content["size"], content.get("image_size")), name)
    tables = {
        name: yaml.safe_load((ROOT / "conf" / "recipe" / f"{name}.yaml").read_text())["recipe"]["drop_path"]
        for name in OURS
    }
    for (size, images), model in kinds.items():
        for recipe, known in (SIZES | tables).items():
            trained = {"demo": 32, "finetune": 224}.get(recipe) or TABLE[recipe].size
            yield model, recipe, size in known and images in (None, "${augment.size}", trained)


def test_every_published_recipe_is_in_the_tables():
    assert set(TABLE) == set(SIZES) == set(TOP1) == set(RECIPES) - OURS


@pytest.mark.parametrize("recipe", TABLE)
def test_recipe_is_as_published_for_every_size(compose, recipe):
    values = TABLE[recipe]
    fitting = [
        (MODELS[model]["size"], [f"model={model}"])
        for model, name, fits in pairs()
        if fits and name == recipe
    ]
    fitting += [
        (size, ["model=convnext_t", f"model.size={size}"])
        for size in SIZES[recipe].keys() - {size for size, _ in fitting}
    ]
    for size, model in fitting:
        drop_path, microbatch, ema = SIZES[recipe][size]
        cfg = compose(*model, f"recipe={recipe}")
        assert (cfg.model.drop_path, cfg.microbatch, cfg.ema.decay) == (drop_path, microbatch, ema), size
        assert (cfg.batch, cfg.epochs, cfg.steps) == (values.batch, values.epochs, None)
        given = cfg.optim
        assert (given.lr, given.min_lr, given.warmup_lr, given.lr_batch) == (
            values.lr,
            values.min_lr,
            values.warmup_lr,
            None,
        )
        assert (given.warmup_epochs, given.schedule) == (values.warmup, values.schedule)
        assert (given.layer_decay, given.layer_groups) == (values.layer_decay, "auto")
        assert (given.weight_decay, given.clip, given.betas, given.eps) == (
            values.weight_decay,
            values.clip,
            [0.9, 0.999],
            1e-8,
        )
        assert (cfg.mix.mixup, cfg.mix.cutmix, cfg.mix.probability, cfg.mix.switch, cfg.mix.smoothing) == (
            values.mixup,
            values.cutmix,
            1.0,
            0.5,
            0.1,
        )
        assert (cfg.augment.auto, cfg.augment.erase, cfg.augment.flip, cfg.augment.interpolation) == (
            "rand-m9-mstd0.5-inc1",
            0.25,
            0.5,
            "bicubic",
        )
        assert (cfg.augment.scale, cfg.augment.ratio) == ([0.08, 1.0], pytest.approx([3 / 4, 4 / 3]))
        assert (cfg.augment.size, cfg.augment.repeats) == (values.size, values.repeats)
        evaluation = cfg.evaluate
        assert (evaluation.size, evaluation.crop_ratio, evaluation.mode, evaluation.interpolation) == (
            *values.evaluation,
            "bicubic",
        )
        assert cfg.model.head_init_scale == values.head
        steps = {name: top1 for name, top1 in cfg.recipe.expected.items() if name.startswith("roadmap_")}
        assert {name: top1 for name, top1 in cfg.recipe.expected.items() if name not in steps} == TOP1[recipe]
        if recipe == "in1k_roadmap":
            assert list(steps.values()) == ROADMAP_T + ROADMAP_B
            numbers = [f"{prefix}{step:02}_" for prefix in ("roadmap_", "roadmap_b_") for step in range(16)]
            assert all(name.startswith(number) for name, number in zip(steps, numbers, strict=True))
        assert cfg.recipe.dataset == (
            "imagenet22k" if recipe.removeprefix("swin_") == "in22k" else "imagenet1k"
        )
        assert bool(cfg.recipe.starts_from) == ("ft_" in recipe)
        assert published.departures(cfg) == []
        assert cfg.evaluate_every == ("never" if cfg.recipe.dataset == "imagenet22k" else "1epoch")


def test_layer_scale_is_the_models():
    """Table 5: 1e-6; section A.1: none for the isotropic S and B."""
    scales = {name: content["layer_scale"] for name, content in MODELS.items() if name.startswith("convnext")}
    assert {name for name, scale in scales.items() if scale is None} == {"convnext_iso_s", "convnext_iso_b"}
    assert {float(scale) for scale in scales.values() if scale is not None} == {1e-6}


@pytest.mark.parametrize(
    ("recipe", "size", "steps_per_epoch", "total", "warmup", "microbatches"),
    [("in1k", "t", 312, 93_600, 6_240, 32), ("in1k_iso", "iso_l", 312, 93_600, 15_600, 64),
        ("in22k", "b", 3_466, 311_940, 17_330, 128),
        ("ft_in1k_384", "b", 2_502, 75_060, 0, 16), ("ft_in22k_in1k_384", "xl", 2_502, 75_060, 0, 64),
        ("deit", "deit_s", 1_251, 375_300, 6_255, 4), ("swin", "swin_b", 1_251, 375_300, 25_020, 16)],
)  # fmt: skip
def test_steps_of_the_published_runs(compose, recipe, size, steps_per_epoch, total, warmup, microbatches):
    cfg = compose("model=convnext_t", f"model.size={size}", f"recipe={recipe}")
    clock = Clock.of(cfg, imagenet.DATASETS[cfg.recipe.dataset].training)
    assert (clock.steps_per_epoch, clock.total, clock.warmup, clock.microbatches) == (
        steps_per_epoch,
        total,
        warmup,
        microbatches,
    )


def refuses(compose, model, recipe):
    with pytest.raises(Stop) as refused:
        compose(f"model={model}", f"recipe={recipe}")
    size, known = (
        MODELS[model]["size"],
        yaml.safe_load((ROOT / "conf" / "recipe" / f"{recipe}.yaml").read_text())["recipe"]["drop_path"],
    )
    if size not in known:
        assert refused.value.args[2] == f"sizes that this recipe has an entry for: {', '.join(known)}"
        assert f"(size {size}) with recipe={recipe}" in refused.value.args[1]


def test_every_model_composes_with_a_recipe_of_our_own(compose):
    """With one of them; the slow test takes all. For published recipes see
    test_recipe_is_as_published_for_every_size.
    """
    for model, recipe in {
        model: recipe for model, recipe, fits in pairs() if fits and recipe in OURS
    }.items():
        assert compose(f"model={model}", f"recipe={recipe}").recipe.name == recipe
    assert {model for model, _, fits in pairs() if fits} == {model for model, *_ in pairs()}


@pytest.mark.slow
def test_every_model_composes_with_our_own_recipes_where_they_fit(compose):
    for model, recipe, fits in pairs():
        if fits and recipe in OURS:
            assert compose(f"model={model}", f"recipe={recipe}").recipe.name == recipe


def test_a_model_that_a_recipe_does_not_fit_is_refused(compose):
    """One model for each recipe; the slow test takes all."""
    for recipe, model in {recipe: model for model, recipe, fits in pairs() if not fits}.items():
        refuses(compose, model, recipe)


@pytest.mark.slow
def test_every_model_is_refused_by_every_recipe_that_does_not_fit_it(compose):
    for model, recipe, fits in pairs():
        if not fits:
            refuses(compose, model, recipe)


def test_the_tables_of_a_recipe_have_the_same_sizes_and_its_header_says_what_they_say():
    for recipe in RECIPES:
        text = (ROOT / "conf" / "recipe" / f"{recipe}.yaml").read_text()
        header = text[: text.index("\nrecipe:")]
        tables = yaml.safe_load(text)["recipe"]
        assert tables["name"] == recipe
        assert (
            tables["drop_path"].keys()
            == tables["microbatch"].keys()
            == tables.get("ema", tables["drop_path"]).keys()
        )
        assert f"recipe={recipe} " in header or recipe == "demo"
        for top1 in tables.get("expected", {}).values():
            assert f" {top1}" in header or recipe == "in1k_roadmap"  # its whole header is this table
        if tables.get("expected"):
            assert f"noise band: {tables['noise']}" in header
            assert "published hardware: " in header
        assert len(text.splitlines()) <= 68  # one screen
        assert max(map(len, text.splitlines())) <= 140


def test_the_page_of_recipes_lists_each_and_what_it_costs():
    rows = [
        line for line in (ROOT / "docs" / "recipes.md").read_text().splitlines() if line.startswith("| `")
    ]
    for recipe in RECIPES:
        content = yaml.safe_load((ROOT / "conf" / "recipe" / f"{recipe}.yaml").read_text())
        (row,) = [row for row in rows if f"`{recipe}`" in row.split("|")[1]]
        assert row.endswith(f"| {content['epochs']}, {content['recipe']['batch']} |")


def test_the_in1k_recipe_says_what_the_table_of_models_says():
    from reconverge.models.table import MODELS as table

    for recipe in ("in1k", "in1k_iso", "deit", "swin"):
        for name, top1 in TOP1[recipe].items():
            if hasattr(table.get(name), "top1"):
                assert table[name].top1 == top1


def test_finetune_follows_the_linear_rule(compose):
    cfg = compose("model=convnext_t", "recipe=finetune", "batch=128")
    clock = Clock.of(cfg, 12_800)
    assert (cfg.optim.lr, cfg.optim.lr_batch, cfg.optim.layer_decay, cfg.model.head_init_scale) == (
        2e-3,
        512,
        0.8,
        0.001,
    )
    assert clock.lr_factor == 0.25
    assert not any("not rescaled" in notice for notice in published.notices(cfg, []))


def test_notices_name_what_departs_from_the_published_recipe_and_why(compose):
    cfg = compose(
        "model=convnext_s",
        "recipe=in1k",
        "batch=2048",
        "optim.lr=2e-3",
        "model.layer_scale=null",
        "workers=2",
        "seed=3",
    )
    assert [(key, then, now) for key, then, now, _ in published.departures(cfg)] == [
        ("batch", 4096, 2048), ("model.layer_scale", 1e-6, None), ("optim.lr", 4e-3, 2e-3)
    ]  # fmt: skip
    said = published.notices(cfg, ["optim.lr=2e-3"])
    assert "optim.lr=0.002 differs from recipe=in1k, published with 0.004 (" in said[2]
    assert "Table 5" in said[2]
    assert "model.layer_scale=null differs from recipe=in1k, published with 1e-06" in said[1]


def test_what_decides_no_result_departs_from_nothing(compose):
    cfg = compose(
        "model=convnext_b", "recipe=in22k", "evaluate_every=1epoch", "save_every=5", "precision=bf16"
    )
    assert published.departures(cfg) == []


def test_an_own_stochastic_depth_and_microbatch_depart_too(compose):
    cfg = compose("model=convnext_t", "recipe=in1k", "model.drop_path=0.2", "microbatch=64")
    assert [key for key, *_ in published.departures(cfg)] == ["microbatch", "model.drop_path"]
    cfg = compose("model=convnext_xl", "recipe=in1k", "model.drop_path=0.2", "microbatch=64")
    assert published.departures(cfg) == []  # nothing is published for XL
    with pytest.raises(Stop, match="size atto") as refused:
        compose("recipe=ft_in22k_in1k_384", "model.drop_path=0", "microbatch=8")
    assert "ema.decay=..." in refused.value.args[3]
    cfg = compose("recipe=ft_in22k_in1k_384", "model.drop_path=0", "microbatch=8", "ema.decay=0.9")
    assert published.departures(cfg) == []


def test_settings_of_fine_tuning_are_warned_about_from_scratch(compose):
    said = published.notices(compose("model=convnext_b", "recipe=ft_in1k_384"), [])
    for part in (
        "recipe=ft_in1k_384 expects pre-trained weights (the raw weights of recipe=in1k, for L",
        "init= is not given: training starts from random weights",
        "optim.layer_decay=0.7 is for fine-tuning",
        "model.head_init_scale=0.001 is for fine-tuning",
    ):
        assert any(part in text for text in said)
    assert published.notices(compose("model=convnext_b", "recipe=in1k"), []) == []


def test_weights_from_elsewhere_are_named_where_the_recipe_starts_from_scratch(compose):
    assert published.notices(compose("model=convnext_b", "recipe=ft_in1k_384", "init=runs/a"), []) == []
    assert published.notices(compose("model=convnext_b", "recipe=finetune", "init=runs/a"), []) == []
    assert published.notices(compose("init=runs/a"), []) == []  # demo reproduces nothing
    (said,) = published.notices(compose("model=convnext_b", "recipe=in1k", "init=runs/a"), [])
    assert said.startswith(
        "init=runs/a gives pre-trained weights, but recipe=in1k was published for training"
    )


def test_an_ema_of_a_model_with_batchnorm_is_a_notice(compose):
    cfg = compose("model=roadmap/03_depthwise", "recipe=in1k")
    (said,) = published.notices(cfg, [], batch_norm=True)
    assert said.startswith("ema.decay=0.9999 with a model that has BatchNorm")
    assert "recipe=in1k_roadmap" in said
    assert "ema.decay=null" in said
    assert published.notices(cfg, [], batch_norm=False) == []
    cfg = compose("model=roadmap/03_depthwise", "recipe=in1k_roadmap")
    assert published.notices(cfg, [], batch_norm=True) == []


def test_recipes_that_start_from_another_run_say_which_of_its_weights():
    for recipe in ("ft_in1k_384", "ft_in22k_in1k_224", "ft_in22k_in1k_384", "swin_ft_in1k_384",
                   "swin_ft_in22k_in1k_224", "swin_ft_in22k_in1k_384"):  # fmt: skip
        header = (ROOT / "conf" / "recipe" / f"{recipe}.yaml").read_text().partition("\nrecipe:")[0]
        assert "init=runs/NAME" in header
        assert ("init=runs/NAME:ema:best" in header) == (recipe == "ft_in1k_384")  # L, from the best EMA


IN1K, EVALUATED = range(1_281_167), range(50_000)


def compared(cfg, top1, step=None, training=IN1K, validation=EVALUATED):
    clock = Clock.of(cfg, len(training))
    at = clock.end if step is None else step
    return published.comparison(cfg, clock.total, at, training, validation, top1)


@pytest.mark.parametrize(
    ("top1", "verdict"),
    [({"raw": 80.0, "ema": 82.06}, "published 82.1 ± 0.2 %: within the noise band (-0.04)"),
        ({"raw": 90, "ema": 81.9}, "published 82.1 ± 0.2 %: within the noise band (-0.20)"),
        ({"raw": 82.1, "ema": 81.88}, "published 82.1 ± 0.2 %: below (-0.22)"),
        ({"raw": 82.1, "ema": 82.5}, "published 82.1 ± 0.2 %: above (+0.40)")],
)  # fmt: skip
def test_the_end_compares_the_weights_that_were_published(compose, top1, verdict):
    assert compared(compose("model=convnext_t", "recipe=in1k"), top1) == verdict


def test_raw_weights_are_compared_where_the_recipe_keeps_no_ema(compose):
    cfg = compose("model=convnext_t", "recipe=in1k_roadmap")
    assert compared(cfg, {"raw": 81.9}) == "published 81.97 ± 0.2 %: within the noise band (-0.07)"


@pytest.mark.parametrize(
    ("arguments", "change", "reason"),
    [([], {"training": range(100_000)},
            "other data (100,000 training and 50,000 validation images, not 1,281,167 and 50,000)"),
        ([], {"validation": None}, "other data (1,281,167 training and 0 validation images"),
        ([], {"step": 5}, "other steps (5 of 93,600)"), (["steps=10"], {}, "other steps (10 of 93,600)"),
        ([], {"top1": {}}, "not evaluated"),
        (["batch=1024"], {}, "other batch (1024, not 4096)"),
        (["optim.lr=1e-3"], {}, "other optim.lr (0.001, not 0.004)"),
        (["augment.erase=0", "augment.flip=0", "mix.mixup=0", "mix.cutmix=0", "epochs=100",
            "ema.decay=0.9"], {},
            "other augment.erase (0.0, not 0.25); other mix.mixup (0.0, not 0.8); 2 more settings")],
)  # fmt: skip
def test_what_cannot_be_compared_says_why(compose, arguments, change, reason):
    said = compared(
        compose("model=convnext_t", "recipe=in1k", *arguments),
        **{"top1": {"raw": 82.0, "ema": 82.1}} | change,
    )
    assert said.startswith("published 82.1 %: not comparable, ")
    assert reason in said


def test_fine_tuning_is_compared_where_it_starts_from_weights_and_training_from_scratch_where_it_does_not(
    compose,
):
    fine = compose("model=convnext_t", "recipe=ft_in22k_in1k_224", "init=runs/a")
    assert compared(fine, {"raw": 82.9}) == "published 82.9 ± 0.2 %: within the noise band (+0.00)"
    assert "not comparable, from runs/a, not from scratch" in compared(
        compose("model=convnext_t", "recipe=in1k", "init=runs/a"), {"raw": 82.1}
    )


def test_fine_tuning_from_scratch_or_another_model_cannot_be_compared(compose):
    assert "from scratch, not from the raw weights of recipe=in22k" in compared(
        compose("model=convnext_t", "recipe=ft_in22k_in1k_224"), {"raw": 82.9}
    )
    assert (
        compared(compose("model=convnext_atto", "recipe=in1k"), {"raw": 70})
        == "not comparable: no top-1 of convnext_atto with recipe=in1k is published"
    )
    assert compared(compose(), {"raw": 98.9}, training=range(1437), validation=range(359)) is None
