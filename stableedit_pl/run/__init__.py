"""One run: its curves, scores, signals and files.

Imports ``data``, ``model``, ``devices``, ``method``. What lies in a run directory is in ``files``.

Read ``report`` (what a turn did), ``curves``, ``results`` (``results.json``), ``scored_model`` (validate, test,
predict), then ``stop_signals`` and ``guards``.
"""
