"""What the names that a user gives stand for: a store's runs, their search files, and plans."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow.compute as pc

from dtmsearch import config
from dtmsearch.analysis.summary import record_of
from dtmsearch.config import SearchFile, texts
from dtmsearch.config.recorded_text import section_of
from dtmsearch.core.components import Component, ModelManifest, is_block_name
from dtmsearch.core.gguf_presets import PRESET, check_preset, preset_plan
from dtmsearch.core.plan import Plan
from dtmsearch.core.plan_file import plan_from_json, schemes_from_json, weights_id_from_json
from dtmsearch.core.records import RunRecord
from dtmsearch.core.schemes import DROP, uniform_parts
from dtmsearch.core.user_files import is_file, read_text
from dtmsearch.core.widths import width_of
from dtmsearch.errors import UserError
from dtmsearch.search.space import SearchSpace
from dtmsearch.store.store import ResultStore

# Every verb takes a store as a folder's name, a bucket's URL, or an object.
StoreLike = ResultStore | str | os.PathLike[str]
# How `evaluate` is asked for the uniform plan of a scheme.
UNIFORM = "uniform:"


def open_store(store: StoreLike, on_note: Callable[[str], None] | None = None) -> ResultStore:
    """The store at a local path or a bucket's URL; created on first writing. One that is open is opened again where and
    as it is; it keeps its own listener to notes, or gets `on_note`."""
    if isinstance(store, ResultStore):
        return ResultStore(store.folder, on_note=store.on_note or on_note)
    return ResultStore(store, on_note=on_note)


def stored_file(results: ResultStore, run_name: str) -> SearchFile:
    """The search file that a run was started from, as the store remembers it."""
    record = record_of(results, run_name)
    return config.recorded(record)


def check_continuable(results: ResultStore, file: SearchFile) -> None:
    """Raises `UserError` where a run cannot be continued by its name alone: its driver was sent elsewhere, or its
    texts lie there."""
    record = record_of(results, file.run)
    is_complete = record.status == "finished" and not results.missing(record, thorough=True)
    if is_complete or Path(record.config_folder).is_dir():
        return
    if record.continue_command is not None:
        raise UserError(
            f"run {file.run!r} was submitted to a cluster, which has its texts. To continue it, where it was "
            f"submitted:\n  {record.continue_command}"
        )
    try:
        texts.check_readable(file)
    except ValueError as error:
        raise UserError(
            f"run {file.run!r} was started from a search file in {record.config_folder}, which is not here ({error}). "
            f"Continue it there, or here with a copy of the file and its texts:\n"
            f"  dtmsearch run FILE --store {shlex.quote(results.url)}"
        ) from None


def begun(results: ResultStore, file: SearchFile) -> RunRecord | None:
    """What is recorded of the run; None if it came to nothing yet, so that a mistake in its file can be mended.

    Raises `UserError` when it was begun from another search file.
    """
    previous = results.run(file.run)
    if previous is None or previous.reference_id is None:
        return None
    # As this version writes it: a key that came later stands there with its default.
    before = config.recorded(previous)
    if "experts" not in section_of(previous.config, "search") and not _has_experts(results, previous):
        # What was not known there ties nothing here.
        search = before.search.model_copy(update={"experts": file.search.experts})
        before = before.model_copy(update={"search": search})
    changes = config.difference(before.to_yaml(), file.to_yaml())
    if changes:
        lines = "\n  ".join(changes)
        raise UserError(
            f"run {file.run!r} in {results.url} was started from another search file:\n  {lines}\n"
            f"Give this search a name of its own (run: {file.run}-2, or --set run={file.run}-2), or undo the change"
        )
    return previous


def _has_experts(results: ResultStore, record: RunRecord) -> bool:
    """Whether a run's model is a mixture, as far as its rows tell, which may be older than their columns for it."""
    where = pc.field("manifest_id") == record.manifest_id
    rows = results.table("components", ["component", "stacked"], where=where).to_pylist()
    return any(row["stacked"] or ".experts." in row["component"] for row in rows)


