"""init= must help: weights that were trained on other labels and at another resolution.

benchmarks/transfer.py with one parent and fewer steps.
"""

import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.slow
def test_a_start_from_other_labels_beats_a_start_from_scratch_by_more_than_the_spread(forking):
    command = [
        sys.executable,
        str(ROOT / "benchmarks/transfer.py"),
        "--parents=1",
        "--pretrain-epochs=6",
        "--epochs=5",
        "threads=1",
        "workers=0",
    ]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "the gain is larger than the spread" in ended.stdout
