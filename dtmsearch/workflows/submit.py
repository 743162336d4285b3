"""A search as a parcel for a cluster: its file and its texts in a folder, the command that runs it there.

Weights never travel: the model's path or hub id means the same on every node. Knows search files and command lines,
and leaves to `cluster.submit` how a job is run.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shlex
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import parse_qsl, urlsplit

import dtmsearch
from dtmsearch.cluster import versions as pins
from dtmsearch.cluster.jobs import Job, Jobs, Order
from dtmsearch.config import PromptsSection, SearchFile, load, texts
from dtmsearch.core.identity import file_digest
from dtmsearch.core.records import CONTINUE_VARIABLE
from dtmsearch.core.user_files import read_text
from dtmsearch.errors import UserError

Pins = Literal["check", "install", "none"]

_SEARCH_FILE = "search.yaml"
# Folders below the parcel's own, one for each `..` that the search file's paths begin with.
_LEVEL = "in"
_ABSOLUTE = "absolute"
_KEY_SUFFIXES = (".pem", ".key", ".p12", ".pfx", ".kdbx", ".env")
_KEY_NAMES = ("id_rsa", "id_dsa", "id_ecdsa", "id_ed25519", "credentials", "credentials.json", "secrets.json")
# In the names of an address's parameters.
_SECRET_WORDS = ("key", "secret", "token", "password", "signature", "credential")
_NOT_SENT = ("__pycache__", "*.pyc", "*.safetensors", "*.bin")


@dataclass(frozen=True)
class Submission:
    """A search that was handed to a cluster. `notes` say what its user has to know of paths."""

    run: str
    job: Job
    store: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Parcel:
    """What travels: `files` by their path in the parcel, and the overrides that say where things lie there."""

    files: dict[str, Path]
    search_path: str
    overrides: tuple[str, ...]

    def write(self, folder: Path, search_text: str) -> None:
        for path, source in self.files.items():
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
        search = folder / self.search_path
        search.parent.mkdir(parents=True, exist_ok=True)
        search.write_text(search_text, encoding="utf-8")


def submit(
    path: Path,
    overrides: tuple[str, ...],
    address: str,
    store: str,
    where: Sequence[str] = (),
    pins_mode: Pins = "check",
    any_file: bool = False,
) -> Submission:
    """Run the search of a file as a job of the cluster at `address`, or attach to the job that runs it already.

    `where` are options of `dtmsearch run` for the cluster, such as `--replicas 8`. `any_file` sends also what nobody
    means to send by a pattern: see `check_sendable`. Raises `UserError` for a user's mistake, `ClusterUnreachable`.
    """
    _refuse_credentials("the cluster's address", address)
    file = load(path, overrides)
    store, notes = _store_there(store)
    _refuse_credentials("model.path", file.model.path)
    parcel = pack(file)
    if not any_file:
        check_sendable(file, parcel)
    model, model_notes = _model_there(file)
    search_text = read_text(path, "search file")
    arguments = [a for override in (*overrides, *model, *parcel.overrides) for a in ("--set", override)]
    command = ["python", "-m", "dtmsearch", "run", parcel.search_path, *arguments, "--store", store]
    command += ["--address", "auto", *where]
    jobs = Jobs(address)
    with tempfile.TemporaryDirectory(prefix="dtmsearch-submit-") as folder:
        parcel.write(Path(folder) / "work", search_text)
        order = Order(
            command=shlex.join(command),
            folder=Path(folder) / "work",
            packages=(_package(Path(folder) / "dtmsearch"),),
            environment={CONTINUE_VARIABLE: _again(path, overrides, address, store, where, pins_mode, any_file)}
            | ({} if pins_mode == "none" else pins.environment(pins.versions())),
            pip=_requirements() if pins_mode == "install" else (),
            facts={"store": store, "search": _fingerprint(file, parcel)},
        )
        return Submission(file.run, jobs.submit(file.run, order), store, (*notes, *model_notes))


def pack(file: SearchFile) -> Parcel:
    """The text files of a search file, laid out so that its relative paths mean in the parcel what they mean here.

    Absolute paths are the exception: they get a place in the parcel, and overrides that name it.
    """
    sections = {"prompts": file.prompts, "validation": file.validation_prompts}
    if file.calibration is not None and (file.calibration.files or file.calibration.mix):
        sections["calibration"] = file.calibration_text
    own = {name: section.files for name, section in sections.items() if section is not None and section.files}
    mixed = {name: section.mix for name, section in sections.items() if section is not None and section.mix}
    if file.search.recovery is not None:
        own["search.recovery"] = file.search.recovery.files
    every = [*own.values(), *(part.files for parts in mixed.values() for part in parts)]
    relative = {os.path.normpath(found) for names in every for name in names for found in _relative(file, name)}
    depth = max((Path(name).parts.count("..") for name in relative), default=0)
    home = Path(*[_LEVEL] * depth)
    files: dict[str, Path] = {}
    overrides = []
    for section_name, given in own.items():
        names = [_place(file, name, home, files) for name in given]
        if names != list(given):
            overrides.append(f"{section_name}.files={json.dumps(names)}")
    for section_name, parts in mixed.items():
        placed = [
            part.model_copy(update={"files": tuple(_place(file, name, home, files) for name in part.files)})
            for part in parts
        ]
        if placed != list(parts):
            overrides.append(f"{section_name}.mix={json.dumps([part.model_dump(mode='json') for part in placed])}")
    if file.search.times is not None:  # what its file holds
        overrides.append(f"search.times={file.search.times.model_dump_json()}")
    return Parcel(files, str(home / _SEARCH_FILE), tuple(overrides))


def check_sendable(file: SearchFile, parcel: Parcel) -> None:
    """Raises `UserError` for files of a parcel that a pattern such as `*` takes along unseen: hidden ones, keys, and
    links that lead out of the folder in which they lie."""
    for path in parcel.files.values():
        why = _private(file.folder.absolute(), Path(os.path.normpath(path.absolute())))
        if why is not None:
            raise UserError(f"{path} is {why}, so it is not sent to the cluster: name other texts, or give --any-file")


def _private(folder: Path, path: Path) -> str | None:
    """Why a text is none that somebody meant to send; None if nothing speaks against it."""
    inside = path.is_relative_to(folder)
    parts = path.relative_to(folder).parts if inside else path.parts
    if any(part.startswith(".") for part in parts):
        return "hidden, or in a hidden folder"
    if path.suffix.lower() in _KEY_SUFFIXES or path.name.lower() in _KEY_NAMES:
        return "a key, by its name"
    around = folder if inside else path.parent
    if not path.resolve().is_relative_to(around.resolve()):
        return f"a link that leads out of its folder, to {path.resolve()}"
    return None


def _relative(file: SearchFile, name: str) -> list[str]:
    """The files of a relative name, as paths from the search file's folder; none for an absolute name."""
    if Path(name).expanduser().is_absolute():
        return []
    return [_from_folder(file, path) for path in _found(file, name)]


