"""The one exception that a command prints as one line: a mistake its user can mend."""


class UserError(ValueError):
    """Something the user gave is wrong. The message names it, says what was found, and what to do."""
