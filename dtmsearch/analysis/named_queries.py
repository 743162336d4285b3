"""Ready-made questions about a run, by name: what people ask of the tables, as SQL.

`:run` stands for the run's name. docs/cookbook.md has the same questions in pyarrow.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

import pyarrow as pa

from dtmsearch.analysis.sql import query
from dtmsearch.analysis.study_queries import STUDY_QUERIES
from dtmsearch.errors import UserError
from dtmsearch.store.store import ResultStore


@dataclass(frozen=True)
class Question:
    """`asks` says in a sentence what the answer's rows are."""

    name: str
    asks: str
    sql: str


QUESTIONS = {
    question.name: question
    for question in (
        Question(
            "best",
            "At each size, in whole bits per weight: the candidate with the fewest divergent tokens.",
            """\
SELECT floor(bits_per_weight) AS bits, arg_min(plan_id, sdt_mean) AS plan_id,
       min(sdt_mean) AS sdt, arg_min(fdt_mean, sdt_mean) AS fdt, count(*) AS candidates
FROM evaluations
WHERE run = :run AND purpose = 'search' AND status = 'ok'
GROUP BY bits
ORDER BY bits""",
        ),
        Question(
            "pareto",
            "Candidates that no other beats in both size and divergent tokens, small ones first.",
            """\
SELECT bits_per_weight, sdt_mean, fdt_mean, plan_id
FROM (
    SELECT *, min(sdt_mean) OVER (
        ORDER BY bits_per_weight, sdt_mean, plan_id ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING
    ) AS smaller_ones
    FROM evaluations
    WHERE run = :run AND purpose = 'search' AND status = 'ok'
)
WHERE smaller_ones IS NULL OR sdt_mean < smaller_ones
ORDER BY bits_per_weight""",
        ),
        Question(
            "sensitivity",
            "Components by what compressing each of them alone costs, the most costly first.",
            """\
SELECT component, scheme, fdt_mean, sdt_mean, dppl, kl
FROM evaluations
WHERE run = :run AND component IS NOT NULL AND purpose = 'search' AND status = 'ok'
ORDER BY sdt_mean DESC, component, scheme""",
        ),
        Question(
            "kinds",
            "What compressing a component of each kind alone costs on average.",
            """\
SELECT kind, scheme, avg(fdt_mean) AS fdt, avg(sdt_mean) AS sdt, count(*) AS components
FROM evaluations JOIN components USING (component)
WHERE run = :run AND purpose = 'search' AND status = 'ok'
  AND manifest_id = (SELECT manifest_id FROM runs WHERE run = :run)
GROUP BY kind, scheme
ORDER BY sdt DESC""",
        ),
        Question(
            "layers",
            "The same by layer.",
            """\
SELECT layer, scheme, avg(fdt_mean) AS fdt, avg(sdt_mean) AS sdt, count(*) AS components
FROM evaluations JOIN components USING (component)
WHERE run = :run AND purpose = 'search' AND status = 'ok'
  AND manifest_id = (SELECT manifest_id FROM runs WHERE run = :run)
GROUP BY layer, scheme
ORDER BY layer, scheme""",
        ),
        Question(
            "course",
            "The decisions of the search in order, and what each came to.",
            """\
SELECT step, perturbation, score, num_compressed, share, bits_per_weight, evaluations
FROM steps
WHERE run = :run
ORDER BY step""",
        ),
        Question(
            "plan",
            "The final plan, component by component, with the bits that a weight takes.",
            """\
SELECT component, scheme, stored_bits / num_weights AS bits_per_weight
FROM plans
WHERE plan_id = (SELECT final_plan_id FROM runs WHERE run = :run)
ORDER BY component""",
        ),
        Question(
            "validation",
            "The final plan beside the base model and uniform plans, on held-out prompts.",
            """\
SELECT label, bits_per_weight, fdt_mean, sdt_mean, dppl, ppl, kl
FROM evaluations
WHERE run = :run AND purpose = 'validation' AND status = 'ok'
ORDER BY fdt_mean DESC, label""",
        ),
        Question(
            "prompts",
            "The held-out prompts that the final plan changes first.",
            """\
SELECT unnest(range(len(fdt))) AS prompt, unnest(fdt) AS fdt, unnest(sdt) AS sdt
FROM evaluations
WHERE run = :run AND purpose = 'validation' AND label = 'plan' AND status = 'ok'
ORDER BY fdt, prompt
LIMIT 10""",
        ),
        Question(
            "noise",
            "How often the base model's single pass leaves its own generation; only unmasked columns compare with it.",
            """\
SELECT reference_id, count(*) AS prompts, avg(len(disagreements)) AS tokens_a_prompt
FROM prompts
WHERE reference_id IN (
    SELECT unnest([reference_id, validation_reference_id]) FROM runs WHERE run = :run
)
GROUP BY reference_id
ORDER BY reference_id""",
        ),
        Question(
            "failures",
            "Evaluations that came to nothing, by kind, with the last message of each.",
            """\
SELECT status, count(*) AS evaluations, max(attempts) AS attempts, arg_max(message, finished_at) AS message
FROM evaluations
WHERE run = :run AND status <> 'ok'
GROUP BY status
ORDER BY status""",
        ),
        Question(
            "cost",
            "What each replica measured, and the time that it took.",
            """\
SELECT replica, node, count(*) AS evaluations, sum(tokens)::BIGINT AS tokens, sum(wall_seconds) AS seconds
FROM evaluations
WHERE run = :run AND reused_from IS NULL
GROUP BY replica, node
ORDER BY replica, node""",
        ),
        *(Question(f"study-{name}", asks, sql) for name, asks, sql in STUDY_QUERIES),
    )
}


def list_of_questions() -> pa.Table:
    """Name and meaning of each question."""
    return pa.table({name: [getattr(q, name) for q in QUESTIONS.values()] for name in ("name", "asks")})


def ask(store: ResultStore, name: str, run: str) -> pa.Table:
    """The answer to a ready-made question about a run. Raises `UserError` when there is no such question or run."""
    question = QUESTIONS.get(name)
    if question is None:
        raise UserError(unknown_question(name))
    if store.run(run) is None:
        names = ", ".join(record.run for record in store.runs()) or "none"
        raise UserError(f"no run {run!r} in the store {store.url}; it holds: {names}")
    # A run's name holds letters, digits, dots, dashes and underscores alone, so nothing in it ends the quotation.
    return query(store, question.sql.replace(":run", f"'{run}'"))


def unknown_question(name: str) -> str:
    """What to say of a text that is neither SQL nor the name of a question."""
    nearest = difflib.get_close_matches(name, QUESTIONS, n=1, cutoff=0.5)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    return f"{name!r} is neither a SELECT nor the name of a question{hint} (`dtmsearch query --list` shows the names)"
