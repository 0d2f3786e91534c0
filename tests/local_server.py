"""An OpenAI-compatible server on this machine, for tests: what it answers depends on the words of the prompt.

In the test's process (`LocalServer`), or as a process of its own that can be killed:
`python local_server.py PORT LOG DELAY`, which writes a line to LOG for each request.
"""

import json
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # one packet for head and body

    def do_POST(self) -> None:
        server: Any = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
        name = match[0] if (match := re.search(r"problem \d+", text)) else text
        with server.lock:
            server.asked[name] += 1
            nth = server.asked[name]
            server.in_flight += 1
            server.most = max(server.most, server.in_flight)
            server.bodies.append((self.path, self.headers, body))
            if server.log:
                server.log.write(name + "\n")
                server.log.flush()
        try:
            self.respond(text, name, nth, body)
        finally:
            with server.lock:
                server.in_flight -= 1

    def respond(self, text: str, name: str, nth: int, body: dict[str, Any]) -> None:
        time.sleep(self.server.delay)  # type: ignore[attr-defined]
        storm = re.search(r"STORM (\d+) after (\S+)", text)
        status = re.search(r"STATUS (\d+)( once)?", text)
        if storm and nth <= int(storm[1]):
            self.send(429, {"error": {"message": "slow down"}}, {"Retry-After": storm[2]})
        elif status and (not status[2] or nth == 1):
            self.send(int(status[1]), {"error": {"message": f"the server's words\non {name}", "code": None}})
        elif "CONTEXT" in text:
            self.send(400, {"error": {"message": "too many tokens", "code": "context_length_exceeded"}})
        elif "BROKEN" in text and nth == 1:
            self.close_connection = True
        elif "TORN" in text and nth == 1:
            self.send(200, {"choices": []}, {"Content-Length": "9999"})
            self.close_connection = True
        elif "HANGING" in text and nth == 1:
            time.sleep(2)
        elif "HTML" in text:
            self.send(200, "<html>a page</html>", {"Content-Type": "text/html"})
        else:
            self.complete(text, name, body)

    def complete(self, text: str, name: str, body: dict[str, Any]) -> None:
        finish = "length" if "LENGTH" in text else "content_filter" if "FILTER" in text else "stop"
        if "messages" not in body:
            choice = {"index": 0, "text": f"completes {name}", "finish_reason": finish}
            self.send(200, {"id": "1", "object": "text_completion", "model": body["model"], "choices": [choice]})
            return
        message: dict[str, Any] = {"role": "assistant", "content": f"answers {name} — ∑ 答え 🙂\u2028\x00"}
        if "EMPTY" in text:
            message["content"] = " \n"
        if "REFUSE" in text:
            message |= {"content": None, "refusal": "I will not"}
        if "THINK" in text:
            message["reasoning_content"] = "\nso\n"
        if "MUSE" in text:
            message |= {"content": None, "reasoning": "still"}
        choice = {"index": 0, "message": message, "finish_reason": finish}
        usage = {"prompt_tokens": 3, "completion_tokens": 7, "total_tokens": 10}
        self.send(200, {"id": "1", "object": "chat.completion", "model": body["model"], "choices": [choice], "usage": usage})

    def send(self, status: int, value: object, headers: dict[str, str] | None = None) -> None:
        data = value.encode() if isinstance(value, str) else json.dumps(value).encode()
        self.send_response(status)
        for key, word in {"Content-Type": "application/json", "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, word)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_arguments: object) -> None:
        pass


class LocalServer(ThreadingHTTPServer):
    """Counts what it was asked (`asked`, by problem) and how many requests it had at once (`most`)."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128

    def __init__(self, port: int = 0, log: str = "", delay: float = 0.0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.lock, self.asked, self.delay = threading.Lock(), Counter[str](), delay
        self.in_flight = self.most = 0
        self.bodies: list[tuple[str, Any, dict[str, Any]]] = []
        self.log = open(log, "a") if log else None  # noqa: SIM115

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, *_arguments: object) -> None:
        """Say nothing of clients that have gone."""


@contextmanager
def serving() -> Iterator[LocalServer]:
    """Run a server in a thread of this process meanwhile."""
    server = LocalServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


if __name__ == "__main__":
    LocalServer(int(sys.argv[1]), sys.argv[2], float(sys.argv[3])).serve_forever()
