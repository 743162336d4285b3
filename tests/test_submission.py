"""What travels to a cluster and what does not, and what its nodes are held to."""

from __future__ import annotations

from pathlib import Path

import pytest
from ray.job_submission import JobDetails, JobStatus

from dtmsearch.cli import main
from dtmsearch.cli.searching import _written, run_verb
from dtmsearch.cluster import versions as pins
from dtmsearch.cluster.jobs import Jobs, Order, _exit_code
from dtmsearch.cluster.tokens import refused
from dtmsearch.config import SearchFile, load
from dtmsearch.config.texts import paths, text_files
from dtmsearch.errors import ClusterUnreachable, JobNotBegun, UserError
from dtmsearch.workflows.submit import _again, check_sendable, pack, submit

SEARCH = """
run: mine
model: {{path: hub/model}}
prompts: {{files: {files}}}
search: {{schemes: [int8-channel]}}
"""


def search_file(folder: Path, *files: str) -> SearchFile:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mine.yaml").write_text(SEARCH.format(files=list(files)))
    return load(folder / "mine.yaml")


def unpacked(file: SearchFile, into: Path) -> SearchFile:
    """The search file as the driver on the cluster reads it."""
    parcel = pack(file)
    parcel.write(into, (file.folder / "mine.yaml").read_text())
    return load(into / parcel.search_path, parcel.overrides)


def contents(file: SearchFile) -> list[str]:
    return [path.read_text() for path in text_files(file, file.prompts)]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder of searches, with texts beside it, above it and below it."""
    for name in ("home/searches/beside.txt", "home/searches/below/a.txt", "home/above.txt", "far.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "home/searches/below/b.txt").write_text("b")
    return tmp_path / "home" / "searches"


@pytest.mark.parametrize(
    "names", [["beside.txt"], ["below/*.txt"], ["../above.txt", "beside.txt"], ["../../far.txt", "../above.txt"]]
)
def test_relative_names_mean_the_same_in_a_parcel(texts: Path, tmp_path: Path, names: list[str]) -> None:
    file = search_file(texts, *names)
    assert contents(unpacked(file, tmp_path / "there")) == contents(file)


def test_a_parcel_leaves_a_search_of_relative_names_as_it_is(texts: Path, tmp_path: Path) -> None:
    file = search_file(texts, "../above.txt", "below/*.txt")
    assert unpacked(file, tmp_path / "there").to_yaml() == file.to_yaml()


def test_an_absolute_name_travels_into_the_parcel(texts: Path, tmp_path: Path) -> None:
    file = search_file(texts, str(texts / "below" / "*.txt"))
    there = unpacked(file, tmp_path / "there")
    assert all(path.is_relative_to(tmp_path / "there") for path in text_files(there, there.prompts))


def test_a_parcel_holds_texts_and_nothing_else(texts: Path) -> None:
    (texts / "model.safetensors").write_text("weights")
    assert sorted(path.name for path in pack(search_file(texts, "below/*.txt")).files.values()) == ["a.txt", "b.txt"]


def test_a_missing_text_is_said_before_anything_is_sent(texts: Path) -> None:
    with pytest.raises(ValueError, match=r"no prompt file 'gone\.txt'"):
        pack(search_file(texts, "gone.txt"))


def test_credentials_in_the_store_s_url_are_refused(texts: Path) -> None:
    search_file(texts, "beside.txt")
    with pytest.raises(ValueError, match="holds credentials"):
        submit(texts / "mine.yaml", (), "http://127.0.0.1:9", "s3://key:secret@bucket/store")


@pytest.mark.parametrize(
    ("address", "store"),
    [
        ("http://somebody:secret@127.0.0.1:9", "s3://bucket/store"),
        ("somebody:secret@127.0.0.1:9", "s3://bucket/store"),
        ("http://127.0.0.1:9?token=secret", "s3://bucket/store"),
        ("http://127.0.0.1:9", "s3://bucket/store?secret_key=secret"),
    ],
)
def test_credentials_in_an_address_are_refused_and_not_repeated(texts: Path, address: str, store: str) -> None:
    search_file(texts, "beside.txt")
    with pytest.raises(UserError, match="holds credentials") as caught:
        submit(texts / "mine.yaml", (), address, store)
    assert "=secret" not in str(caught.value) and ":secret" not in str(caught.value)


@pytest.mark.parametrize("name", [".env", "below/.hidden/notes.txt", "server.pem", "id_rsa"])
def test_a_private_file_that_a_pattern_takes_along_is_not_sent(texts: Path, name: str) -> None:
    (texts / name).parent.mkdir(parents=True, exist_ok=True)
    (texts / name).write_text("TOKEN=1")
    file = search_file(texts, "**/*")
    with pytest.raises(UserError, match=rf"{Path(name).name} is .*--any-file"):
        check_sendable(file, pack(file))


def test_a_link_out_of_the_folder_is_not_sent(texts: Path) -> None:
    (texts / "link.txt").symlink_to(texts.parent / "above.txt")
    file = search_file(texts, "link.txt")
    with pytest.raises(UserError, match=r"link\.txt is a link that leads out"):
        check_sendable(file, pack(file))


def test_texts_that_are_named_above_the_folder_are_sent(texts: Path) -> None:
    file = search_file(texts, "../above.txt", str(texts.parent.parent / "far.txt"))
    assert check_sendable(file, pack(file)) is None


def test_training_text_travels_too(texts: Path, tmp_path: Path) -> None:
    content = SEARCH.format(files=["beside.txt"]).partition("search:")[0]
    recovery = f"{{files: [below/a.txt, {texts / 'below' / 'b.txt'}]}}"
    content += f"search: {{strategy: sparsity, rounds: [20], recovery: {recovery}}}\n"
    (texts / "mine.yaml").write_text(content)
    there = unpacked(load(texts / "mine.yaml"), tmp_path / "there")
    assert there.search.recovery is not None
    sent = paths(there, there.search.recovery.files)
    assert [path.read_text() for path in sent] == ["home/searches/below/a.txt", "b"]
    assert all(path.is_relative_to(tmp_path / "there") for path in sent)


@pytest.mark.parametrize(("number", "text"), [(1234567, "1234567"), (0.1, "0.1"), (2.0, "2"), (1 / 3, repr(1 / 3))])
def test_a_number_is_passed_on_whole(number: float, text: str) -> None:
    assert _written(number) == text


def test_where_replicas_run_is_passed_on_as_options_that_run_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them, whatever kind of value they have."""
    passed: list[str] = []

    def caught(file: SearchFile, overrides: object, address: str, store: str, options: list[str], *_: object) -> None:
        passed.extend(options)
        raise UserError("enough")

    monkeypatch.setattr("dtmsearch.workflows.submit.submit", caught)
    search_file(tmp_path, "text.txt")
    where = ["--address", "http://a:1", "--batch-tokens", "1234567", "--weights", "streamed"]
    assert main(["submit", str(tmp_path / "mine.yaml"), *where]) == 2
    # As the command line has it, for a verb keeps what its first context says of --help.
    given = run_verb.make_context("run", ["file.yaml", *passed], help_option_names=["-h", "--help"]).params
    assert given["batch_tokens"] == 1234567 and given["weights"] == "streamed"


