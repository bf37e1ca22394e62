"""The paper's mathematics: one turn's rows in, one update out. torch, and nothing else.

Imports ``errors`` alone. Nothing here knows a language model, a file or a second process.

Read in the order of a turn: ``moments`` and ``statistics``, ``settings``, ``normalization`` with ``inverse_root``,
``ridge``, ``problem`` (a scope's sites solved), ``planning`` (a turn drafted and checked), ``workspace`` (written).
"""
