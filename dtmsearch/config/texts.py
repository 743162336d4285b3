"""The texts and the model that a search file names, as far as the driver's own disk can tell. No torch."""

from __future__ import annotations

import codecs
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from dtmsearch.config import DatasetSection, MixedSection, PromptsSection, SearchFile
from dtmsearch.core.checkpoint_files import is_gguf, weight_files
from dtmsearch.core.documents import MESSAGE_COLUMNS, Document, Mixed, Texts, conversation_of
from dtmsearch.core.user_files import is_file, shown
from dtmsearch.core.vocabulary import check_known
from dtmsearch.errors import UserError

log = logging.getLogger(__name__)

# A dataset is read for so many characters for each token wanted, in which most texts hold the windows; then twice as
# far each time, where its rows are too short to.
_CHARACTERS_PER_TOKEN = 12
_GROWTH = 2
# Of one text, decompressed: a file of a few kilobytes may stand for terabytes.
_MOST_BYTES, _PIECE_BYTES = 1 << 30, 16 << 20
# Of which what is only looked at is tokenized at a time.
_PIECE_CHARACTERS = 1 << 20
# Where rows of files have their text.
_COLUMN = "text"
# So many lines show whether a text is rows of JSON under another name.
_FIRST_LINES = 5
# How files of other encodings begin; the longer mark first, which begins as the shorter does.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# Text holds no zero byte; a binary file has one soon.
_LOOKED_AT = 1 << 20


def check_model(file: SearchFile) -> None:
    """Raises `UserError` at once when the model's folder is there but holds no usable checkpoint, or is plainly a
    path to nothing. A hub id passes."""
    path = file.model.path
    folder = file.resolve(path)
    if is_gguf(folder):
        return
    looks_local = path.startswith(("/", "./", "../", "~")) or path.count("/") > 1
    if folder.is_dir() or looks_local:
        weight_files(folder)


def check_vocabulary(file: SearchFile) -> None:
    """Raises `UserError` where a text has tokens that the model has no embedding for, before anything is loaded.

    Texts are read only where the tokenizer can give such tokens at all, and lies here as `tokenizer.json`; of others,
    and of datasets, a replica says it.
    """
    folder = file.resolve(file.model.path)
    size = _vocabulary_size(folder)
    if size is None or not (folder / "tokenizer.json").is_file():
        return
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library raises no other; transformers may make something of it
        log.debug("the tokenizer at %s is not looked at: %s", folder, error)
        return
    if max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0) < size:
        return
    for section in (file.prompts, file.validation_prompts, file.calibration_text):
        for source in () if section is None else section.sources:
            for text in _texts_of(read_files(file, source.files, source.chat)):
                for piece in (text[at : at + _PIECE_CHARACTERS] for at in range(0, len(text), _PIECE_CHARACTERS)):
                    ids = tokenizer.encode(piece, add_special_tokens=False).ids
                    check_known(ids, size, lambda unknown: [str(tokenizer.id_to_token(i)) for i in unknown])


def _texts_of(documents: Sequence[Document]) -> Iterator[str]:
    """Texts, and what is said in conversations."""
    for document in documents:
        if isinstance(document, str):
            yield document
        else:
            yield from (text for _, text in document.messages)


def _vocabulary_size(folder: Path) -> int | None:
    """How many tokens the configuration of a model says that it knows; None where it says nothing."""
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        size = content.get("text_config", content).get("vocab_size")
    except (OSError, ValueError, AttributeError):
        return None
    return size if isinstance(size, int) else None


def check_readable(file: SearchFile) -> None:
    """Raises `UserError` for a text file of the search file that is not there, whose beginning is no text or cannot be
    read, or that is so short that no tokenizer could make its prompts of it."""
    sections = {"prompts": file.prompts, "validation": file.validation_prompts, "calibration": file.calibration_text}
    found = {name: text_files(file, section) for name, section in sections.items() if section is not None}
    if file.search.recovery is not None:
        found["recovery"] = paths(file, file.search.recovery.files)
    chats = {path for section in sections.values() if section is not None for path in _of_chats(file, section)}
    every = dict.fromkeys(path for own in found.values() for path in own)
    most_tokens = {path: _most_tokens(path, path in chats) for path in every}
    for name, section in sections.items():
        if section is not None and section.files and not section.chat:
            _check_length(name, section, {path: most_tokens[path] for path in found[name]})