def _found(file: SearchFile, name: str) -> list[Path]:
    return texts.text_files(file, PromptsSection(files=(name,)))


def _from_folder(file: SearchFile, path: Path) -> str:
    """A path from the search file's folder or, for what was found in the current one, from there."""
    if path.is_absolute():
        return os.path.relpath(path, file.folder)
    return str(path)


def _place(file: SearchFile, name: str, home: Path, files: dict[str, Path]) -> str:
    """Put the files of a name into the parcel; the name by which the search file will find them there."""
    if Path(name).expanduser().is_absolute():
        for path in _found(file, name):
            files[str(home / _ABSOLUTE / path.relative_to("/"))] = path
        return f"{_ABSOLUTE}/{Path(name).expanduser().relative_to('/')}"
    for path in _found(file, name):
        files[os.path.normpath(home / _from_folder(file, path))] = path
    return name


def _store_there(store: str) -> tuple[str, tuple[str, ...]]:
    """The store as the cluster has to name it. Raises `UserError` for a URL with credentials in it."""
    if "://" in store:
        _refuse_credentials("the store's URL", store)
        return store, ()
    folder = str(Path(store).expanduser().absolute())
    return folder, (f"the store {folder} is a folder of the cluster's head node; a bucket can be read from anywhere",)


def _refuse_credentials(what: str, address: str) -> None:
    """Raises `UserError` for an address with a user, a password or a token in it, without repeating it."""
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        keys = [key.lower() for key, _ in parse_qsl(parts.query)]
    except ValueError as error:
        raise UserError(f"{what} is no address: {error}") from None
    if "@" in parts.netloc or any(word in key for key in keys for word in _SECRET_WORDS):
        raise UserError(
            f"{what} holds credentials, which everybody who sees the cluster's jobs could read. Give the nodes a role, "
            "or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in their environment; a cluster's token goes into "
            "RAY_AUTH_TOKEN here"
        )


def _model_there(file: SearchFile) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Overrides and notes about the model: a local folder is not sent, so its whole path has to hold on every node."""
    path = file.model_spec.path
    if not Path(path).is_absolute():
        return (), ()
    note = f"weights are not sent: every node needs the model at {path}"
    return (() if path == file.model.path else (f"model.path={path}",)), (note,)


def _again(
    path: Path,
    overrides: tuple[str, ...],
    address: str,
    store: str,
    where: Sequence[str],
    pins_mode: Pins,
    any_file: bool = False,
) -> str:
    """The command that continues a submitted search, from whatever folder it is typed in."""
    options = [a for override in overrides for a in ("--set", override)]
    options += ["--address", address, "--store", store, *where]
    options += [] if pins_mode == "check" else ["--pins", pins_mode]
    options += ["--any-file"] if any_file else []
    return shlex.join(["dtmsearch", "submit", str(path.absolute()), *options])


def _package(target: Path) -> Path:
    """A copy of this package without weights, so that the cluster runs the same code as this machine."""
    shutil.copytree(Path(dtmsearch.__file__).parent, target, ignore=shutil.ignore_patterns(*_NOT_SENT))
    return target


def _requirements() -> tuple[str, ...]:
    """What this package needs, in the versions of this machine; Ray is the cluster's own."""
    from packaging.requirements import Requirement

    wanted = (Requirement(text) for text in importlib.metadata.requires("dtmsearch") or ())
    names = [r.name for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})]
    return tuple(f"{name}=={version}" for name, version in pins.versions(tuple(names)).items() if name != "ray")


def _fingerprint(file: SearchFile, parcel: Parcel) -> str:
    """Tells searches apart by what they are, their texts included."""
    digest = hashlib.sha256(file.to_yaml().encode())
    for path in sorted(parcel.files):
        digest.update(path.encode() + b"\0" + bytes.fromhex(file_digest(parcel.files[path])))
    return digest.hexdigest()[:16]
