"""From what a calibration comes to, to rows and back: statistics of inputs, solved matrices, errors of weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from dtmsearch.core.calibration import (
    CALIBRATION_VERSION,
    ExpertTokens,
    ExpertUse,
    InputStatistics,
    PackedMatrix,
    WeightError,
)
from dtmsearch.core.plan import versions_of
from dtmsearch.core.records import StatisticsRecord
from dtmsearch.store.codecs.columns import arrays, coded_constant, from_columns, lists
from dtmsearch.store.schemas import EXPERT_TOKENS, EXPERT_USES, MATRICES, STATISTICS, WEIGHT_ERRORS


def weight_errors_table(run: str, errors: Sequence[WeightError]) -> pa.Table:
    """Rows of `weight_errors`."""
    columns: dict[str, Any] = {n: [getattr(e, n) for e in errors] for n in _ERROR_COLUMNS}
    columns |= {"run": coded_constant(run, len(errors)), "scheme_version": [_measured_by(e) for e in errors]}
    return from_columns(WEIGHT_ERRORS, columns)


def weight_errors_of(table: pa.Table) -> list[WeightError]:
    """The errors in rows, but those measured by another version of a scheme or of the calibration; a row from before
    versions were kept may be of any."""
    rows = table.to_pylist()
    errors = [WeightError(**{name: row[name] for name in _ERROR_COLUMNS}) for row in rows]
    return [e for e, row in zip(errors, rows, strict=True) if row["scheme_version"] == _measured_by(e)]


_ERROR_COLUMNS = tuple(name for name in WEIGHT_ERRORS.names if name not in ("run", "scheme_version"))


def _measured_by(error: WeightError) -> str:
    """The versions of what makes an error what it is, in canonical JSON."""
    versions: dict[str, int | str] = versions_of([error.scheme])
    if error.weighted_by_inputs is not None:
        versions |= {"calibration": CALIBRATION_VERSION}
    return json.dumps(versions, sort_keys=True)


def expert_uses_table(run: str, uses: Sequence[ExpertUse]) -> pa.Table:
    """Rows of `expert_uses`."""
    columns: dict[str, Any] = {n: [getattr(use, n) for use in uses] for n in _USE_COLUMNS}
    columns |= {"run": coded_constant(run, len(uses)), "versions": [_versions_of(use.scheme) for use in uses]}
    return from_columns(EXPERT_USES, columns)


def expert_uses_of(table: pa.Table) -> list[ExpertUse]:
    """The uses in rows, but those of another version of a scheme or of the calibration."""
    rows = table.to_pylist()
    uses = [ExpertUse(**{name: row[name] for name in _USE_COLUMNS}) for row in rows]
    return [use for use, row in zip(uses, rows, strict=True) if row["versions"] == _versions_of(use.scheme)]


_USE_COLUMNS = tuple(name for name in EXPERT_USES.names if name not in ("run", "versions"))


def _versions_of(scheme: str) -> str:
    return json.dumps(versions_of([scheme]) | {"calibration": CALIBRATION_VERSION}, sort_keys=True)


def expert_tokens_table(run: str, records: Sequence[ExpertTokens]) -> pa.Table:
    """Rows of `expert_tokens`."""
    names = [name for name in EXPERT_TOKENS.names if name != "run"]
    columns: dict[str, Any] = {name: [getattr(record, name) for record in records] for name in names}
    return from_columns(EXPERT_TOKENS, columns | {"run": coded_constant(run, len(records))})


def expert_tokens_of(table: pa.Table) -> list[ExpertTokens]:
    """What rows of `expert_tokens` say."""
    return [ExpertTokens(**row) for row in table.drop_columns(["run"]).to_pylist()]


def statistics_table(record: StatisticsRecord) -> pa.Table:
    """A row of `statistics` for each component."""
    statistics = record.statistics
    names = sorted(statistics.mean_squares)
    columns = {
        "calibration_id": coded_constant(statistics.calibration_id, len(names)),
        "manifest_id": coded_constant(record.manifest_id, len(names)),
        "component": names,
        "mean_squares": lists([statistics.mean_squares[name] for name in names], pa.float32()),
        "tokens": [statistics.num_tokens.get(name) for name in names],
        "largest": [statistics.largest.get(name) for name in names],
    }
    return from_columns(STATISTICS, columns)


def statistics_of(table: pa.Table) -> StatisticsRecord:
    """The statistics whose rows, at least one, these are."""
    table = table.combine_chunks()
    squares = table["mean_squares"].combine_chunks()
    by_name = zip(table["component"].to_pylist(), arrays(squares), strict=True)
    held = {name: values for name, values in by_name if values is not None}
    tokens = dict(zip(table["component"].to_pylist(), table["tokens"].to_pylist(), strict=True))
    known = {name: number for name, number in tokens.items() if number is not None}
    sizes = zip(table["component"].to_pylist(), table["largest"].to_pylist(), strict=True)
    largest = {name: size for name, size in sizes if size is not None}
    statistics = InputStatistics(table["calibration_id"][0].as_py(), held, known, largest)
    return StatisticsRecord(table["manifest_id"][0].as_py(), statistics)


_BYTES_COLUMNS = ("codes", "scales", "zeros", "mask")


def matrices_table(calibration_id: str, matrices: Sequence[PackedMatrix]) -> pa.Table:
    """A row of `matrices` for each matrix."""
    columns: dict[str, Any] = {
        "calibration_id": coded_constant(calibration_id, len(matrices)),
        "rows": [m.shape[0] for m in matrices],
        "cols": [m.shape[1] for m in matrices],
    }
    columns |= {n: [getattr(m, n) for m in matrices] for n in ("component", "scheme", "bits", "block", "scale_dtype")}
    columns |= {n: [getattr(m, n).tobytes() for m in matrices] for n in _BYTES_COLUMNS}
    return from_columns(MATRICES, columns)


def matrices_of(table: pa.Table) -> list[PackedMatrix]:
    """The matrices in rows of `matrices`; their arrays are read-only views into the rows' memory."""
    return [
        PackedMatrix(
            component=row["component"].as_py(),
            scheme=row["scheme"].as_py(),
            shape=(row["rows"].as_py(), row["cols"].as_py()),
            bits=row["bits"].as_py(),
            block=row["block"].as_py(),
            scale_dtype=row["scale_dtype"].as_py(),
            **{name: np.frombuffer(row[name].as_buffer(), np.uint8) for name in _BYTES_COLUMNS},
        )
        for batch in table.to_batches()
        for row in ({name: batch[name][at] for name in batch.schema.names} for at in range(batch.num_rows))
    ]
