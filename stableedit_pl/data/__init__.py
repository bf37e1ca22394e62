"""Rows of a file to turns of a stream.

Imports ``model`` (for token ids) and ``method``. ``records`` and ``readers`` need neither torch nor a model.

Read ``records`` (one edit), ``readers`` (files to records), ``record_encoding`` (records to token ids), ``turns``
(which rows form which turn), ``loaders``, then ``stream``, the data module.
"""
