"""The search file and its readers: what a search is.

Where a search runs (address, replicas, GPUs) is not in here and enters no identity.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import PrivateAttr, TypeAdapter, ValidationError, model_validator

from dtmsearch.config.reading import MOST_BYTES, explain, flatten, override_key, read_yaml, read_yaml_file
from dtmsearch.config.recorded_text import section_of
from dtmsearch.config.search_section import SearchSection, leave_out_unused
from dtmsearch.config.sections import (
    CalibrationSection,
    ModelSection,
    PromptsSection,
    RunName,
    Section,
    Seed,
    ValidationSection,
)
from dtmsearch.config.stop_section import TimesSection
from dtmsearch.core.calibration import Routing, Through
from dtmsearch.core.checkpoint_files import is_gguf
from dtmsearch.core.evaluation import ModelSpec
from dtmsearch.core.identity import identity_of_text
from dtmsearch.core.records import RunRecord
from dtmsearch.core.times import Times
from dtmsearch.core.training_settings import RecoverySettings
from dtmsearch.core.user_files import read_text
from dtmsearch.errors import UserError

# Of a value where two files differ.
_LONGEST_VALUE = 120


def _source_of(section: ValidationSection | CalibrationSection) -> dict[str, Any]:
    """Where a section's own text is, as keys of `prompts`; none where it has none of its own."""
    found: dict[str, Any] = {}
    if section.files or section.dataset is not None or section.mix:
        found = {"files": section.files, "dataset": section.dataset, "mix": section.mix}
        found |= {"chat": False} if section.mix else {}
    return found | ({} if section.chat is None or section.mix else {"chat": section.chat})


class SearchFile(Section):
    """A search file: what a search is."""

    run: RunName
    """The run's name inside the store."""
    model: ModelSection
    """The model that is searched, and its numeric mode."""
    prompts: PromptsSection
    """Where candidates are measured."""
    validation: ValidationSection | None = None
    """Held-out prompts, on which the plan is measured at the end. A field that is not set is as in prompts."""
    calibration: CalibrationSection | None = None
    """Text by which GPTQ, Wanda and SparseGPT are calibrated; without it the prompts' own human text."""
    search: SearchSection
    """How plans are chosen, from what, and when the search ends."""
    seed: Seed = 0
    """Draws all that the search draws."""

    # The folder that relative paths start from: part of where the file lies, not of what the search is.
    _folder: Path = PrivateAttr(default_factory=Path)

    @model_validator(mode="after")
    def _fdt_within_the_continuation(self) -> SearchFile:
        wanted, most = self.search.stop.min_fdt, self.prompts.continuation_tokens
        if wanted is not None and wanted >= most:
            raise ValueError(
                f"search.stop.min_fdt is {wanted:g}, but an FDT is at most prompts.continuation_tokens, {most}, which "
                "nothing but the unquantized model is shown to keep: ask for less, or for longer continuations"
            )
        return self

    @property
    def folder(self) -> Path:
        """Where relative paths start."""
        return self._folder

    @property
    def validation_prompts(self) -> PromptsSection | None:
        """The held-out prompts, unset fields filled from `prompts`; None when the file has no validation."""
        if self.validation is None:
            return None
        # Not by `exclude_unset`: a file that was written out by `to_yaml` sets every key, many of them to nothing.
        own = {key: value for key, value in self.validation.model_dump().items() if value not in (None, ())}
        values = self.prompts.model_dump() | own
        return PromptsSection.model_validate(values | _source_of(self.validation))

    @property
    def min_fdt_prompts(self) -> PromptsSection | None:
        """The prompts on which `min_fdt` is shown to be kept; None where the file asks for none."""
        stop = self.search.stop
        if stop.min_fdt is None:
            return None
        return self.prompts.model_copy(update={"count": stop.min_fdt_prompts or max(self.prompts.count, 8)})

    @property
    def calibration_text(self) -> PromptsSection:
        """Where calibration text comes from: rows of `prompt_tokens + continuation_tokens` tokens."""
        section = self.calibration or CalibrationSection()
        own = {key: getattr(section, key) for key in ("count", "seed") if getattr(section, key) is not None}
        if section.tokens is not None:
            own |= {"prompt_tokens": section.tokens - 1, "continuation_tokens": 1}
        own |= _source_of(section)
        return PromptsSection.model_validate(self.prompts.model_dump() | own)

    @property
    def calibration_through(self) -> Through:
        """What calibration text has passed where a matrix is solved for."""
        return (self.calibration or CalibrationSection()).through

    @property
    def calibration_experts(self) -> Routing:
        """The tokens by which experts are calibrated."""
        return (self.calibration or CalibrationSection()).experts

    def resolve(self, path: str) -> Path:
        """A path as the file means it: from the file's own folder or, where nothing is there, the current one."""
        beside = self._folder / Path(path).expanduser()
        return beside if beside.exists() else Path(path).expanduser()

    @property
    def model_spec(self) -> ModelSpec:
        """What replicas load. A path that names no folder here is left as it stands: a hub id."""
        folder = self.resolve(self.model.path)
        path = str(folder.resolve()) if folder.is_dir() or is_gguf(folder) else self.model.path
        section = self.model
        # Blocks are dropped of layers as they were loaded.
        compiled = "never" if self.search.shapes_blocks and section.compile == "auto" else section.compile
        options = (
            *(section.dtype, section.attention, section.trust_remote_code, compiled),
            section.scale_dtype,
            *((section.kv_cache.context, section.kv_cache.batch) if section.kv_cache else ()),
        )
        return replace(ModelSpec(path, section.revision, *options), decoding=self.search.decoding.decoding)

    def to_yaml(self) -> str:
        """The file as YAML with every default written out, so that two files that mean the same read the same."""
        content = self.model_dump(mode="json")
        leave_out_unused(content["search"])
        return yaml.safe_dump(content, sort_keys=False)


