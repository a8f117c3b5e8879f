"""Hugging Face data sets by name, through the optional package `datasets`. No code of a data set is ever executed.

    hf:NAME[:CONFIG][@SPLIT]    hf:roneneldan/TinyStories    hf:wikimedia/wikipedia:20231101.sw@train    hf:/folder/of/files@train

The library downloads a data set once, into its own cache on disk ($HF_HOME), from where it is read in its order a piece at a time. A folder
is either one that `save_to_disk` wrote or one of files that the library reads.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mhc_jax.data.formats import ROWS, Records, checked, optional
from mhc_jax.errors import UserError

PREFIX = "hf:"


@dataclass(frozen=True)
class HuggingFaceSplit:
    """One split of a data set, as a part of a corpus."""

    name: str
    digest: str
    dataset: Any  # datasets.Dataset, on disk

    @property
    def place(self) -> str:
        return self.name

    def records(self, text_field: str) -> Records:
        """Raises UserError where there is no such column."""
        if text_field not in self.dataset.column_names:
            raise UserError(
                f"{self.name} has no column {text_field!r}; set data.text_field to one of {', '.join(self.dataset.column_names)}"
            )
        number = 0
        for rows in self.dataset.select_columns([text_field]).iter(batch_size=ROWS):
            for value in rows[text_field]:
                number += 1
                yield checked(number, value, f"the text of column {text_field!r}")


def parse(source: str) -> tuple[str, str | None, str]:
    """Name, config and split of "hf:NAME[:CONFIG][@SPLIT]"; the split is "train" unless given.

    Raises:
      UserError: the name is missing.
    """
    rest, _, split = source.removeprefix(PREFIX).partition("@")
    name, _, config = rest.partition(":")
    if not name:
        raise UserError(f"data.source {source!r} names no data set; write hf:NAME, hf:NAME:CONFIG or hf:NAME:CONFIG@SPLIT")
    return name, config or None, split or "train"


def load(source: str, digest_of: Callable[[Path], str]) -> HuggingFaceSplit:
    """Downloads a data set, or finds it in the library's cache.

    Args:
      source: as described above.
      digest_of: gives the digest of a file.

    Raises:
      UserError: the package or the network is missing, or there is no such data set, config or split.
    """
    name, config, split = parse(source)
    try:
        import datasets
    except ImportError as error:
        raise optional("datasets", f"data.source {source!r}") from error
    quiet = not datasets.utils.logging.is_progress_bar_enabled()
    datasets.utils.logging.disable_progress_bar()
    try:
        dataset = _open(datasets, name, config, split)
    except OSError as error:  # also what the library raises without a network, and for a name that does not exist
        raise UserError(
            f"data.source {source!r} cannot be loaded ({_first_line(error)}); check the name and the network, or download it beforehand "
            "and set HF_HUB_OFFLINE=1"
        ) from error
    except (ValueError, KeyError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        # An unknown config or split; a data set that is a program, which the library refuses to run; files that it cannot read.
        raise UserError(f"data.source {source!r} cannot be loaded ({_first_line(error)}); check its config and split") from error
    finally:
        if not quiet:
            datasets.utils.logging.enable_progress_bar()
    digest = hashlib.sha256(f"{config}\0{split}\0".encode())
    for file in dataset.cache_files:
        digest.update(f"{digest_of(Path(file['filename']))}\n".encode())
    return HuggingFaceSplit(source, digest.hexdigest(), dataset)


def _open(datasets: Any, name: str, config: str | None, split: str) -> Any:
    folder = Path(name).expanduser()
    if (folder / "state.json").exists():
        return datasets.load_from_disk(str(folder), keep_in_memory=False)
    if (folder / "dataset_dict.json").exists():
        return datasets.load_from_disk(str(folder), keep_in_memory=False)[split]
    # On disk, not in memory: the corpus may be larger, and its files identify the content.
    return datasets.load_dataset(str(folder) if folder.is_dir() else name, config, split=split, keep_in_memory=False)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
