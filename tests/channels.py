"""A chat's server on loopback, which a webhook leads to."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SECRET = "T000/B000/hunter2-of-nobody"
Answer = Callable[[BaseHTTPRequestHandler], None]


def answered(status: int) -> Answer:
    return lambda handler: handler.send_response(status) or handler.end_headers()


class Channel:
    """A chat's server on loopback; answers as it is told, and from then on with 200."""

    def __init__(self) -> None:
        channel = self
        self.asked: list[tuple[str, str, bytes]] = []
        self.answers: list[Answer] = []

        class Handler(BaseHTTPRequestHandler):
            def _take(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                channel.asked.append((f"{self.command} {self.path}", self.headers.get("Content-Type", ""), body))
                (channel.answers.pop(0) if channel.answers else answered(200))(self)

            do_GET = do_POST = _take  # noqa: N815 - names of the library

            def log_message(self, *arguments: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"
        self.url = f"{self.address}/services/{SECRET}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def texts(self) -> list[str]:
        return [json.loads(body)["text"] for _, _, body in self.asked]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