def _of_chats(file: SearchFile, section: PromptsSection) -> list[Path]:
    return [path for source in section.sources if source.chat for path in paths(file, source.files)]


def _most_tokens(path: Path, chat: bool) -> float:
    """How many tokens a text can have at most, by its beginning: one for each byte. Raises `UserError` for what is no
    text."""
    if _is_parquet(path):
        _check_columns(path, chat)
        return math.inf  # its bytes are packed
    with _opened(path) as stream:
        beginning = stream.read(_LOOKED_AT)
    text = _decoded(path, beginning)
    if not text.strip():
        raise UserError(f"the text {path} is empty: give one that holds text like what the model is to write")
    if not _is_rows_of_json(path) and _looks_like_rows_of_json(text):
        raise UserError(f"{path} has an object of JSON on each line: name it .jsonl, and its texts are what is read")
    return len(beginning) + 1 if len(beginning) < _LOOKED_AT else math.inf


def _looks_like_rows_of_json(text: str) -> bool:
    """Whether the first lines are objects that have a text."""
    try:
        rows = [json.loads(line) for line in text.split("\n")[:_FIRST_LINES] if line.strip()]
    except ValueError:
        return False
    return all(isinstance(row, dict) and isinstance(row.get(_COLUMN), str) for row in rows)


def _check_length(name: str, section: PromptsSection, most_tokens: Mapping[Path, float]) -> None:
    # The first token of a window may be one that the tokenizer puts there.
    wanted = section.count * (section.prompt_tokens + section.continuation_tokens - 1)
    if sum(most_tokens.values()) < wanted:
        files = ", ".join(shown(path.name) for path in most_tokens)
        raise UserError(
            f"{name}.count asks for {section.count} prompts of {section.prompt_tokens} + {section.continuation_tokens} "
            f"tokens, for which {files} is too short: give more text, or a smaller count, prompt_tokens or "
            "continuation_tokens"
        )


def read(file: SearchFile, prompts: PromptsSection) -> Texts:
    """The documents that prompts are cut from: each file, or each row of a data set, is one; of a dataset as many as
    hold the windows if its rows are not much shorter than they are.

    Bytes that are not UTF-8 are read as U+FFFD. Raises `UserError` when one is missing.
    """
    return next(growing(file, prompts))


def growing(file: SearchFile, prompts: PromptsSection) -> Iterator[Texts]:
    """What `read` gives, then more and more of the same datasets until they end; files are read whole at once."""
    sources, tokens = prompts.sources, prompts.count * (prompts.prompt_tokens + prompts.continuation_tokens)
    whole = sum(source.weight for source in sources)
    under_way = [_growing(file, source, math.ceil(source.weight / whole * tokens)) for source in sources]
    if not prompts.mix:
        yield from under_way[0]
        return
    parts = [next(part) for part in under_way]
    weights = tuple(source.weight for source in sources)
    yield Mixed(tuple(parts), weights)
    while True:
        more = [next(part, None) for part in under_way]
        if all(part is None for part in more):
            return
        parts = [before if part is None else part for before, part in zip(parts, more, strict=True)]
        yield Mixed(tuple(parts), weights)


def _growing(file: SearchFile, source: MixedSection, tokens: int) -> Iterator[Sequence[Document]]:
    if source.dataset is None:
        yield read_files(file, source.files, source.chat)
        return
    enough = tokens * _CHARACTERS_PER_TOKEN
    rows: list[Document] = []
    characters = 0
    for row in _dataset_rows(file, source.dataset, source.chat):
        rows.append(row)
        characters += _length(row)
        if characters >= enough:
            yield list(rows)
            enough *= _GROWTH
    yield rows


def _length(document: Document) -> int:
    return len(document) if isinstance(document, str) else sum(len(text) for _, text in document.messages)


def read_files(file: SearchFile, names: Sequence[str], chat: bool = False) -> list[Document]:
    """The documents that a search file names: each file one, but each row of `.jsonl` and `.parquet` files, which hold
    conversations if it is `chat`; what ends in `.zst` or `.gz` is decompressed."""
    return [document for path in paths(file, names) for document in _documents(path, chat)]


def documents_of(path: Path) -> list[Document]:
    """The documents of one file, read as `read_files` reads it. Raises `UserError` for what is no text."""
    if not is_file(path):
        raise UserError(f"no text at {path}: give a file of plain text, .jsonl or .parquet")
    return list(_documents(path, chat=False))


