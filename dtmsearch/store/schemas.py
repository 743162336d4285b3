"""The store's tables: their columns, in a format of its own version. Knows nothing of rows or files."""

from __future__ import annotations

import pyarrow as pa

# Raise it when a column changes; a store of a newer version than this is refused, an older one read.
FORMAT_VERSION = 2
CODED = pa.dictionary(pa.int32(), pa.string())  # for names that repeat: stored once, compared as numbers
_TIME = pa.timestamp("us")  # UTC
_INTS = pa.list_(pa.int32())
_FLOATS = pa.list_(pa.float32())


def _schema(name: str, columns: list[tuple[str, pa.DataType]]) -> pa.Schema:
    return pa.schema(columns, metadata={"dtmsearch.table": name, "dtmsearch.format": str(FORMAT_VERSION)})


# A run has a row for each time that its status was written; the last one holds. A finished one says how many rows it
# had recorded by then, those that repeat what other runs measured included.
RUNS = _schema(
    "runs",
    [
        ("run", pa.string()),
        ("status", pa.string()),
        ("config", pa.string()),
        ("config_folder", pa.string()),
        ("manifest_id", pa.string()),
        ("reference_id", pa.string()),
        ("validation_reference_id", pa.string()),
        ("final_plan_id", pa.string()),
        ("created_at", _TIME),
        ("finished_at", _TIME),
        ("version", pa.string()),
        ("message", pa.string()),
        ("continue_command", pa.string()),
        ("num_evaluations", pa.int64()),
        ("num_plan_rows", pa.int64()),
        ("num_steps", pa.int64()),
        ("search_text", pa.string()),
        ("held_out_text", pa.string()),
        ("choice_reference_id", pa.string()),
        ("min_fdt_reference_id", pa.string()),
    ],
)
# From `transposed` on: how the model keeps the matrix, what chooses an expert's, and what it takes where the base model
# comes quantized (`core.components.Component`); `source` describes the format that the base model comes in.
COMPONENTS = _schema(
    "components",
    [
        ("manifest_id", CODED),
        ("model", CODED),
        ("component", pa.string()),
        ("layer", pa.int32()),
        ("kind", CODED),
        ("rows", pa.int64()),
        ("cols", pa.int64()),
        ("num_weights", pa.int64()),
        ("dense_bits", pa.int32()),
        ("transposed", pa.bool_()),
        ("stacked", pa.bool_()),
        ("mixture", CODED),
        ("num_experts", pa.int32()),
        ("experts_per_token", pa.int32()),
        ("apart", pa.bool_()),
        ("source_bits", pa.int64()),
        ("source", CODED),
    ],
)
# From `suppressed` to `decoding` stand the reference's generation rules (`core.evaluation.GenerationRules`).
# `disagreements` are all the positions at which the base model leaves its continuation, `base_agreement` the first.
PROMPTS = _schema(
    "prompts",
    [
        ("reference_id", CODED),
        ("manifest_id", CODED),
        ("mode", CODED),
        ("prompt", pa.int32()),
        ("tokens", _INTS),
        ("continuation", _INTS),
        ("human_continuation", _INTS),
        ("base_agreement", pa.int32()),
        ("disagreements", _INTS),
        ("suppressed", _INTS),
        ("opening", _INTS),
        ("tokenizer", CODED),
        ("decoding", CODED),
    ],
)
# FDT and SDT leave out the positions at which the base model leaves its own continuation (`prompts.disagreements`);
# their unmasked columns do not, and only these compare with the base model against itself.
# Metrics of other packages: their names, in order, their values over all prompts, and their values on each prompt, one
# metric's after another's. SQL sees each as two columns of its own, such as `top5` and `top5_list`.
# `tokens` counts the tokens that the evaluation computed; the lists run over its prompts. From `calibration_id` to
# `scale_dtype` stands what the identity holds beside plan, weights, reference and prompts: `calibration_id` is null
# where the plan has no calibrated scheme, the parts of the numeric mode are the reference's. `versions` are those of
# the libraries that computed it, as JSON; `version` is this package's.
EVALUATIONS = _schema(
    "evaluations",
    [
        ("run", CODED),
        ("step", pa.int32()),
        ("evaluation_id", pa.string()),
        ("plan_id", pa.string()),
        ("parent_plan_id", CODED),
        ("weights_id", CODED),
        ("calibration_id", CODED),
        ("extra_metrics", pa.list_(pa.string())),
        ("dtype", CODED),
        ("device", CODED),
        ("attention", CODED),
        ("compiled", pa.bool_()),
        ("scale_dtype", CODED),
        ("perturbation", CODED),
        ("component", CODED),
        ("scheme", CODED),
        ("purpose", CODED),
        ("label", CODED),
        ("reused_from", CODED),
        ("reference_id", CODED),
        ("status", CODED),
        ("message", pa.string()),
        ("num_compressed", pa.int32()),
        ("share", pa.float64()),
        ("bits_per_weight", pa.float64()),
        ("active_bits_per_weight", pa.float64()),
        ("num_prompts", pa.int32()),
        ("fdt_mean", pa.float64()),
        ("fdt_p25", pa.float64()),
        ("fdt_p50", pa.float64()),
        ("fdt_p75", pa.float64()),
        ("sdt_mean", pa.float64()),
        ("dppl", pa.float64()),
        ("ppl", pa.float64()),
        ("kl", pa.float64()),
        ("fdt", _INTS),
        ("sdt", _INTS),
        ("dppl_list", _FLOATS),
        ("ppl_list", _FLOATS),
        ("kl_list", _FLOATS),
        ("fdt_unmasked_mean", pa.float64()),
        ("sdt_unmasked_mean", pa.float64()),
        ("fdt_unmasked", _INTS),
        ("sdt_unmasked", _INTS),
        ("other_metrics", pa.list_(pa.string())),
        ("other_means", pa.list_(pa.float64())),
        ("other_values", _FLOATS),
        ("tokens", pa.int64()),
        ("wall_seconds", pa.float64()),
        ("replica", CODED),
        ("node", CODED),
        ("attempts", pa.int32()),
        ("finished_at", _TIME),
        ("version", CODED),
        ("versions", CODED),
    ],
)
PLANS = _schema(
    "plans",
    [
        ("plan_id", CODED),
        ("component", CODED),
        ("scheme", CODED),
        ("stored_bits", pa.int64()),
        ("num_weights", pa.int64()),
    ],
)
# How the base model and a run's final plan go on from some held-out prompts; `own` is the compressed model's.
CONTINUATIONS = _schema(
    "continuations",
    [
        ("run", CODED),
        ("reference_id", CODED),
        ("plan_id", CODED),
        ("prompt", pa.int32()),
        ("prompt_text", pa.string()),
        ("base_tokens", _INTS),
        ("base_pieces", pa.list_(pa.string())),
        ("base_margins", _FLOATS),
        ("own_tokens", _INTS),
        ("own_pieces", pa.list_(pa.string())),
        ("own_margins", _FLOATS),
    ],
)
STEPS = _schema(
    "steps",
    [
        ("run", CODED),
        ("step", pa.int32()),
        ("plan_id", pa.string()),
        ("perturbation", pa.string()),
        ("score", pa.float64()),
        ("num_compressed", pa.int32()),
        ("share", pa.float64()),
        ("bits_per_weight", pa.float64()),
        ("active_bits_per_weight", pa.float64()),
        ("sparsity", pa.float64()),
        ("evaluations", pa.int64()),
        ("wall_seconds", pa.float64()),
    ],
)
# Mean squares of the inputs of a model's components over calibration text, how many tokens these are of, and the
# largest absolute input; where too few tokens reach an expert, mean squares are all 1.
STATISTICS = _schema(
    "statistics",
    [
        ("calibration_id", CODED),
        ("manifest_id", CODED),
        ("component", pa.string()),
        ("mean_squares", _FLOATS),
        ("tokens", pa.int64()),
        ("largest", pa.float32()),
    ],
)
# Components under schemes that took solving for, as `core.calibration.PackedMatrix` says.
MATRICES = _schema(
    "matrices",
    [
        ("calibration_id", CODED),
        ("component", pa.string()),
        ("scheme", pa.string()),
        ("rows", pa.int64()),
        ("cols", pa.int64()),
        ("bits", pa.int32()),
        ("block", pa.int64()),
        ("scale_dtype", CODED),
        ("codes", pa.large_binary()),
        ("scales", pa.large_binary()),
        ("zeros", pa.large_binary()),
        ("mask", pa.large_binary()),
    ],
)
# Trainings under masks: `weights_id` names the weights that `plan_id` over `from_weights_id` came to.
TRAININGS = _schema(
    "trainings",
    [
        ("run", CODED),
        ("round", pa.int32()),
        ("training_id", pa.string()),
        ("plan_id", pa.string()),
        ("from_weights_id", pa.string()),
        ("weights_id", pa.string()),
        ("steps", pa.int64()),
        ("tokens", pa.int64()),
        ("wall_seconds", pa.float64()),
        ("losses", _FLOATS),
    ],
)
# What a run knew of schemes without measuring them, as `core.calibration.WeightError` says.
# `scheme_version` is what the error was measured by, as canonical JSON: the versions of the scheme's arithmetic
# (`core.plan.versions_of`) and, where inputs weigh it, that of the calibration.
WEIGHT_ERRORS = _schema(
    "weight_errors",
    [
        ("run", CODED),
        ("component", CODED),
        ("scheme", CODED),
        ("plain", pa.float64()),
        ("weighted_by_inputs", pa.float64()),
        ("weighted_by_hessian", pa.float64()),
        ("scheme_version", CODED),
    ],
)
# How calibration text uses the experts of mixtures, and what a scheme does there (`core.calibration.ExpertUse`).
EXPERT_USES = _schema(
    "expert_uses",
    [
        ("run", CODED),
        ("mixture", CODED),
        ("expert", pa.int32()),
        ("scheme", CODED),
        ("tokens", pa.int64()),
        ("num_tokens", pa.int64()),
        ("routing_weight", pa.float64()),
        ("error", pa.float64()),
        ("versions", pa.string()),
    ],
)
# How many tokens of the search's prompts and continuations reach each expert of a mixture.
EXPERT_TOKENS = _schema(
    "expert_tokens",
    [
        ("run", CODED),
        ("reference_id", CODED),
        ("mixture", CODED),
        ("expert", pa.int32()),
        ("tokens", pa.int64()),
    ],
)
# Products of samples with an option, as `core.prices` says; `products` runs over the samples of a block, the first of
# which is `first_sample`. `block_tokens` and `wall_seconds` are those of the whole block, the same in all of its rows.
PRICES = _schema(
    "prices",
    [
        ("run", CODED),
        ("price_id", CODED),
        ("reference_id", CODED),
        ("kind", CODED),
        ("around_plan_id", CODED),
        ("calibration_id", CODED),
        ("seed", pa.int64()),
        ("component", CODED),
        ("scheme", CODED),
        ("first_sample", pa.int32()),
        ("products", _FLOATS),
        ("block_tokens", pa.int64()),
        ("wall_seconds", pa.float64()),
        ("version", CODED),
    ],
)
SCHEMAS: dict[str, pa.Schema] = {
    "runs": RUNS,
    "components": COMPONENTS,
    "prompts": PROMPTS,
    "evaluations": EVALUATIONS,
    "plans": PLANS,
    "steps": STEPS,
    "statistics": STATISTICS,
    "matrices": MATRICES,
    "weight_errors": WEIGHT_ERRORS,
    "expert_uses": EXPERT_USES,
    "expert_tokens": EXPERT_TOKENS,
    "continuations": CONTINUATIONS,
    "trainings": TRAININGS,
    "prices": PRICES,
}
MODE_COLUMNS = ("dtype", "device", "attention", "compiled", "scale_dtype")
OTHER_COLUMNS = ("other_metrics", "other_means", "other_values")
UNMASKED_COLUMNS = ("fdt_unmasked_mean", "sdt_unmasked_mean", "fdt_unmasked", "sdt_unmasked")
# Columns that came to a table after its first segments were written, which lack them: there they are null.
ADDED: dict[str, frozenset[str]] = {
    "evaluations": frozenset(
        {"weights_id", "calibration_id", "extra_metrics", *MODE_COLUMNS, "versions", *UNMASKED_COLUMNS, *OTHER_COLUMNS}
        | {"active_bits_per_weight"}
    ),
    "components": frozenset({"transposed", "stacked", "mixture", "num_experts", "experts_per_token", "apart"})
    | {"source_bits", "source"},
    "steps": frozenset({"active_bits_per_weight"}),
    "statistics": frozenset({"tokens", "largest"}),
    "prompts": frozenset({"opening", "tokenizer", "decoding"}),
    "weight_errors": frozenset({"scheme_version"}),
    "runs": frozenset(
        {
            "continue_command",
            "num_evaluations",
            "num_plan_rows",
            "num_steps",
            "search_text",
            "held_out_text",
            "choice_reference_id",
            "min_fdt_reference_id",
        }
    ),
}
SUMMARY_COLUMNS = (
    *("num_prompts", "fdt_mean", "fdt_p25", "fdt_p50", "fdt_p75", "sdt_mean", "dppl", "ppl", "kl"),
    *("fdt_unmasked_mean", "sdt_unmasked_mean"),
)


def fits(table: str, schema: pa.Schema) -> bool:
    """Whether a segment's columns are those of a table, or were before columns were added to it."""
    missing = set(SCHEMAS[table].names) - set(schema.names)
    if not missing <= ADDED.get(table, frozenset()):
        return False
    return bool(schema.equals(pa.schema([field for field in SCHEMAS[table] if field.name not in missing])))


def empty(table: str) -> pa.Table:
    """A table of the store without rows."""
    return SCHEMAS[table].empty_table()
