"""What of a checkpoint decides values beside its weights and configuration: its tokenizer's files, its Python code."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

from dtmsearch.core.identity import file_digest, identity
from dtmsearch.model.modules.compat import is_custom_code

_TOKENIZER_FILES = {
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "vocab.json", "vocab.txt", "merges.txt"),
}
# What of tokenizer_config.json changes no token of a text; what a template writes stands in the prompts' own tokens.
_CONFIG_NOISE = {"chat_template", "model_max_length", "name_or_path", "transformers_version"}


def tokenizer_fingerprint(folder: Path, tokenizer: Any) -> str:
    """Identity of the files that a tokenizer was loaded from, its Python code included. The chat template is left out:
    what it writes of a conversation are the prompts' own tokens."""
    names = _TOKENIZER_FILES | set(tokenizer.vocab_files_names.values())
    files = {name: _digest(folder / name) for name in sorted(names) if (folder / name).is_file()}
    return identity({"files": files, "code": custom_code(folder, type(tokenizer))})


def _digest(path: Path) -> str:
    if path.name != "tokenizer_config.json":
        return file_digest(path)
    config = json.loads(path.read_text(encoding="utf-8"))
    return identity({key: value for key, value in config.items() if key not in _CONFIG_NOISE})


def custom_code(folder: Path, kind: type) -> dict[str, str]:
    """Name -> digest of the Python files that come with a checkpoint, and of the one that holds class `kind`; empty
    where that is one of transformers' own.

    All files of the folder count, for any may be imported by the others.
    """
    if not is_custom_code(kind):
        return {}
    digests = {str(path.relative_to(folder)): file_digest(path) for path in sorted(folder.rglob("*.py"))}
    return digests | {kind.__qualname__: file_digest(Path(inspect.getfile(kind)))}
