"""Errors that users can mend; their messages say all there is to say, so the command line prints no traceback."""


class SettingError(ValueError):
    """A setting that is out of range or contradicts another; the message names it and what it may be."""
