"""Writing files so that a reader never meets half of one. What is written is decided elsewhere."""

import json
import os
from pathlib import Path
from typing import Any


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a temporary file beside `path` and renames it, so that `path` always holds either the old or the new content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(temporary, path)


def write_json(path: Path, data: Any) -> None:
    """Writes strict JSON (no NaN, which only some readers accept) with two spaces of indentation, atomically."""
    write_atomically(path, json.dumps(data, indent=2, allow_nan=False) + "\n")
