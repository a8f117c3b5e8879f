"""Reading and writing files so that a reader never meets half of one. What is in them is decided elsewhere."""

import json
import os
from pathlib import Path
from typing import Any

from mhc_jax.errors import UserError


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a temporary file beside `path` and renames it, so that `path` always holds either the old or the new content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(temporary, path)


def write_json(path: Path, data: Any) -> None:
    """Writes strict JSON (no NaN, which only some readers accept) with two spaces of indentation, atomically."""
    write_atomically(path, json.dumps(data, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
      UserError: the file is missing or half-written; the message names it.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing; delete its folder to run it again") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is half-written ({error}); delete its folder to run it again") from error
