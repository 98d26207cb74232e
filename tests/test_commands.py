"""The reconverge command."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from reconverge import commands


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["reconverge", *arguments])
    with pytest.raises(SystemExit) as ended:
        commands.main()
    return ended.value.code, capsys.readouterr()


def test_models_prints_what_is_counted_beside_what_is_published(monkeypatch, capsys):
    code, said = run(monkeypatch, capsys, "models")
    assert code == 0
    lines = said.out.splitlines()
    assert lines[0].split()[0] == "model"
    row = next(line for line in lines if line.startswith("convnext_t "))
    assert row.split()[:9] == ["convnext_t", "28.59", "28.6", "4.46", "4.5", "82.1", "Tables", "1,", "9"]
    assert {"demo,", "in1k,", "ft_in22k_in1k_384,"} <= set(row.split()[9:])
    assert "in1k_iso" in next(line for line in lines if line.startswith("convnext_iso_s"))


def test_the_page_of_models_is_what_the_command_prints(monkeypatch, capsys):
    """Stale? reconverge models --markdown > docs/models.md"""
    code, said = run(monkeypatch, capsys, "models", "--markdown")
    assert code == 0
    assert (ROOT / "docs" / "models.md").read_text() == said.out


def test_wrong_usage_and_help(monkeypatch, capsys):
    assert run(monkeypatch, capsys)[0] == 2
    assert run(monkeypatch, capsys, "modles")[0] == 2
    code, said = run(monkeypatch, capsys, "--help")
    assert code == 0
    assert "models" in said.out


def test_the_command_is_installed_and_helps_without_torch():
    script = Path(sys.executable).parent / "reconverge"
    assert subprocess.run([script, "--help"], capture_output=True, text=True, check=True).stdout.startswith("usage: reconverge")
    code = "import sys; from reconverge import commands; sys.argv = ['reconverge', '--help']\ntry: commands.main()\nfinally: assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
