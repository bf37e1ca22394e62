"""The command ``stableedit``: arguments in, text and exit codes out.

Imports everything below it; nothing imports it. Modules that ``--help`` needs (``command``, ``front_page``, ``screen``)
load neither torch nor Lightning.

Read ``command`` (which verb, what an error means), ``edit_cli`` (fit, validate, test, predict), ``plain_verbs`` with
the file of each other verb, then ``parse_errors``, ``settings_files`` and ``named_callbacks``.
"""
