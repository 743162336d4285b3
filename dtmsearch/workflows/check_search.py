"""The verb `validate`: everything that `run` would refuse, found without a replica: the texts are read and cut, the
headers of the weights opened, the space of the search laid out, and the model run over a few tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from dtmsearch.config import SearchFile, texts
from dtmsearch.core.calibration import Calibration
from dtmsearch.core.checkpoint_files import is_gguf
from dtmsearch.core.evaluation import ModelSpec
from dtmsearch.core.holders import source_note
from dtmsearch.core.schemes import check_libraries, parse_scheme
from dtmsearch.core.training_settings import RecoverySettings
from dtmsearch.errors import UserError
from dtmsearch.workflows.build import space_of
from dtmsearch.workflows.text_windows import cut_calibration, text_lines

if TYPE_CHECKING:
    from dtmsearch.model.modules.discovery import Survey
    from dtmsearch.search.space import SearchSpace


def check_search(file: SearchFile) -> list[str]:
    """What is to be said of a search file's texts. Raises `UserError` for what `run` would refuse of the file, its
    texts and its model's folder; of a model that is not on this machine nothing can be told."""
    texts.check_readable(file)
    texts.check_model(file)
    check_libraries(file.search.every_scheme)
    spec = file.model_spec
    lines: list[str] = []
    if _is_here(spec):
        from dtmsearch.model.modules.discovery import survey

        found = survey(spec)
        space = _check_with_model(file, spec, found)
        note = source_note(found.manifest.source, space.parsed)
        lines = [*_lines_of(found), *([] if note is None else [note])]
    else:
        _read_all(file)
    return [*lines, *text_lines(file)]


def model_lines(spec: ModelSpec) -> list[str]:
    """What a model in a folder is to a search, by a dry pass of its code over a few tokens, without weights. Raises
    `UserError` for one that cannot be searched."""
    from dtmsearch.model.modules.discovery import survey

    return _lines_of(survey(spec))


def trial_line(spec: ModelSpec, say: Callable[[str], object]) -> str:
    """How a model on this machine runs over a few tokens, or why it was not run; `say` what is begun. Raises
    `UserError` for one that does not run."""
    from dtmsearch.model.replica.trial import obstacle, try_model

    if not _is_here(spec):
        return "the model was not run: it is not on this machine"
    if why := obstacle(spec):
        return f"the model was not run: {why}"
    say("running the model over a few tokens (--quick leaves this out) ...")
    return f"the model: {try_model(spec).line}"


def _is_here(spec: ModelSpec) -> bool:
    return Path(spec.path).is_dir() or is_gguf(Path(spec.path))


def _lines_of(found: Survey) -> list[str]:
    number = len(found.manifest.components)
    line = f"the model: {number:,} components in {found.manifest.num_layers} layers"
    if found.manifest.source:
        line += f", from {found.manifest.source}, unquantized to {found.manifest.dtype}"
    if not found.untried:
        return [f"{line}; its code ran over a few tokens, without weights"]
    return [f"{line}, told by classes: its code did not run over a few tokens without weights ({found.untried[:300]})"]


def _read_all(file: SearchFile) -> None:
    """Raises `UserError` for a damaged file."""
    for section in (file.prompts, file.validation_prompts, file.calibration_text):
        if section is not None:
            texts.read(file, section)


def _check_with_model(file: SearchFile, spec: ModelSpec, found: Survey) -> SearchSpace:
    from dtmsearch.model.modules.loading import load_tokenizer, tokenizer_folder
    from dtmsearch.model.replica.prompts import Cutter

    space = space_of(file, found.manifest)
    _check_gradients(file, found)
    tokenizer = load_tokenizer(tokenizer_folder(spec), spec)
    if space.needs_calibration:
        cutter = Cutter(tokenizer, spec.path, found.context, found.num_embeddings)
        cut_calibration(file, lambda *arguments: Calibration("", "", cutter.calibration(*arguments)))
    if file.search.recovery is not None:
        _check_recovery(file, file.search.recovery, tokenizer)
    return space


def _check_gradients(file: SearchFile, found: Survey) -> None:
    """Raises `UserError` for widths by gradients of a model of which this machine's GPU holds no more than some layers
    at a time."""
    asked = [name for name in file.search.cut if (width := parse_scheme(name).width) and width.rule == "gradient"]
    if not asked:
        return
    import torch

    from dtmsearch.model.replica.streamed_model import streams

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if torch.cuda.device_count() <= 1 and streams("auto", found.manifest, device):
        raise UserError(
            f"search.cut: {asked[0]} takes a backward pass, and the weights of {found.manifest.model} do not fit this "
            "GPU but pass through it. Take ziplm or wanda, or several GPUs with --gpus-per-replica"
        )


def _check_recovery(file: SearchFile, section: RecoverySettings, tokenizer: object) -> None:
    from dtmsearch.model.training.batches import check_batch, tokenized
    from dtmsearch.model.training.recipe import Recipe

    recipe = Recipe(**vars(section))
    check_batch(recipe, len(tokenized(texts.read_texts(file, section.files), tokenizer, recipe.sequence_tokens)))
