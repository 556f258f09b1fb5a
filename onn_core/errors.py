"""The one family of errors that a user can cause."""


class OnnError(Exception):
    """Base of every error that a user can cause; the message says what to do."""


class ModelFolderError(OnnError):
    """The model folder cannot be used as it is."""


class ConfigError(OnnError):
    """A setting is out of range or does not fit the model."""


class TooManyRunsError(ConfigError):
    """More runs than the memory budget has room for in one pass."""


class DataError(OnnError):
    """The text cannot be used as it is."""


class NonFiniteError(OnnError):
    """A loss or a gradient became NaN or Inf; the last good adapter was saved."""


def frozen(what: str) -> ConfigError:
    """Someone wants to train, change or copy weights that are streamed."""
    return ConfigError(
        f"the {what} of a streamed model cannot change: they stay on disk, and adapters "
        "(target_modules) are trained, not modules_to_save or the weights themselves. Merge an "
        "adapter with onn_core.merge, and begin one with init_lora_weights=True."
    )


def sharded(by: str) -> ConfigError:
    """Something wants to copy or to shard weights that are streamed."""
    return ConfigError(
        f"{by} cannot hold the weights of a streamed model, which stay on disk: start one process "
        "a GPU with torchrun or accelerate launch --multi_gpu, by which adapters alone are shared."
    )
