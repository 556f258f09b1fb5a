"""The one family of errors that a user can cause."""


class OnnError(Exception):
    """Base of every error that a user can cause; the message says what to do."""


class CheckpointError(OnnError):
    """The model folder cannot be used as it is."""


class ConfigError(OnnError):
    """A setting is out of range or does not fit the model."""


class DataError(OnnError):
    """The text cannot be used as it is."""


class NonFiniteError(OnnError):
    """A loss or a gradient became NaN or Inf; the last good adapter was kept."""
