"""The documents of a corpus: which records are skipped as bad, and which are held out of training.

A document that is a whole file is held out by a hash of its name, so that editing it does not move it. A record of a larger file is held
out by a hash of its text: equal texts lie on the same side, and neither reordering nor adding records or files moves any.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from mhc_jax.data.corpus import Corpus
from mhc_jax.data.formats import EMPTY, BadRecord
from mhc_jax.errors import UserError


@dataclass(frozen=True)
class Document:
    """One text, and a number in [0, 1) that looks random but depends on its name or content alone."""

    text: str
    rank: float


@dataclass(frozen=True)
class Survey:
    """What a first reading of a corpus found."""

    documents: int
    skipped: dict[str, int]  # records that were left out, by what is wrong with them; empty ones too
    first_bad: str  # place and defect of the first one that counts as bad; empty where there is none
    border: float  # documents of a lower rank are held out


def bad_records(skipped: Mapping[str, int]) -> int:
    """How many of the records that were left out count as bad: an empty document does not."""
    return sum(count for kind, count in skipped.items() if kind != EMPTY)


class Documents:
    """The documents of a corpus in their order, read anew for every pass.

    Args:
      corpus: what to read.
      text_field: field or column that holds the document, where there are several.
      heldout_share: share of the documents to hold out.
      max_bad_records: so many bad records are skipped.
    """

    def __init__(self, corpus: Corpus, *, text_field: str, heldout_share: float, max_bad_records: int):
        self.corpus = corpus
        self._text_field = text_field
        self._heldout_share = heldout_share
        self._limit = max_bad_records

    @cached_property
    def survey(self) -> Survey:
        """Reads everything once.

        Raises:
          UserError: there are more bad records than are tolerated, or fewer than two different documents.
        """
        skipped: Counter[str] = Counter()
        first_bad = ""
        documents, lowest, highest = 0, math.inf, -math.inf
        for place, item in self._read():
            if isinstance(item, Document):
                documents += 1
                lowest, highest = min(lowest, item.rank), max(highest, item.rank)
                continue
            skipped[item.kind] += item.count
            if item.kind == EMPTY:
                continue
            what = f"{place}{f', record {item.number}' if item.number else ''} {item.detail}"
            first_bad = first_bad or what
            if bad_records(skipped) > self._limit:
                raise UserError(
                    f"data.source {self.corpus.source!r} has more bad records than data.max_bad_records = {self._limit} allows. "
                    f"{f'The first: {first_bad}. ' if first_bad != what else ''}The one too many: {what}. "
                    "Mend or leave out such files, or raise data.max_bad_records to skip more"
                )
        if not documents:
            why = f"the first: {first_bad}" if first_bad else "all are empty"
            raise UserError(f"data.source {self.corpus.source!r} has no document that can be read ({why})")
        if lowest == highest:
            what = "document" if documents == 1 else "equal documents"
            raise UserError(
                f"data.source {self.corpus.source!r} has only {documents} {what}, but at least 2 different ones are needed, one to train "
                "on and one to hold out; widen data.source or cut the text into several files (`split -C 64k FILE`)"
            )
        # Where the share leaves one side of a tiny corpus empty, the document nearest to the border goes there.
        border = min(max(self._heldout_share, math.nextafter(lowest, 1)), highest)
        return Survey(documents, dict(sorted(skipped.items())), first_bad, border)

    def __iter__(self) -> Iterator[tuple[str, bool]]:
        """Text, and whether it is held out."""
        border = self.survey.border
        for _, item in self._read():
            if isinstance(item, Document):
                yield item.text, item.rank < border

    def training(self) -> Iterator[str]:
        """The texts to train on."""
        return (text for text, held in self if not held)

    def _read(self) -> Iterator[tuple[str, Document | BadRecord]]:
        """Documents and bad records, each with the place of its file."""
        for part in self.corpus.parts:
            for record in part.records(self._text_field):
                if isinstance(record, BadRecord):
                    yield part.place, record
                else:
                    yield part.place, Document(record.text, _rank(part.name if record.number == 0 else f"\0{record.text}"))


def _rank(identity: str) -> float:
    return int.from_bytes(hashlib.sha256(f"heldout\0{identity}".encode()).digest()[:6], "big") / 2**48
