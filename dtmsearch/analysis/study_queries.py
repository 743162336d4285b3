"""The ready-made questions that go with studies: (study, what the answer's rows are, SQL) each, asked of a run as
`study-NAME`."""

from __future__ import annotations

STUDY_QUERIES: tuple[tuple[str, str, str], ...] = (
    (
        "discriminability",
        "By layer and kind: how often KL, FDT and PPL find removing small weights less harmful than random ones.",
        """\
WITH own AS (SELECT * FROM evaluations WHERE run = :run AND purpose = 'search' AND status = 'ok'),
masks AS (
    SELECT component, num_prompts, kl, fdt_mean, dppl, ppl,
           CAST(regexp_extract(scheme, '-s(\\d+)$', 1) AS INTEGER) * num_prompts AS first
    FROM own WHERE scheme LIKE 'random-%'
),
pairs AS (
    SELECT m.*, list_slice(o.kl_list, first + 1, first + m.num_prompts) AS kl_block,
           list_slice(o.fdt, first + 1, first + m.num_prompts) AS fdt_block,
           list_slice(o.ppl_list, first + 1, first + m.num_prompts) AS ppl_block
    FROM masks m JOIN own o ON o.component = m.component AND o.scheme NOT LIKE 'random-%'
)
SELECT layer, kind, count(*) AS comparisons,
       avg(0.5 + 0.5 * sign(kl - list_avg(kl_block))) AS by_kl,
       avg(0.5 + 0.5 * sign(list_avg(fdt_block) - fdt_mean)) AS by_fdt,
       avg(0.5 + 0.5 * sign(ln(ppl) - list_avg([ln(x) FOR x IN ppl_block]))) AS by_ppl
FROM pairs JOIN components USING (component)
WHERE manifest_id = (SELECT manifest_id FROM runs WHERE run = :run)
GROUP BY layer, kind
ORDER BY layer, kind""",
    ),
    (
        "quantization-order",
        "The decisions in order, and what each came to in every metric.",
        """\
SELECT s.step, s.share, s.num_compressed, s.perturbation, fdt_mean, sdt_mean, kl, ppl
FROM steps s JOIN evaluations e USING (run, plan_id)
WHERE run = :run AND purpose = 'search' AND status = 'ok'
QUALIFY row_number() OVER (PARTITION BY s.step ORDER BY e.finished_at) = 1
ORDER BY s.step""",
    ),
    (
        "sparsity-rounds",
        "What each round came to on held-out prompts, trained and not.",
        """\
SELECT label, bits_per_weight, fdt_mean, sdt_mean, kl, ppl
FROM evaluations
WHERE run = :run AND purpose = 'validation' AND status = 'ok' AND (label LIKE 'round-%' OR label = 'plan')
ORDER BY label""",
    ),
    (
        "metric-cost",
        "Seconds of an evaluation in each set of metrics.",
        """\
SELECT array_to_string(extra_metrics, ' ') AS beside, count(*) AS evaluations,
       median(wall_seconds) AS seconds, max(wall_seconds) AS with_what_is_done_once
FROM evaluations
WHERE run = :run AND purpose = 'search' AND status = 'ok'
GROUP BY beside
ORDER BY beside""",
    ),
    (
        "prompts",
        "Components alone, by what each costs in every metric on all prompts.",
        """\
SELECT component, scheme, num_prompts, fdt_mean, fdt_p75, sdt_mean, dppl, kl,
       list_aggregate(kl_list, 'stddev_samp') / sqrt(num_prompts) AS kl_error
FROM evaluations
WHERE run = :run AND purpose = 'search' AND status = 'ok' AND component IS NOT NULL
ORDER BY kl DESC""",
    ),
    (
        "domains",
        "The plan that each text chose (in their order, then all together), and its KL over all prompts.",
        """\
SELECT s.step, plan_id, kl, fdt_mean, e.bits_per_weight
FROM steps s JOIN evaluations e USING (run, plan_id)
WHERE run = :run AND purpose = 'search' AND status = 'ok'
ORDER BY s.step""",
    ),
    (
        "bound",
        "SDT of every plan and its bound, (N - n) log2(DPPL), means over prompts.",
        """\
SELECT plan_id, num_compressed, kl, sdt_mean, n * list_avg([log2(x) FOR x IN dppl_list]) AS bound,
       sdt_mean / (n * list_avg([log2(x) FOR x IN dppl_list])) AS part
FROM evaluations JOIN (
    SELECT reference_id, max(len(continuation)) AS n FROM prompts GROUP BY reference_id
) USING (reference_id)
WHERE run = :run AND purpose = 'search' AND status = 'ok'
ORDER BY kl""",
    ),
    (
        "square-root",
        "The share of divergent tokens over the square root of KL, of every plan.",
        """\
SELECT plan_id, num_compressed, kl, sdt_mean / n AS share, sdt_mean / n / sqrt(kl) AS constant
FROM evaluations JOIN (
    SELECT reference_id, max(len(continuation)) AS n FROM prompts GROUP BY reference_id
) USING (reference_id)
WHERE run = :run AND purpose = 'search' AND status = 'ok' AND kl > 0
ORDER BY kl""",
    ),
    (
        "sampling",
        "Plan by plan: FDT, SDT and KL, and what the distributions that tokens are chosen from have in common.",
        """\
SELECT plan_id, bits_per_weight, fdt_mean, sdt_mean, kl,
       other_means[list_position(other_metrics, 'overlap')] AS overlap
FROM evaluations
WHERE run = :run AND purpose = 'search' AND status = 'ok'
ORDER BY kl""",
    ),
    (
        "speculative",
        "Plan by plan: tokens accepted of drafts of 1, 5 and 16 tokens, beside FDT, SDT and KL.",
        """\
SELECT plan_id, bits_per_weight, fdt_mean, sdt_mean, kl,
       other_means[list_position(other_metrics, 'accepted1')] AS accepted1,
       other_means[list_position(other_metrics, 'accepted')] AS accepted,
       other_means[list_position(other_metrics, 'accepted16')] AS accepted16
FROM evaluations
WHERE run = :run AND purpose = 'search' AND status = 'ok'
ORDER BY kl""",
    ),
    (
        "tasks",
        "The plans that were asked, in every metric; their answers are on the page.",
        """\
SELECT plan_id, bits_per_weight, fdt_mean, sdt_mean, kl, dppl, ppl
FROM evaluations
WHERE run = :run AND purpose = 'search' AND status = 'ok'
ORDER BY kl""",
    ),
)