def read_texts(file: SearchFile, names: Sequence[str]) -> list[str]:
    """As `read_files`, of text alone."""
    return [document for document in read_files(file, names) if isinstance(document, str)]


def _documents(path: Path, chat: bool) -> Sequence[Document]:
    if _is_parquet(path):
        return _conversations(path) if chat else _column(path)
    text = _decoded(path, _content(path))
    if _is_rows_of_json(path):
        return list(_rows_of_json(path, text, chat))
    if chat:
        raise UserError(f"{path} holds text, and chat: true wants conversations: .jsonl or .parquet rows of messages")
    return [text]


def _conversations(path: Path) -> list[Document]:
    """Those of a Parquet file's rows."""
    with _columns(path, MESSAGE_COLUMNS) as (file, found):
        if not found:
            wanted = " or ".join(map(repr, MESSAGE_COLUMNS[:2]))
            raise UserError(f"{path} has no column {wanted}, as chat: true wants")
        rows = file.read(found).to_pylist()
    return [conversation_of(row, f"row {number} of {path}") for number, row in enumerate(rows, start=1)]


def _name(path: Path) -> str:
    return path.name.lower().removesuffix(".zst").removesuffix(".gz")


def _is_parquet(path: Path) -> bool:
    return _name(path).endswith(".parquet")


def _is_rows_of_json(path: Path) -> bool:
    return _name(path).endswith((".jsonl", ".ndjson"))


def _decoded(path: Path, content: bytes) -> str:
    """Text by its byte order mark, else as UTF-8, in which bytes that are none are U+FFFD. Raises `UserError` for what
    is no text."""
    for mark, encoding in _MARKS:
        if content.startswith(mark):
            return content.decode(encoding, errors="replace")
    if b"\0" in content[:_LOOKED_AT]:
        raise UserError(
            f"{path} is no text: it holds zero bytes, as binary files do, or UTF-16 without a byte order mark. Give "
            "plain text in UTF-8, .jsonl or .parquet"
        )
    return content.decode(encoding="utf-8", errors="replace")


def _rows_of_json(path: Path, text: str, chat: bool) -> Iterator[Document]:
    """The texts of a file with an object on each line, or its conversations. Raises `UserError` naming the line that
    has none."""
    for number, line in enumerate(text.split("\n"), start=1):  # strings may hold what else ends lines
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            raise UserError(f"line {number} of {path} is no JSON: a .jsonl file has an object on each line") from None
        if chat and isinstance(row, dict):
            yield conversation_of(row, f"line {number} of {path}")
            continue
        value = row.get(_COLUMN) if isinstance(row, dict) else None
        if not isinstance(value, str):
            fields = f"its fields are {shown(', '.join(map(str, row)))}" if isinstance(row, dict) else "it is no object"
            raise UserError(f"line {number} of {path} has no text in a field {_COLUMN!r}: {fields}")
        yield value


def _check_columns(path: Path, chat: bool) -> None:
    """Raises `UserError` for what is no Parquet file with a column of text, or of conversations, by its end alone."""
    with _columns(path, MESSAGE_COLUMNS) if chat else _text_column(path):
        pass


def _column(path: Path) -> list[str]:
    with _text_column(path) as file:
        values = file.read([_COLUMN])[_COLUMN].to_pylist()
    return [value for value in values if value is not None]


@contextmanager
def _text_column(path: Path) -> Iterator[Any]:
    """A `pyarrow.parquet.ParquetFile` that has the column of texts."""
    import pyarrow as pa

    with _columns(path, (_COLUMN,)) as (file, found):
        kind = file.schema_arrow.field(_COLUMN).type if found else None
        if kind is None or not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            names = shown(", ".join(file.schema_arrow.names))
            raise UserError(f"{path} has no text in a column {_COLUMN!r}: its columns are {names}")
        yield file


