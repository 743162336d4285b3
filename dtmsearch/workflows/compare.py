"""Two models compared, whatever holds them: folders, GGUF files, servers. No search, no store, no Ray.

BASE's greedy continuations are the reference; OTHER is measured against it by a replica as plans are, or by what its
server tells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dtmsearch.analysis.format import counted
from dtmsearch.analysis.model_comparison import ComparedModel, ModelComparison, compared
from dtmsearch.core.checkpoint_files import is_gguf, read_model_config
from dtmsearch.core.documents import Document, Texts
from dtmsearch.core.evaluation import Continuation, ModelSpec, PromptTokens, Reference, ReplicaSettings
from dtmsearch.core.metric_registry import first_divergent_token, share_of_divergent_tokens
from dtmsearch.core.numeric_mode import NumericMode
from dtmsearch.core.positions import Positions
from dtmsearch.errors import UserError
from dtmsearch.model.modules.loading import checkpoint_folder, load_tokenizer, own_folder
from dtmsearch.model.replica.compared_replica import ComparedReplica, described, margins_of
from dtmsearch.model.replica.prompts import Cutter
from dtmsearch.model.replica.samples import written_out
from dtmsearch.workflows import served_model
from dtmsearch.workflows.compared_sides import (
    BaseSide,
    CompareSettings,
    OnStage,
    OtherSide,
    end_tokens,
    local_base,
    local_other,
    served_base,
    served_other,
)
from dtmsearch.workflows.server_requests import Served

# Of two vocabularies that are one, at most this share of tokens are written otherwise (special ones, unused ones).
_MOST_OTHER_TOKENS = 0.01
# Texts by which a server's tokenizer is looked at, and tokens of each.
_LOOKED_AT, _LOOKED_AT_TOKENS = 4, 64


@dataclass(frozen=True)
class _Side:
    """A model on this machine (`spec`), or one behind a server."""

    name: str
    spec: ModelSpec | None = None
    served: Served | None = None

    @property
    def at(self) -> Served:
        assert self.served is not None
        return self.served


def compare(
    base: str | Path,
    other: str | Path,
    texts: str | Sequence[str],
    *,
    on_stage: OnStage = lambda text, done: None,
    **settings: Any,
) -> ModelComparison:
    """FDT, SDT, DPPL, PPL and KL of `other` against `base`, each a folder that transformers loads (quantized or not), a
    hub id, a GGUF file, or a server of the OpenAI kind (`http://host:port`, `#MODEL` behind it where it has several).

    `texts` are documents, of which `count` windows of `prompt_tokens` + `continuation_tokens` tokens are drawn by
    `seed`: the first part of each is a prompt, from which BASE goes on greedily. Further `settings`: `dtype`,
    `attention`, `trust_remote_code`, `batch_tokens` of models on this machine; `tokenizer`, a folder, where both are
    servers; `timeout_seconds`, `top`, `threads` of servers; `examples`, the most divergent prompts that are written
    out. Of a server that tells the likeliest tokens alone, KL is a lower bound; of one that tells none, FDT is all.

    Raises `UserError` for models of different vocabularies, for what cannot be loaded, and for too little text;
    `ServerUnreachable` for a server that does not answer in time.
    """
    documents: list[Document] = [texts] if isinstance(texts, str) else list(texts)
    return compare_by(str(base), str(other), documents, CompareSettings(**settings), on_stage)


def compare_by(
    base: str, other: str, documents: Texts, settings: CompareSettings, on_stage: OnStage = lambda text, done: None
) -> ModelComparison:
    """As `compare`."""
    sides = [_side(name, role, settings, on_stage) for role, name in (("BASE", base), ("OTHER", other))]
    tokenizer, notes = _tokenizer(sides, settings)
    # A server answers with one token more than it is asked about.
    contexts = {side.name: side.served.context - 1 for side in sides if side.served is not None and side.served.context}
    contexts |= {side.name: context for side in sides if side.spec and (context := _context(side.spec))}
    shortest = min(contexts, key=lambda name: contexts[name], default=base)
    cutter = Cutter(tokenizer, shortest, contexts.get(shortest), len(tokenizer))
    lengths = settings.prompt_tokens, settings.continuation_tokens
    prompts = cutter.prompts(documents, settings.count, *lengths, settings.seed, (), "count")
    notes += [*prompts.notes, *_checked_servers(sides, tokenizer, prompts)]
    one, two = _measured(sides[0], sides[1], prompts, tokenizer, settings, on_stage)
    models = (_facts(sides[0], one.way), _facts(sides[1], two.way))
    found = compared(*models, one.reference, two.found, one.text_nll, settings.seed, (*notes, *two.notes))
    worst = _most_divergent(one.reference, two.found, settings.examples)
    if not worst:
        return found
    on_stage("writing out the most divergent prompts", "")
    return replace(found, texts=tuple(_texts(tokenizer, one, two, worst)))


def _side(name: str, role: str, settings: CompareSettings, on_stage: OnStage) -> _Side:
    if served_model.is_url(name):
        on_stage(f"{role}: asking {name}", "")
        served = served_model.connect(name, settings.timeout_seconds, settings.top)
        return _Side(served.name, served=served)
    spec = ModelSpec(
        name,
        dtype=settings.dtype,
        attention=settings.attention,
        trust_remote_code=settings.trust_remote_code,
        compile="never",
    )
    own_folder(spec)
    return _Side(name, spec)


def _context(spec: ModelSpec) -> int | None:
    """What a model on this machine reads at most, by its configuration; None where that does not say."""
    config = read_model_config(_folder(spec))
    text = config.get("text_config")
    found = (text if isinstance(text, dict) else config).get("max_position_embeddings", config.get("n_positions"))
    return found if isinstance(found, int) else None


def _facts(side: _Side, way: str) -> ComparedModel:
    return ComparedModel(side.name, "served" if side.spec is None else described(side.spec), way)


# One vocabulary.


def _folder(spec: ModelSpec) -> Path:
    folder = own_folder(spec)
    return checkpoint_folder(spec) if is_gguf(folder) else folder


def _tokenizer(sides: Sequence[_Side], settings: CompareSettings) -> tuple[Any, list[str]]:
    """The tokenizer that prompts are cut with, BASE's where it is known. Raises `UserError` where two models have
    different ones, or none is known."""
    named = [ModelSpec(settings.tokenizer, trust_remote_code=settings.trust_remote_code)] if settings.tokenizer else []
    roots = [
        ModelSpec(side.served.root) for side in sides if side.served is not None and Path(side.served.root).is_dir()
    ]
    local = [side.spec for side in sides if side.spec is not None]
    specs = [*named, *local] if local or named else roots[:1]
    if not specs:
        raise UserError(
            "both models are served, and neither server names a folder on this machine: say with --tokenizer which "
            "folder holds their tokenizer"
        )
    tokenizers = [load_tokenizer(_folder(spec) if spec in local else Path(spec.path), spec) for spec in specs]
    notes = []
    for spec, found in zip(specs[1:], tokenizers[1:], strict=True):
        notes += _check_same_vocabulary(specs[0].path, tokenizers[0], spec.path, found)
    return tokenizers[0], notes


def _check_same_vocabulary(name: str, tokenizer: Any, other_name: str, other: Any) -> list[str]:
    """Raises `UserError` where ids mean other tokens; a note where few do."""
    own, theirs = ({index: token for token, index in each.get_vocab().items()} for each in (tokenizer, other))
    shared = own.keys() & theirs.keys()
    differing = sorted(index for index in shared if own[index] != theirs[index])
    most = max(len(own), len(theirs))
    if len(differing) + most - len(shared) > _MOST_OTHER_TOKENS * most:
        shown = "; ".join(f"token {i} is {own[i]!r} and {theirs[i]!r}" for i in differing[:2])
        raise UserError(
            f"{name} and {other_name} have different vocabularies ({len(own):,} and {len(theirs):,} tokens"
            f"{f'; {shown}' if shown else ''}): only models of one vocabulary can be compared token by token"
        )
    if not differing:
        return []
    return [
        f"{counted(len(differing), 'token')} of the vocabularies are written otherwise, such as {own[differing[0]]!r}"
    ]


def _checked_servers(sides: Sequence[_Side], tokenizer: Any, prompts: PromptTokens) -> list[str]:
    texts = [
        tokenizer.decode(row[:_LOOKED_AT_TOKENS].tolist(), skip_special_tokens=True)
        for row in prompts.tokens[:_LOOKED_AT]
    ]
    notes = []
    for side in sides:
        if side.served is None:
            continue
        how = served_model.check_tokenizer(side.served, tokenizer, [text for text in texts if text.strip()])
        if not how:
            notes.append(f"{side.name} gives no way to look at its tokenizer: that it is the same is taken for granted")
    return notes


# Measuring.


def _measured(
    base: _Side, other: _Side, prompts: PromptTokens, tokenizer: Any, settings: CompareSettings, on_stage: OnStage
) -> tuple[BaseSide, OtherSide]:
    replicas = ReplicaSettings(batch_tokens=settings.batch_tokens)
    if base.spec is not None:
        one, suppressed = local_base(base.spec, prompts, replicas, on_stage)
        mode = one.reference.mode
    if other.spec is not None:
        on_stage("OTHER: loading", other.name)
        replica = ComparedReplica(other.spec, replicas, suppressed if base.spec is not None else None)
        if base.spec is None:
            mode, rules = replica.conditions()
            one = served_base(base.at, prompts, rules.suppressed, mode, settings, on_stage)
        return one, local_other(replica, one, on_stage)
    if base.spec is None:
        folder = Path(settings.tokenizer or base.at.root or other.at.root)
        mode = NumericMode("unknown", "server", "unknown")
        one = served_base(base.at, prompts, end_tokens(folder, tokenizer), mode, settings, on_stage)
    return one, served_other(other.at, one, tokenizer, settings, on_stage)


# Side by side.


def _most_divergent(reference: Reference, found: Positions, most: int) -> list[int]:
    """Prompts that diverge first, among equals those that diverge more; none that never does."""
    masked = found.diverged & reference.agrees
    fdt, sdt = first_divergent_token(masked), share_of_divergent_tokens(masked)
    order = sorted(range(len(fdt)), key=lambda row: (fdt[row], -sdt[row], row))
    return [row for row in order if fdt[row] < reference.continuation_tokens][:most]


def _texts(tokenizer: Any, one: BaseSide, two: OtherSide, rows: Sequence[int]) -> list[Continuation]:
    reference = one.reference
    own = two.go_on(rows)
    base = reference.continuation[list(rows)]
    unknown = np.full(base.shape, np.nan, np.float32)
    margins = unknown if one.outputs is None else margins_of(one.outputs, rows, reference.suppressed)
    start = PromptTokens(reference.text[list(rows)], reference.prompt_tokens)
    return written_out(tokenizer, rows, start, (list(base), list(margins)), own)
