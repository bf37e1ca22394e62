"""Files of a run directory: written whole or not at all, read back with their damage named.

Imports ``model`` and ``method``.

Read ``directory`` (names), ``checkpoint_io`` and ``checkpoint_file`` (written, read), ``saved_state`` (what a
checkpoint holds), ``integrity`` (digests), ``ledger`` (``edits.jsonl``), ``results_file``.
"""