def test_a_dashboard_that_is_not_there_is_said_at_once() -> None:
    with pytest.raises(ClusterUnreachable, match="Connection refused"):
        Jobs("http://127.0.0.1:9")


def test_pinned_versions_that_are_installed_pass() -> None:
    pins.check(pins.environment(pins.versions()))


def test_another_version_than_the_pinned_one_is_named_with_both() -> None:
    here = pins.versions()["numpy"]
    with pytest.raises(ValueError, match=rf"numpy {here} \(pinned to 0\.1\).*--pins install"):
        pins.check(pins.environment({"numpy": "0.1"}))


def test_without_pins_every_version_passes() -> None:
    pins.check({})


def test_pins_that_are_to_be_installed_stand_in_the_job_s_environment() -> None:
    order = Order("true", Path("work"), pip=("numpy==2.0.0",))
    assert order.runtime_env["pip"] == {"packages": ["numpy==2.0.0"], "pip_check": False}


@pytest.mark.parametrize(
    ("error", "says"),
    [
        ("Authentication required: 401", "lets nobody in without its token. Set RAY_AUTH_MODE=token"),
        ("Authentication failed: 403", "does not accept this token"),
        ("", "If it is a Ray cluster, it wants its token"),
    ],
)
def test_a_refusal_says_what_to_do_about_the_token(error: str, says: str) -> None:
    assert says in refused("http://there:8265", error)


PIP_FAILED = """Failed to set up runtime environment.
Traceback (most recent call last):
SubprocessCalledProcessError: Run cmd[9] failed with the following details.
    ERROR: Could not find a version that satisfies the requirement numpy==2.4.6 (from versions: none)
    ERROR: No matching distribution found for numpy==2.4.6
"""


def test_a_job_whose_pins_cannot_be_installed_says_which_and_what_else_there_is() -> None:
    job = JobDetails(  # type: ignore[call-arg]
        type="SUBMISSION",
        entrypoint="true",
        submission_id="mine",
        status=JobStatus.FAILED,
        error_type="RUNTIME_ENV_SETUP_FAILURE",
        message=PIP_FAILED,
    )
    with pytest.raises(
        JobNotBegun, match=r"environment of job mine: .*No matching distribution found for numpy==2\.4\.6"
    ) as said:
        _exit_code(job)
    assert "Traceback" not in str(said.value) and "--pins none" in str(said.value)


def test_the_command_that_continues_a_submitted_search_holds_in_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    again = _again(Path("a search.yaml"), ("seed=1",), "http://there:8265", "s3://b/s", ["--replicas", "8"], "install")
    assert again == (
        f"dtmsearch submit '{tmp_path}/a search.yaml' --set seed=1 --address http://there:8265 --store s3://b/s "
        "--replicas 8 --pins install"
    )
