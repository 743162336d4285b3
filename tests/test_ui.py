"""What the server of `dtmsearch ui` answers, and to whom."""

from __future__ import annotations

import builtins
import http.client
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from reported import HOSTILE, make_run
from serving import served

from dtmsearch.cli import main


class Server:
    def __init__(self, address: str) -> None:
        self.address, parts = address, urlsplit(address)
        self.host, self.token = parts.netloc, parts.query.removeprefix("token=")
        self.cookie = f"dtmsearch-{parts.port}={self.token}"

    def ask(self, path: str, method: str = "GET", **headers: str) -> tuple[int, str, Any]:
        """Status, text and headers; with the cookie unless another is given, and the path as it stands."""
        connection = http.client.HTTPConnection(self.host, timeout=60)
        try:
            connection.putrequest(method, path, skip_host=True)
            for name, value in ({"Host": self.host, "Cookie": self.cookie} | headers).items():
                connection.putheader(name, value)
            connection.endheaders()
            answer = connection.getresponse()
            return answer.status, answer.read().decode(), answer.headers
        finally:
            connection.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("store")
    make_run(folder, "further", share=0.9)
    with served(make_run(folder)) as address:
        yield Server(address)


def test_the_list_names_every_run_and_holds_nothing_of_them_as_markup(server: Server) -> None:
    status, text, _ = server.ask("/")
    assert status == 200 and HOSTILE not in text
    assert '<a href="/run/toy">toy</a>' in text and '<a href="/run/further">' in text and "Size against quality" in text


def test_a_report_and_a_comparison_are_served(server: Server) -> None:
    (one, report, _), (both, compared, _) = server.ask("/run/toy"), server.ask("/compare?one=toy&other=further")
    assert (one, both) == (200, 200)
    assert "On held-out prompts" in report and 'data-url="/api/runs/toy"' in report
    assert "two runs compared" in compared and "all runs" in compared


def test_states_are_told_as_json(server: Server) -> None:
    status, text, headers = server.ask("/api/runs")
    states = {state["run"]: state for state in json.loads(text)}
    assert status == 200 and headers["Content-Type"].startswith("application/json")
    assert states.keys() == {"toy", "further"} and states["toy"]["status"] == "finished"
    assert json.loads(server.ask("/api/runs/toy")[1])["progress"].startswith("144 evaluations, step 6")


@pytest.mark.parametrize("path", ["/", "/run/toy", "/compare?one=toy&other=further", "/api/runs", "/nothing"])
@pytest.mark.parametrize("given", ["", "token=", "dtmsearch-1=x"])
def test_without_the_token_nothing_is_told(server: Server, path: str, given: str) -> None:
    status, text, _ = server.ask(path, Cookie=given)
    assert status == 403 and "token is missing or wrong" in text and "toy" not in text


def test_a_wrong_token_is_refused_beside_a_right_cookie(server: Server) -> None:
    assert server.ask(f"/?token={server.token}x")[0] == 403


@pytest.mark.parametrize("host", ["example.org", "127.0.0.1", "127.0.0.1:1", "localhost.example.org:80"])
def test_another_name_is_refused_whatever_its_token(server: Server, host: str) -> None:
    status, text, _ = server.ask(f"/?token={server.token}", Host=host)
    assert status == 403 and "own address" in text


@pytest.mark.parametrize(
    ("path", "location"), [("/", "/"), ("//example.org/x", "/example.org/x"), ("/run/a?b=c&", "/run/a?b=c")]
)
def test_the_token_goes_into_a_cookie_and_out_of_the_address(server: Server, path: str, location: str) -> None:
    asked = f"{path}token={server.token}" if "?" in path else f"{path}?token={server.token}"
    status, _, headers = server.ask(asked, Cookie="")
    assert (status, headers["Location"]) == (303, location)
    assert "HttpOnly" in headers["Set-Cookie"] and "SameSite=Strict" in headers["Set-Cookie"]


@pytest.mark.parametrize(
    "path",
    [
        "/../../etc/passwd",
        "/run/..%2f..%2fetc%2fpasswd",
        "/run/%2e%2e",
        "/run/nosuch",
        "/run/",
        "/static/x",
        "/api/runs/*",
    ],
)
def test_nothing_but_runs_can_be_asked_for(server: Server, path: str) -> None:
    status, text, _ = server.ask(path)
    assert status == 404 and "root:" not in text


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
def test_nothing_can_be_changed(server: Server, method: str) -> None:
    assert server.ask("/", method)[0] == 405


def test_answers_stay_with_who_asked(server: Server) -> None:
    _, _, headers = server.ask("/")
    assert headers["Cache-Control"] == "no-store" and headers["Referrer-Policy"] == "no-referrer"
    assert headers["Content-Security-Policy"] == "frame-ancestors 'none'"
    assert headers["X-Content-Type-Options"] == "nosniff"


def test_a_port_that_is_taken_is_said(server: Server, tmp_path: Path, capsys: Any) -> None:
    store = make_run(tmp_path)
    port = server.host.rpartition(":")[2]
    assert main(["ui", "--store", store.url, "--port", port]) == 2
    assert "give another with --port" in capsys.readouterr().err


def test_a_missing_library_is_said_with_the_command_that_installs_it(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "aiohttp":
            raise ModuleNotFoundError("No module named 'aiohttp'", name="aiohttp")
        return real(name, *rest)

    store = make_run(tmp_path)
    monkeypatch.delitem(sys.modules, "dtmsearch.ui.server", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    assert main(["ui", "--store", store.url]) == 2
    assert "pip install 'dtmsearch[ui]'" in capsys.readouterr().err
