"""The language model: loaded, its sites found, read during a pass, asked, and written to.

Imports ``devices`` and ``method``.

Read ``loading`` and ``sites``, ``encoding`` (text to answer tokens), ``capture`` (keys and value gradients) with
``partial_forward``, ``closed_form`` (the optimizer: plan, commit), ``asking`` and ``scoring``; ``editable_model`` holds
them together.
"""
