"""`python -m vllm.entrypoints.openai.api_server --model FOLDER --port N ...`, as far as a start and an end go.

`FAKE_ENGINE` is JSON: folder -> the address of the server that answers for it, or what happens instead: `dies` at the
start, `ends` at the first question, `sleeps` and never answers.
"""

from __future__ import annotations

import json
import os
import sys
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

# So often /health is answered that the model still loads; what else is asked until then is a fault.
LOADS_UNTIL_ASKED = 0


def main() -> None:
    given = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=False))
    Path(os.environ["FAKE_ENGINE_STARTED"]).write_text(f"{os.getpid()}\n{' '.join(sys.argv[1:])}\n")
    behaviour = json.loads(os.environ["FAKE_ENGINE"])[given["--model"]]
    if behaviour == "dies":
        sys.stderr.write("(EngineCore pid=7) ERROR ValueError: Failed to find a kernel that can implement this\n")
        raise RuntimeError("Engine core initialization failed. See root cause above.")
    if behaviour == "sleeps":
        sys.stderr.write("loading weights\n")
        time.sleep(600)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def passed_on(self, body: bytes | None) -> None:
            url = "http://127.0.0.1:1" if behaviour == "ends" else behaviour
            request = urllib.request.Request(url + self.path, body, {"Content-Type": "application/json"})
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    status, content = answer.status, answer.read()
            except urllib.error.HTTPError as error:
                status, content = error.code, error.read()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def loads(self) -> bool:
            global LOADS_UNTIL_ASKED
            if LOADS_UNTIL_ASKED and self.path == "/health":
                LOADS_UNTIL_ASKED -= 1
                self.send_error(503)
                return True
            if LOADS_UNTIL_ASKED and self.command == "POST":
                sys.stderr.write("ValueError: asked while it loads\n")
                os._exit(9)
            return False

        def do_GET(self) -> None:
            if self.loads():
                return
            if behaviour == "ends":
                content = json.dumps({"data": [{"id": "tiny"}]}).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
                return
            self.passed_on(None)

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self.loads()
            if behaviour == "ends":
                sys.stderr.write("Illegal instruction\n")
                os._exit(9)
            self.passed_on(body)

    ThreadingHTTPServer((given["--host"], int(given["--port"])), Handler).serve_forever()


if __name__ == "__main__":
    main()
