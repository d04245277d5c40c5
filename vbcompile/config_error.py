"""What every setting of ours raises."""


class ConfigError(ValueError):
    """A mode, option or value that does not exist. The message lists the valid ones."""
