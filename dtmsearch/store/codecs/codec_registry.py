"""Which table a record goes to, and how: one codec for each type of record. A writer and a reader of the store find it
by the type, so that a new kind of record needs an entry here and no method there.

Evaluations and their plans come by the hundred thousand and lean on each other: the writer has methods of their own for
these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import pyarrow as pa

import dtmsearch
from dtmsearch.core.calibration import ExpertTokens, ExpertUse, PackedMatrix, WeightError
from dtmsearch.core.evaluation import Reference
from dtmsearch.core.prices import PriceBlock
from dtmsearch.core.records import (
    ComponentRecord,
    ContinuationRecord,
    RunRecord,
    StatisticsRecord,
    StepRecord,
    TrainingRecord,
)
from dtmsearch.store.codecs import calibrations, price_blocks, tables

Record = TypeVar("Record")
Key = tuple[Any, ...]


@dataclass(frozen=True)
class Codec(Generic[Record]):
    """Records of one type. `rows` makes rows of a table of them, for the run or the id that they stand under; `records`
    has them back (None where nothing but queries reads them).

    `identity` names the columns, and `key` their values of a record, by which records are told apart: one that is
    recorded already stays as it is. Without them every record is added.

    `is_shared`: all runs have them, under the id of what they are of (`id_of`), and of two runs that write at once the
    first counts.
    """

    table: str
    rows: Callable[[str, Sequence[Record]], pa.Table]
    records: Callable[[pa.Table], Sequence[Record]] | None = None
    identity: tuple[str, ...] = ()
    key: Callable[[Record], Key] = lambda record: ()
    is_shared: bool = False
    id_of: Callable[[Record], str] = lambda record: ""

    def read(self, rows: pa.Table) -> list[Record]:
        assert self.records is not None, f"nothing reads {self.table} as records"
        return list(self.records(rows)) if rows.num_rows else []

    def new(self, records: Sequence[Record], known: set[Key]) -> list[Record]:
        """Those that are not recorded yet."""
        return [record for record in records if not self.identity or self.key(record) not in known]


def keys_of(rows: pa.Table) -> set[Key]:
    """What tells rows apart, by all columns that were read of them."""
    return set(zip(*(column.to_pylist() for column in rows.columns), strict=True))


CODECS: dict[type, Codec[Any]] = {
    RunRecord: Codec("runs", lambda _, records: tables.runs_table(records), tables.run_records),
    ComponentRecord: Codec(
        "components",
        lambda _, records: tables.components_table(records[0].manifest, [record.component for record in records]),
        identity=("manifest_id", "component"),
        key=lambda record: (record.manifest.id, record.component.name),
    ),
    StepRecord: Codec(
        "steps", tables.steps_table, tables.step_records, identity=("step",), key=lambda record: (record.step,)
    ),
    TrainingRecord: Codec(
        "trainings", tables.trainings_table, identity=("training_id",), key=lambda record: (record.training_id,)
    ),
    ContinuationRecord: Codec(
        "continuations",
        tables.continuations_table,
        identity=("reference_id", "plan_id"),
        key=lambda record: (record.reference_id, record.plan_id),
    ),
    WeightError: Codec("weight_errors", calibrations.weight_errors_table, calibrations.weight_errors_of),
    ExpertUse: Codec("expert_uses", calibrations.expert_uses_table, calibrations.expert_uses_of),
    ExpertTokens: Codec(
        "expert_tokens",
        calibrations.expert_tokens_table,
        calibrations.expert_tokens_of,
        identity=("reference_id", "mixture", "expert"),
        key=lambda record: (record.reference_id, record.mixture, record.expert),
    ),
    PriceBlock: Codec(
        "prices",
        lambda run, blocks: pa.concat_tables(
            [price_blocks.prices_table(run, block, dtmsearch.__version__) for block in blocks]
        ),
    ),
    Reference: Codec(
        "prompts",
        lambda _, records: tables.prompts_table(records[0]),
        lambda rows: [tables.reference_of(rows)],
        is_shared=True,
        id_of=lambda reference: reference.id,
    ),
    StatisticsRecord: Codec(
        "statistics",
        lambda _, records: calibrations.statistics_table(records[0]),
        lambda rows: [calibrations.statistics_of(rows)],
        is_shared=True,
        id_of=lambda record: record.statistics.calibration_id,
    ),
    PackedMatrix: Codec(
        "matrices",
        calibrations.matrices_table,
        calibrations.matrices_of,
        identity=("component", "scheme"),
        key=lambda matrix: (matrix.component, matrix.scheme),
        is_shared=True,
    ),
}
