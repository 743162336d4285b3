"""The server behind `dtmsearch ui`: a store's runs, fronts, comparisons and reports as pages that follow what is
written.

It reads the store and writes nothing. It listens on this machine alone, answers only who has the token, only to its own
name, and only to GET. Knows what a request may ask for, nothing of how a page looks.
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any

from dtmsearch.analysis.format import plain
from dtmsearch.errors import DtmError, UserError
from dtmsearch.store.store import ResultStore
from dtmsearch.ui import pages

try:
    from aiohttp import web
except ImportError as error:
    raise UserError(f"the pages need {error.name}, which is not installed here: pip install 'dtmsearch[ui]'") from error

HOST = "127.0.0.1"
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
# Nothing that a page shows may stay in a cache, be framed by another page, or tell another where it was.
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def serve(store: ResultStore, port: int, ready: Callable[[str], None]) -> None:
    """Serve a store until interrupted. `ready` is told the address, token included, once it answers; port 0 takes one
    that is free. Raises `UserError` where the port is taken."""
    asyncio.run(_serve(store, port, ready))


async def _serve(store: ResultStore, port: int, ready: Callable[[str], None]) -> None:
    token = secrets.token_urlsafe(24)
    runner = web.AppRunner(application(store, token), access_log=None)
    await runner.setup()
    try:
        site = web.TCPSite(runner, HOST, port)
        try:
            await site.start()
        except OSError as error:
            raise UserError(
                f"port {port} of {HOST} cannot be had ({error.strerror}): give another with --port"
            ) from None
        ready(f"http://{HOST}:{runner.addresses[0][1]}/?token={token}")
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()


def application(store: ResultStore, token: str) -> web.Application:
    """The routes, behind what guards them all."""
    reading = asyncio.Lock()

    async def read(what: Callable[..., Any], *arguments: Any) -> Any:
        """What reads a store blocks: one at a time, beside the loop that answers."""
        async with reading:
            return await asyncio.to_thread(what, store, *arguments)

    async def all_runs(request: web.Request) -> web.Response:
        return _html(await read(pages.runs_page))

    async def one_run(request: web.Request) -> web.Response:
        return _html(await read(pages.run_page, request.match_info["run"]))

    async def compared(request: web.Request) -> web.Response:
        one, other = (request.query.get(name, "") for name in ("one", "other"))
        return _html(await read(pages.compared_page, one, other))

    async def state_of_runs(request: web.Request) -> web.Response:
        return web.json_response(plain(await read(pages.states)))

    async def state_of_run(request: web.Request) -> web.Response:
        return web.json_response(plain(await read(pages.state, request.match_info["run"])))

    served = web.Application(middlewares=[_guard(token)])
    served.router.add_get("/", all_runs)
    served.router.add_get("/run/{run}", one_run)
    served.router.add_get("/compare", compared)
    served.router.add_get("/api/runs", state_of_runs)
    served.router.add_get("/api/runs/{run}", state_of_run)
    return served


def _guard(token: str) -> Any:
    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        refused = _refusal(request, token)
        if refused is not None:
            answer: web.StreamResponse = _text(HTTPStatus.FORBIDDEN, refused)
        elif "token" in request.query:
            # Into a cookie, so that it stands in no history and no link.
            answer = web.Response(status=HTTPStatus.SEE_OTHER, headers={"Location": _without_token(request)})
            answer.set_cookie(_cookie(request), token, httponly=True, samesite="Strict", path="/")
        else:
            answer = await _answered(request, handler)
        answer.headers.update(_HEADERS)
        return answer

    return guard


def _refusal(request: web.Request, token: str) -> str | None:
    """Why a request is not answered; None where it is. Another name in `Host` is a page of elsewhere that had its own
    name resolve to this machine."""
    if request.host not in {f"{name}:{_port(request)}" for name in (HOST, "localhost")}:
        return "This server answers to its own address only."
    given = request.query.get("token") or request.cookies.get(_cookie(request), "")
    if not hmac.compare_digest(given.encode(), token.encode()):
        return "The token is missing or wrong: open the address that `dtmsearch ui` printed."
    return None


async def _answered(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except UserError as error:
        return _text(HTTPStatus.NOT_FOUND, str(error))
    except DtmError as error:  # a store that is damaged, or gone
        return _text(HTTPStatus.SERVICE_UNAVAILABLE, str(error))
    except web.HTTPException as error:  # no such route, no such method
        return _text(HTTPStatus(error.status), error.reason)


def _port(request: web.Request) -> int:
    return int(request.transport.get_extra_info("sockname")[1]) if request.transport is not None else 0


def _cookie(request: web.Request) -> str:
    """Cookies are shared by all ports of a machine, so each server has its own."""
    return f"dtmsearch-{_port(request)}"


def _without_token(request: web.Request) -> str:
    """A path on this server, whatever was asked for: two slashes would begin another's address."""
    left = [(name, value) for name, value in request.query.items() if name != "token"]
    return "/" + str(request.rel_url.with_query(left)).lstrip("/\\")


def _html(text: str) -> web.Response:
    return web.Response(text=text, content_type="text/html")


def _text(status: HTTPStatus, text: str) -> web.Response:
    return web.Response(status=status, text=text + "\n")