def check_plan_argument(plan: str, results: ResultStore) -> None:
    """Raises `UserError` for what can be told to be no plan before the model is known."""
    if plan.startswith(UNIFORM):
        uniform_parts(plan.removeprefix(UNIFORM))
    elif plan.startswith(PRESET):
        check_preset(plan.removeprefix(PRESET))
    elif not is_file(Path(plan)):
        record = results.run(plan)
        if record is None and is_file(inside := Path(plan) / "plan.json"):
            raise UserError(f"--plan {plan!r} is a folder: give the plan in it, {inside}")
        if record is None:
            raise UserError(
                f"--plan {plan!r} is no file, no run of this store, and not {UNIFORM}SCHEME or {PRESET}NAME"
            )
        if results.plan_id_so_far(record) is None:
            raise UserError(f"run {plan!r} has no plan (it is {record.status})")


def uniform_plan(plan: str, components: Sequence[Component]) -> Plan:
    """The plan `uniform:SCHEME` over some components. Raises `UserError` for a scheme that is for none of them."""
    scheme = plan.removeprefix(UNIFORM)
    for part in uniform_parts(scheme):
        if not any(part.takes(component) for component in components):
            own, given = ("KV caches", "weights") if part.is_of_cache else ("weights", "KV caches")
            raise UserError(
                f"{plan}: {part.name} is for {own}, and all that is searched are {given}: give a scheme of these, or "
                "name others (search.components.include; of KV caches model.kv_cache as well)"
            )
    return Plan.uniform(components, scheme)


def find_plan(plan: str, space: SearchSpace, manifest: ModelManifest, results: ResultStore) -> Plan:
    """The plan that a plan file, a run's name `uniform:SCHEME` or `preset:NAME` stands for over this model. Raises
    `UserError`."""
    if plan.startswith(UNIFORM):
        return uniform_plan(plan, space.components)
    if plan.startswith(PRESET):
        return preset_plan(plan.removeprefix(PRESET), space.components, manifest)
    if is_file(Path(plan)):
        return plan_from_json(read_text(Path(plan), "plan file"), manifest, plan)
    record = record_of(results, plan)
    if record.manifest_id != manifest.id:
        raise UserError(f"the plan of run {plan!r} was made for another model, with manifest {record.manifest_id}")
    plan_id = results.plan_id_so_far(record)
    found = None if plan_id is None else results.plan(plan_id, plan)
    if found is None:
        raise UserError(f"the plan of run {plan!r} is not in the store")
    return found


def find_weights_id(plan: str, results: ResultStore) -> str:
    """The trained weights that such a plan is over, a plan file's or a run's; empty for the base model's own."""
    if plan.startswith((UNIFORM, PRESET)):
        return ""
    if is_file(Path(plan)):
        weights_id = weights_id_from_json(read_text(Path(plan), "plan file"), plan)
        folder = results.weights_folder
        if weights_id and folder and not (Path(folder) / f"{weights_id}.safetensors").is_file():
            raise UserError(f"{plan} is over trained weights {weights_id}, which the store {results.url} does not hold")
        return weights_id
    return results.weights_id(plan)


def drops_blocks(plan: str, results: ResultStore) -> bool:
    """Whether a plan, given as in `find_plan`, drops blocks or layers whole, or cuts some, as far as names tell before
    the model is known."""
    if plan.startswith((UNIFORM, PRESET)):
        return False
    if is_file(Path(plan)):
        schemes = schemes_from_json(read_text(Path(plan), "plan file"), plan)
        return any(is_block_name(name) for name, scheme in schemes.items() if scheme == DROP or width_of(scheme))
    plan_id = results.plan_id_so_far(record_of(results, plan))
    found = None if plan_id is None else results.plan(plan_id, plan)
    return found is not None and any(map(is_block_name, (*found.dropped, *found.widths)))
