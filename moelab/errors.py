"""Errors that are the user's to mend: the command line prints their text alone and exits with 2."""


class UserError(Exception):
    """Wrong input. The message is ready to print: what came, and what was wanted."""


class ConfigError(UserError):
    """Something is wrong with a config, its file or an override; one line, or one line per problem."""
