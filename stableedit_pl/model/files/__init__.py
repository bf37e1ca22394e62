"""Files of a base model: what lies in its folder or its hub's snapshot, and the folder that is written with the edits.

Imports ``devices`` and ``errors``.

Read ``base_files`` (which files, and which are refused before they are loaded), ``shards`` (a file of weights),
``edited_folder``, ``weights_digest``.
"""
