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
)