@contextmanager
def _columns(path: Path, wanted: Sequence[str]) -> Iterator[tuple[Any, list[str]]]:
    """A `pyarrow.parquet.ParquetFile`, and which of some columns it has. Raises `UserError` for a damaged one."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            yield file, [name for name in wanted if name in file.schema_arrow.names]
    except (OSError, pa.ArrowException) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"cannot read {path}: it is no Parquet file, or a damaged one ({reason})") from None


def _content(path: Path) -> bytes:
    """Raises `UserError` for a file that cannot be read, is damaged, or holds more text than prompts are cut from."""
    with _opened(path) as stream:
        pieces, size = [], 0
        while size <= _MOST_BYTES and (piece := stream.read(_PIECE_BYTES)):
            pieces.append(piece)
            size += len(piece)
    if size > _MOST_BYTES:
        raise UserError(f"the text {path} is longer than {_MOST_BYTES >> 30} GiB: give a part of it")
    return b"".join(pieces)


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """A file's content, decompressed. Raises `UserError` where it cannot be read or is damaged, in the block too."""
    import pyarrow as pa

    try:
        with pa.input_stream(str(path)) as stream:  # which tells the compression by the name
            yield stream
    except (OSError, pa.ArrowException, UnicodeEncodeError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"cannot read the text {path}: it is damaged, or not to be read by you ({reason})") from None


def text_files(file: SearchFile, prompts: PromptsSection) -> list[Path]:
    """The files that prompts are cut from, patterns such as `docs/*.txt` expanded in order of name."""
    return [path for source in prompts.sources for path in paths(file, source.files)]


def paths(file: SearchFile, names: Sequence[str]) -> list[Path]:
    """The files of names or patterns in a search file. Raises `UserError` for one that is not there."""
    found: list[Path] = []
    for name in names:
        matches = _matches(file, name)
        if not matches:
            beside = file.folder.absolute() != Path.cwd()
            places = f"neither in {file.folder} nor in the current folder" if beside else "in the current folder"
            raise UserError(f"no prompt file {shown(name)}{',' if beside else ''} {places}")
        found += matches
    return found


def _matches(file: SearchFile, name: str) -> list[Path]:
    try:
        path = file.resolve(name)
        return [path] if path.is_file() else sorted(match for match in _expand(file, name) if match.is_file())
    except (OSError, RuntimeError):  # a name that no file can have, or of a user who is not known
        return []


def _expand(file: SearchFile, name: str) -> list[Path]:
    try:
        if Path(name).is_absolute():
            return list(Path("/").glob(str(Path(name).relative_to("/"))))
        return list(file.folder.glob(name)) or list(Path().glob(name))
    except (ValueError, NotImplementedError, OSError, RecursionError, IndexError):  # what is no pattern
        return []


def _dataset_rows(file: SearchFile, section: DatasetSection, chat: bool) -> Iterator[Document]:
    folder = file.resolve(section.path)
    path = str(folder) if folder.is_dir() else section.path
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError("prompts.dataset needs an extra: pip install 'dtmsearch[datasets]'") from None
    try:
        if _is_saved(folder):
            rows = _saved(folder, section)
        else:
            rows = load_dataset(path, section.name, split=section.split, streaming=True)
        for number, row in enumerate(rows, start=1):
            if chat:
                yield conversation_of(_with_messages(row, section), f"row {number} of dataset {section.path}")
                continue
            if section.column not in row:
                raise UserError(f"dataset {section.path} has no column {section.column!r}; it has {sorted(row)}")
            if not isinstance(row[section.column], str):
                raise UserError(f"dataset {section.path} has no text in its column {section.column!r}")
            yield row[section.column]
    except UserError:
        raise
    except Exception as error:  # every way in which a hub or a file can fail, told as one
        reason = next(iter(str(error).strip().splitlines()), "no reason given")[:200]
        raise UserError(
            f"cannot read dataset {shown(section.path)} (split {section.split}): {type(error).__name__}: {reason}"
        ) from error


def _with_messages(row: dict[str, Any], section: DatasetSection) -> dict[str, Any]:
    """A row whose conversation stands in a usual column, where the search file names another."""
    return row | {MESSAGE_COLUMNS[0]: row[section.column]} if section.column in row else row


# What `save_to_disk` leaves in the folder of a dataset, and of several splits.
_SAVED, _SAVED_SPLITS = "state.json", "dataset_dict.json"


def _is_saved(folder: Path) -> bool:
    return (folder / _SAVED).is_file() or (folder / _SAVED_SPLITS).is_file()


def _saved(folder: Path, section: DatasetSection) -> Any:
    """The rows of a dataset that `save_to_disk` has written, from its files as they are asked for."""
    from datasets import load_from_disk

    found = load_from_disk(str(folder))
    if (folder / _SAVED).is_file():
        return found
    if section.split not in found:
        raise UserError(f"dataset {section.path} has no split {section.split!r}; it has {', '.join(sorted(found))}")
    return found[section.split]