def load(path: str | Path, overrides: tuple[str, ...] = (), beside: Collection[str] = ()) -> SearchFile:
    """Read a search file and apply overrides such as `search.width=4`. Raises `UserError` for a user's mistake."""
    path = Path(path)
    return parse(read_text(path, "search file", MOST_BYTES), str(path), path.absolute().parent, overrides, beside)


def parse(
    text: str,
    source: str,
    folder: Path,
    overrides: tuple[str, ...] = (),
    beside: Collection[str] | None = (),
) -> SearchFile:
    """A search file from its text; `source` names it in errors, `folder` is where its relative paths start. Keys that
    only strategies `beside` its own use are left out, where they are an error otherwise; None: of any strategy."""
    return from_mapping(read_yaml(text, source), source, folder, overrides, beside)


def recorded(record: RunRecord) -> SearchFile:
    """The search file that a run was started from. An older dtmsearch wrote out every strategy's keys, and let keys
    stand that its own did not use; one that knew no `experts` tied none."""
    source = f"the search file of run {record.run}"
    content = read_yaml(record.config, source, quick=True)
    if isinstance(search := content.get("search"), dict):
        search.setdefault("experts", "expert")
    return from_mapping(content, source, Path(record.config_folder), beside=None)


def from_mapping(
    content: Mapping[str, Any],
    source: str,
    folder: Path,
    overrides: tuple[str, ...] = (),
    beside: Collection[str] | None = (),
) -> SearchFile:
    """A search file from its keys and values; otherwise as `parse`."""
    values = copy.deepcopy(dict(content))
    for override in overrides:
        override_key(values, override)
    if isinstance(search := values.get("search"), dict):
        leave_out_unused(search, beside)
        if isinstance(search.get("times"), str):
            search["times"] = _times_in(search["times"], folder)
    try:
        file = SearchFile.model_validate(values)
    except ValidationError as error:
        raise UserError("\n".join(f"{source}: {line}" for line in explain(error, SearchFile))) from None
    file._folder = folder
    return file


def _times_in(path: str, folder: Path) -> dict[str, Any]:
    """What a table of times holds, by its path from the search file's folder or the current one."""
    beside = folder / Path(path).expanduser()
    return read_yaml_file(beside if beside.exists() else Path(path).expanduser(), "table of times")


def recovery_of(file: SearchFile, overrides: Sequence[str]) -> RecoverySettings:
    """How to train a model of a search file: as its `search.recovery` says, with overrides such as `lr=0.0003`."""
    content: dict[str, Any] = {} if file.search.recovery is None else asdict(file.search.recovery)
    for override in overrides:
        override_key(content, override)
    if not content.get("files"):
        raise UserError("recover needs a training text: --set 'files=[train.txt]'")
    try:
        return TypeAdapter(RecoverySettings).validate_python(content)
    except ValidationError as error:
        raise UserError("\n".join(f"recovery: {line}" for line in explain(error, RecoverySettings))) from None


def difference(old: str, new: str) -> list[str]:
    """What changed between two search files' YAML texts: `key: old -> new`, one line a key."""
    if old == new:
        return []
    before, after = flatten(yaml.safe_load(old)), flatten(yaml.safe_load(new))
    return [
        f"{key}: {_in_short(before.get(key, 'unset'))} -> {_in_short(after.get(key, 'unset'))}"
        for key in dict.fromkeys([*before, *after])
        if before.get(key, "unset") != after.get(key, "unset")
    ]


def _in_short(value: Any) -> str:
    """A value as text; of a long one, such as a table of times, its beginning and its digest, by which two that begin
    alike are told apart."""
    text = str(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}... ({identity_of_text(text)[:8]})"


def json_schema() -> str:
    """The JSON schema of a search file, for editors that complete and check YAML."""
    schema = SearchFile.model_json_schema()
    return json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}, indent=2) + "\n"


def times_of(text: str) -> Times | None:
    """The table of times of a search file's YAML text; None where it has none."""
    found = section_of(text, "search").get("times")
    try:
        return None if found is None else TimesSection.model_validate(found).table
    except ValidationError:  # as another version wrote it
        return None
