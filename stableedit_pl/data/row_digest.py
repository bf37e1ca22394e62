"""A digest of the rows that are applied, so that a resumed run can tell whether they are still the same."""

import hashlib
import json
from collections.abc import Sequence

from stableedit_pl.data.records import EditRecord


class RowDigest:
    """SHA-256 of the first rows of a stream, continued as more of them are applied."""

    def __init__(self) -> None:
        """Of no rows yet."""
        self._rows = 0
        self._digest = hashlib.sha256()

    def of_first(self, records: Sequence[EditRecord], count: int) -> str:
        """Hex digest of ids, prompts and targets of the first ``count`` records, or how many there are."""
        if count > len(records):
            return f"only {len(records)} rows"
        if count < self._rows:
            self._rows, self._digest = 0, hashlib.sha256()
        for record in records[self._rows : count]:
            self._digest.update(json.dumps([record.id, record.prompt, record.target]).encode())
        self._rows = count
        return self._digest.hexdigest()
