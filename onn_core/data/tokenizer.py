"""A model folder's tokenizer: no code of the folder is run, and what is wrong with it is said."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from onn_core.config import expand_home
from onn_core.errors import ConfigError, DataError, OnnError
from onn_core.weights.gguf import gguf_files, gguf_tokenizer

NO_TOKENIZER = "no tokenizer can be loaded: copy tokenizer.json and its like from the original"
# A long reason, such as a whole tokenizer.json in a message, is cut.
MAX_REASON = 300


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Whatever a damaged tokenizer or a template raises inside becomes one DataError.

    That is anything: `tokenizers` raises plain Exception, and when it panics a BaseException.
    """
    try:
        yield
    except (OnnError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        reason = f"{type(error).__name__}: {error}"[:MAX_REASON]
        raise DataError(f"{what} ({reason}).") from error


def load_tokenizer(model_dir: str | os.PathLike) -> Any:
    """The tokenizer in a model's folder, with a token to pad with; DataError if none is there.

    Of a GGUF model the one in the file. Code that comes with the folder is never run, and nobody
    is asked whether to run it.
    """
    files = gguf_files(Path(expand_home(model_dir)))
    with explained(f"{model_dir}: {NO_TOKENIZER}"):
        if files:
            tokenizer = gguf_tokenizer(files[0])
        else:
            tokenizer = AutoTokenizer.from_pretrained(
                model_dir, local_files_only=True, trust_remote_code=False
            )
        empty = len(tokenizer) <= len(tokenizer.all_special_ids)  # made up from config.json alone
        if not empty:
            tokenizer("text")  # one that cannot do this is no tokenizer
            if tokenizer.pad_token_id is None:  # the attention mask tells padding from text
                tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if empty:
        raise DataError(f"{model_dir}: {NO_TOKENIZER}.")
    return tokenizer


def read_template(chat_template: str | os.PathLike | None) -> str | None:
    """The text of a chat template, given as text or as the path of a .jinja file."""
    if chat_template is None or "{" in str(chat_template):
        return chat_template
    try:
        return Path(expand_home(chat_template)).read_text(encoding="utf-8")
    except (OSError, ValueError, TypeError) as error:
        raise DataError(
            f"chat_template {chat_template!r} is no template and cannot be read ({error}): give "
            "the text of a template or the path of a .jinja file."
        ) from error


def require_ids_fit(tokenizer: Any, max_id: int, n_rows: int) -> None:
    """DataError if the largest token id of the data has no row in an embedding of `n_rows`."""
    if max_id >= n_rows:
        token = tokenizer.convert_ids_to_tokens(max_id)
        raise DataError(
            f"the token {token!r} has id {max_id}, but the model's embedding has {n_rows} rows: "
            "use the tokenizer that belongs to the model, or resize the model's embedding first."
        )


def require_context(model_config: Any, n_tokens: int, what: str) -> None:
    """ConfigError, naming `what`, if a model cannot take `n_tokens` in a row."""
    context = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if context is not None and n_tokens > context:
        raise ConfigError(
            f"{what} of {n_tokens} tokens is more than the model's context of {context}: lower it."
        )
