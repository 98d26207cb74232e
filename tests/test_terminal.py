"""What a person reads while a run goes on: the live bar, the panel, tables, the line of an evaluation."""

import io

import pytest

from reconverge.base import terminal
from reconverge.base.terminal import counted, fitted
from reconverge.run.log import evaluation_line, percents


@pytest.fixture
def written(monkeypatch):
    """written(columns): what is then printed, on a terminal of so many columns, or for None in a pipe."""

    def written(columns):
        file = io.StringIO()
        console = terminal.Console(
            file=file, force_terminal=columns is not None, width=columns, color_system=None, soft_wrap=True
        )
        monkeypatch.setattr(terminal, "console", console)
        return file

    return written


def test_a_number_agrees_with_its_noun():
    assert [counted(number, "thread") for number in (0, 1, 2)] == ["0 threads", "1 thread", "2 threads"]
    assert counted(1, "microbatch", "microbatches") == "1 microbatch"
    assert counted(8, "microbatch", "microbatches") == "8 microbatches"


def test_what_does_not_fit_is_dropped_by_its_rank():
    parts = [
        ("step 3/9", 0),
        ("loss 1.0", 1),
        ("lr 0.1", 4),
        ("9 images/s", 3),
        ("wait 1%", 5),
        ("left 2 s", 2),
    ]
    whole = "step 3/9  loss 1.0  lr 0.1  9 images/s  wait 1%  left 2 s"
    assert fitted(parts, len(whole)) == whole
    assert fitted(parts, len(whole) - 1) == "step 3/9  loss 1.0  lr 0.1  9 images/s  left 2 s"
    assert fitted(parts, 38) == "step 3/9  loss 1.0  left 2 s"
    assert fitted(parts, 10) == "step 3/9"
    assert fitted(parts, 4) == "step"


@pytest.mark.parametrize(
    ("columns", "shown", "dropped"),
    [
        (200, ["loss 2.5000", "lr 0.00123", "1234 images/s", "data-wait 12%", "left "], []),
        (80, ["loss 2.5000", "1234 images/s", "left "], ["data-wait"]),
        (60, ["loss 2.5000", "left "], ["data-wait", "lr "]),
    ],
)
def test_the_bar_is_whole_on_a_narrow_terminal_and_moves_with_each_step(written, columns, shown, dropped):
    file = written(columns)
    progress = terminal.Progress(0, 93600)
    progress.update(4990, 2.5, 0.001234, 1234.0, 0.12)
    progress._bar.refresh()
    progress.step_done(4991)
    progress._bar.refresh()
    progress.close()
    lines = [line for line in file.getvalue().replace("\r", "\n").splitlines() if "step 4991/93600" in line]
    assert lines, "the step is shown though no interval has ended"
    for part in shown:
        assert part in lines[-1]
    assert not [part for part in dropped if part in lines[-1]]
    assert max(len(line.partition("\x1b")[0]) for line in lines) <= columns


def test_a_pipe_gets_a_line_an_interval_and_nothing_between(written):
    file = written(None)
    progress = terminal.Progress(0, 100)
    progress.step_done(9)
    progress.update(10, 2.5, 0.001, 100.0, 0.0)
    progress.step_done(11)
    progress.close()
    (line,) = file.getvalue().splitlines()
    assert line.startswith("step 10/100  loss 2.5000  lr 0.001  100 images/s  data-wait 0%  left ")


def test_the_texts_of_the_start_panel_are_aligned_in_a_pipe(written):
    file = written(None)
    terminal.panel("a run", {"model": "m", "learning rate": "r", "EMA": "e"})
    assert file.getvalue().splitlines() == ["model         m", "learning rate r", "EMA           e"]


def test_a_table_leaves_out_columns_without_any_entry():
    rows = [["a", "0", "80.00", "-"], ["b", "0", "-", "–"]]
    header, *lines = terminal.table(["run", "exit", "raw top-1", "EMA top-1"], rows).splitlines()
    assert header.split() == ["run", "exit", "raw", "top-1"]
    assert [line.split() for line in lines] == [["a", "0", "80.00"], ["b", "0", "-"]]
    assert terminal.table(["run", "exit"], []).split() == ["run", "exit"]


def test_the_line_of_an_evaluation_says_what_the_best_is_if_it_is_another():
    found = {9: {"raw": 92.0, "ema": 94.1}}
    assert evaluation_line("top-1", found, 9, 1) == "epoch 9  top-1 94.10 % EMA, 92.00 % raw  best 94.10 %"
    found[25] = {"raw": 92.1, "ema": 93.75}
    assert evaluation_line("top-1", found, 25, 2) == (
        "epoch 12.5  top-1 93.75 % EMA, 92.10 % raw  best 94.10 % (EMA, epoch 4.5)"
    )
    found[26] = {"raw": 95.0, "ema": 94.1}
    assert evaluation_line("top-1", found, 26, 2).endswith("best 95.00 %")
    found[27] = {"raw": 95.0, "ema": 95.0}  # as good as before: the first one counts
    assert evaluation_line("top-1", found, 27, 2).endswith("best 95.00 % (raw, epoch 13)")


def test_without_ema_there_is_one_number_without_a_name():
    found = {3: {"raw": 50.0}, 4: {"raw": 40.0}}
    assert evaluation_line("top-1", found, 4, 1) == "epoch 4  top-1 40.00 %  best 50.00 % (epoch 3)"
    assert percents({"raw": 40.0}) == "40.00 %"
