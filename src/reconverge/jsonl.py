"""Files that grow by a line of JSON: metrics.jsonl, record.jsonl, quarantine.jsonl. Imports no torch."""

import json
import math
from pathlib import Path
from typing import Any


def line(values: dict[str, Any]) -> str:
    """With null for a number that is not finite, as fp16 has them: JSON knows no other."""
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in values.items()
    }
    return json.dumps(finite) + "\n"


def lines(path: Path) -> list[dict[str, Any]]:
    """Every line of a file, none if there is no file; a last one that a kill cut short is left out."""
    text = path.read_text().split("\n") if path.exists() else []
    return [json.loads(line) for line in text[:-1]]
