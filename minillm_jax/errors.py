"""The one thing that all errors meant for people have in common."""


class UserError(Exception):
    """An error whose message is for the person at the terminal: what was wrong, where, and what to do."""
