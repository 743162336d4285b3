"""The formats that a plan can be exported to, by name."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dtmsearch.core import plugins
from dtmsearch.core.plan_file import plan_to_json
from dtmsearch.errors import UserError
from dtmsearch.export.formats.as_source import write_as_source
from dtmsearch.export.formats.bitsandbytes import write_modules
from dtmsearch.export.formats.compressed_tensors import write_packed
from dtmsearch.export.formats.dense import write_dense
from dtmsearch.export.formats.evopress import write_evopress
from dtmsearch.export.formats.gguf import write_recipe
from dtmsearch.export.formats.gguf_file import check_installed, write_gguf
from dtmsearch.export.formats.modelopt import write_modelopt
from dtmsearch.export.formats.recipes import RECIPES
from dtmsearch.export.job import Job, Written

# What the format `json` writes.
PLAN_FILE = "plan.json"


@dataclass(frozen=True)
class Format:
    """`write` puts a job into a folder that exists; `loads` says who reads it. `is_model`: whether it is a checkpoint
    that `AutoModelForCausalLM.from_pretrained` loads, and so can be measured; `by_llama_cpp`: whether it is a file that
    llama.cpp measures. `library` is a module of the extra `export` that it cannot be written without; `needs` raises
    `LibraryMissing` where something else is missing."""

    name: str
    write: Callable[[Job, Path], Written]
    loads: str
    is_model: bool
    library: str = ""
    by_llama_cpp: bool = False
    needs: Callable[[], None] = lambda: None

    @property
    def is_checked(self) -> bool:
        """Whether what is written can be measured."""
        return self.is_model or self.by_llama_cpp

    def check_library(self) -> None:
        """Raises `UserError` where something is not installed that the format is written by."""
        if self.library and importlib.util.find_spec(self.library) is None:
            raise UserError(f"{self.name} needs an extra: pip install 'dtmsearch[export]'")
        self.needs()


def write_json(job: Job, folder: Path) -> Written:
    """Write the plan file alone."""
    path = folder / PLAN_FILE
    path.write_text(plan_to_json(job.plan, job.manifest, job.weights_id), encoding="utf-8")
    return Written((path,))


FORMATS: dict[str, Format] = {}


def register(form: Format) -> Format:
    """Add a format in this process. Installed packages do so by an entry point of the group `dtmsearch.formats` under
    the format's name. Raises `UserError` for a name that is taken."""
    if form.name in FORMATS:
        raise UserError(f"there is an export format {form.name!r} already")
    FORMATS[form.name] = form
    return form


def find_format(name: str) -> Format:
    """A format of ours, or of an installed package. Raises `UserError` for any other name."""
    if name not in FORMATS:
        for plugin in plugins.plugins(plugins.FORMATS):
            if not isinstance(plugin.added, Format):
                raise UserError(f"{plugin.name} of {plugin.version} is {type(plugin.added).__name__}, wanted a Format")
            if plugin.added.name not in FORMATS:
                register(plugin.added)
    if name not in FORMATS:
        raise UserError(f"there is no export format {name!r}; there are {', '.join(FORMATS)}")
    return FORMATS[name]


for _format in (
    Format("json", write_json, "`dtmsearch evaluate --plan` and `dtmsearch export`", is_model=False),
    Format("dense", write_dense, "anything that loads a Hugging Face checkpoint", is_model=True),
    Format("bitsandbytes", write_modules, "transformers with bitsandbytes", is_model=True),
    Format(
        *("compressed-tensors", write_packed, "transformers with compressed-tensors, and vLLM"),
        is_model=True,
        library="compressed_tensors",
    ),
    Format("modelopt", write_modelopt, "TensorRT-LLM, and vLLM on NVIDIA GPUs", is_model=False),
    Format("source", write_as_source, "what loads the base model", is_model=True),
    Format(
        *("gguf", write_gguf, "llama.cpp, and what is built on it"),
        is_model=False,
        library="gguf",
        by_llama_cpp=True,
        needs=check_installed,
    ),
    Format("gguf-recipe", write_recipe, "llama.cpp's quantizer", is_model=False, library="gguf"),
    *(Format(name, recipe.write, f"{name}, which quantizes by it", is_model=False) for name, recipe in RECIPES.items()),
    Format("evopress", write_evopress, "EvoPress's search", is_model=False),
):
    register(_format)
