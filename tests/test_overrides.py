"""What is typed for a setting of text is taken literally, through every file that it passes."""

import pytest
from conftest import ROOT
from hypothesis import example, given, settings
from hypothesis import strategies as st

from reconverge.base.errors import Stop
from reconverge.config import compose
from reconverge.config.settings import Eval, Train

TYPED = [
    "1.10", "2024_01_01", ".5", "5e10482", "1e5", "true", "0x10", "~/data", "/a/b=c", "/a,b", "/a(b", "/a[b",
    "/a{b", "/a#b", "/a'b", '/a"b', "/a;b", "/photos été", "${oc.env:HOME}", r"\${oc.env:HOME}",
    r"\\${oc.env:HOME}", "a\\", r"a\'", r"\\'", "null ", " a ", "[a,b]",
]  # fmt: skip


def passed_on(value, folder):
    """The setting after the command line, after a run's config.yaml, and after that of a verification."""
    cfg = compose.of_training([f"data.root={value}"])
    compose.write_conf(folder, cfg)
    again = compose.composed(folder, "config", Train, [])
    return [one.data.root for one in (cfg, compose.from_text(compose.to_text(cfg), Train), again)]


@pytest.mark.parametrize("value", TYPED)
def test_text_is_taken_literally(value, tmp_path):
    assert passed_on(value, tmp_path) == [value] * 3


@settings(max_examples=25, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1))
@example("\\\\${a}'")
def test_any_text_is(tmp_path_factory, value):
    if value != "null" and not (len(value) > 1 and value[0] == value[-1] and value[0] in "'\""):
        assert passed_on(value, tmp_path_factory.mktemp("any")) == [value] * 3


def test_names_that_look_like_numbers_are_names():
    for name in ("1.10", "2024_01_01", ".5", "5e10482", "1e5"):
        assert compose.of_training([f"run={name}"]).run == name


def test_null_lists_numbers_and_quotes_keep_their_grammar():
    cfg = compose.of_training(
        ["data.val=null", "augment.scale=[0.5,1.0]", "optim.lr=1e-3", 'data.root="a b"']
    )
    assert (cfg.data.val, cfg.augment.scale, cfg.optim.lr) == (None, [0.5, 1.0], 1e-3)
    assert cfg.data.root == "a b"
    for value, images in (("[a.jpg,b.jpg]", ["a.jpg", "b.jpg"]), ("a,b.jpg", "a,b.jpg"), ('"my a"', "my a")):
        cfg = compose.composed(ROOT / "conf", "eval", Eval, ["checkpoint=runs/1.10", f"images={value}"])
        assert (cfg.checkpoint, cfg.images) == ("runs/1.10", images)


def test_a_sweep_divides_text_at_commas_that_are_not_escaped():
    given = [r"data.root=/a\,b,/c(d", "seed=0,1", "run=1.10"]
    assert compose.combinations(given) == [
        [f"data.root={root}", f"seed={seed}", "run=1.10"] for root in ("/a,b", "/c(d") for seed in (0, 1)
    ]
    assert compose.of_training(compose.combinations(given)[0]).data.root == "/a,b"


def test_the_config_of_a_foreign_run_is_not_asked_for_the_environment(monkeypatch):
    monkeypatch.setenv("SECRET", "leaked")
    text = compose.to_text(compose.of_training(["data.root=HERE"]))
    for planted in ("${oc.env:SECRET}", r"\${oc.env:SECRET}", "${seed}", "${"):
        cfg = compose.from_text(text.replace("HERE", f"'{planted}'"), Train)
        assert cfg.data.root == planted
        assert "leaked" not in compose.to_text(cfg)
    with pytest.raises(Stop, match="seed"):
        compose.from_text(text.replace("seed: 0", "seed: ${oc.env:SECRET}"), Train)


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just words\n", "run: [", "\x00"])
def test_a_config_that_is_no_table_is_damaged(text):
    with pytest.raises(Stop) as stopped:
        compose.from_text(text, Train)
    assert stopped.value.code == 65
