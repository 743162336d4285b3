"""Every type of record that has a codec of its own: written and read back by its type alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import MODE, toy_components, toy_manifest
from stores import run_record

from dtmsearch.core.calibration import ExpertTokens, ExpertUse, InputStatistics, PackedMatrix, WeightError
from dtmsearch.core.evaluation import Continuation, Reference, Writing
from dtmsearch.core.prices import PriceBlock, PriceRequest
from dtmsearch.core.records import (
    ComponentRecord,
    ContinuationRecord,
    StatisticsRecord,
    StepRecord,
    TrainingRecord,
)
from dtmsearch.store.codecs.codec_registry import CODECS
from dtmsearch.store.store import ResultStore

TOKENS = np.arange(10, dtype=np.int32).reshape(2, 5)
WRITING = Writing((1,), ("a",), (0.5,))
RECORDS: dict[type, Any] = {
    type(record): record
    for record in (
        run_record(),
        ComponentRecord(toy_manifest(), toy_components()[0]),
        StepRecord(0, "plan", None, 1.0, 1, 0.5, 8.0, 0.0, 3, 1.0),
        TrainingRecord(0, "training", "plan", "", "weights", 1, 2, 3.0, (0.5,)),
        ContinuationRecord("reference", "plan", Continuation(0, "text", WRITING, WRITING)),
        WeightError("c", "int4-g32", 0.5),
        ExpertTokens("reference", "layers.0.mlp", 3, 5),
        ExpertUse("layers.0.mlp", 3, "int4-g32", 5, 8, 0.25, 0.5),
        PriceBlock(PriceRequest("reference", (0, 2), ("c",), ("nf4",)), np.ones((2, 1, 1), np.float32), 8, 1.0),
        Reference("reference", "toy", MODE, TOKENS, TOKENS[:, 3:], np.ones((2, 2), np.bool_), ()),
        StatisticsRecord("toy", InputStatistics("calibration", {"c": np.ones(4, np.float32)})),
        PackedMatrix("c", "gptq-int4-g32", (2, 2), 4, 2, "float16", *(np.ones(2, np.uint8) for _ in range(4))),
    )
}


def test_every_codec_is_tried() -> None:
    assert RECORDS.keys() == CODECS.keys()


@pytest.mark.parametrize("kind", [kind for kind, codec in CODECS.items() if not codec.is_shared])
def test_what_a_run_records_stands_in_its_table_once(kind: type, tmp_path: Path) -> None:
    codec, store = CODECS[kind], ResultStore(tmp_path)
    with store.writer("run") as writer:
        writer.add([RECORDS[kind]])
        if codec.identity:
            writer.add([RECORDS[kind]])
        found = writer.read(kind) if codec.records else None
    assert store.table(codec.table, run="run").num_rows == 1
    assert found in (None, [RECORDS[kind]])


@pytest.mark.parametrize("kind", [Reference, StatisticsRecord])
def test_what_is_shared_is_that_of_the_first_who_wrote_it(kind: type, tmp_path: Path) -> None:
    store, first = ResultStore(tmp_path), RECORDS[kind]
    with store.writer("one") as one, store.writer("two") as two:
        one.share(first)
        second = two.share(replace(first, manifest_id="another"))
    assert second.manifest_id == first.manifest_id
    assert store.table(CODECS[kind].table).num_rows == len(second.agrees if kind is Reference else "c")


def test_parts_that_are_shared_are_added_once_each(tmp_path: Path) -> None:
    store, matrix = ResultStore(tmp_path), RECORDS[PackedMatrix]
    with store.writer("run") as writer:
        writer.share_parts("calibration", [matrix])
        writer.share_parts("calibration", [matrix, replace(matrix, component="d")])
    assert store.shared_keys(PackedMatrix, "calibration") == {("c", matrix.scheme), ("d", matrix.scheme)}
    assert store.table("matrices").num_rows == 2


def test_nothing_to_record_makes_no_segment(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    with store.writer("run") as writer:
        writer.add([])
        writer.share_parts("calibration", [])
    assert not store.segments.live("weight_errors")
