"""Why a run failed, as its user says it: what went wrong first, ids of machines and processes left out."""

from __future__ import annotations

import re
from collections.abc import Mapping

from dtmsearch.analysis.format import counted

_LONGEST = 240
# Ids of Ray's nodes, actors, workers and tasks, and of our runs.
_ID = r"\b[0-9a-f]{24,}\b"
# Those that need no word before them: ours are shorter.
_WIDE_ID = r"\b[0-9a-f]{40,}\b"
_NOISE = re.compile(
    rf"\(?\b(?:on )?(?:the )?(?:node|actor|worker|task|job)(?:[ _-]?ids?)?[:= ]*{_ID}\)?"
    rf"|\(?\b(?:ip|pid|node_ip|namespace|class_name)\s*[:=]\s*[^\s,)]*\)?|{_WIDE_ID}",
    re.IGNORECASE,
)
# What Ray and torch say, first match first -> what it means to somebody who knows neither.
_MEANINGS = (
    (r"CUDA out of memory|out of memory on .*GPU", "a GPU had not enough memory for the model and a batch"),
    (r"OutOfMemory|out of memory|\bOOM\b|memory pressure|running low on memory", "a machine had not enough memory"),
    (r"its node has died|node (?:was )?(?:died|preempted|terminated|removed)|NodeDied", "the machine was lost"),
    (r"actor died|ActorDied|actor is dead|worker died|SYSTEM_ERROR|connection error code 2", "the process died"),
    (r"ActorUnavailable|actor .*unavailable", "the process did not answer any more"),
)
# Kinds of failed evaluations, of one and of several.
_KINDS = {
    "replica_lost": "given up, since replica after replica was lost over it",
    "out_of_memory": "without enough memory",
    "nonfinite": "without finite numbers (the plan breaks the model)",
    "invalid": "refused as invalid",
}


def headline(message: str) -> str:
    """What failed, in one line: the sentence of ours that a message begins with, and what its cause means; of a longer
    one the first lines. No ids of nodes and processes, which the run's log holds."""
    first, mark, cause = message.partition("; the last: ")
    meaning = next((words for pattern, words in _MEANINGS if re.search(pattern, cause or message, re.I)), None)
    if mark:
        return f"{_plain(first)}; the last: {meaning or _plain(_telling(cause))}"
    if meaning is not None and _NOISE.search(message):
        return meaning
    return _plain(_telling(message))


def _telling(text: str) -> str:
    """The line of a text that says most: the last of a traceback, else the first."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return text.strip()
    return lines[-1] if any(line.startswith("Traceback") for line in lines) else lines[0]


def _plain(text: str) -> str:
    """Without ids, shortened at a word."""
    cleaned = re.sub(r"\s+([,.;:)])", r"\1", re.sub(r"\s{2,}", " ", _NOISE.sub("", text))).strip(" ,;:")
    if len(cleaned) <= _LONGEST:
        return cleaned
    return cleaned[:_LONGEST].rsplit(" ", 1)[0] + " ..."


def failed_evaluations(failures: Mapping[str, int]) -> list[str]:
    """`3 plans without finite numbers (...)`, for each kind of failure."""
    return [f"{counted(number, 'plan')} {_KINDS.get(kind, kind)}" for kind, number in failures.items()]
