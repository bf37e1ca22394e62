"""Settings found by short streams on rows that will not be edited.

May see: editor, run, data, model, devices, method. Read: candidates (what is tried), bench (how one is tried), halving
(which go on, within the time there is), outcome (what was found, as files), tuner (all of it in one call).
"""
