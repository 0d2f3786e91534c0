"""A way to a server that ends in the middle of an answer."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress


class CutOff:
    """Passes connections on to a port of this machine, one after the other. Of the last answer it passes on the first bytes.
    Then it calls `kill`, and closes. An answer of more than about 5 MB does not fit on the way: the server is still sending.

    Args:
        port: where the server is.
        answers: how many answers go through whole.
        passed: how many bytes of the next one.
        kill: ends the server.
    """

    def __init__(self, port: int, answers: int, passed: int, kill: Callable[[], None]) -> None:
        self.target, self.answers, self.passed, self.kill = port, answers, passed, kill
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listening.getsockname()[1]}"
        self.ever_sent = 0  # bytes of the last answer that left the server before it died

    def run(self) -> None:
        for _ in range(self.answers):
            self._pass_on(None)
        self._pass_on(self.passed)
        self.listening.close()

    def _pass_on(self, limit: int | None) -> None:
        student, _ = self.listening.accept()
        server = socket.socket()
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        server.connect(("127.0.0.1", self.target))
        with student, server:
            server.sendall(request_of(student))
            sent = 0
            while data := server.recv(1 << 14):
                student.sendall(data)
                sent += len(data)
                if limit is not None and sent > limit:
                    self.kill()
                    self.ever_sent = sent + drained(server)
                    return


def drained(server: socket.socket) -> int:
    """Return how many more bytes were on the way."""
    rest = 0
    with suppress(ConnectionError):
        while data := server.recv(1 << 16):
            rest += len(data)
    return rest


def request_of(student: socket.socket) -> bytes:
    """Return a whole request: its head, and as many bytes of a body as the head says."""
    request = b""
    while b"\r\n\r\n" not in request:
        request += student.recv(1 << 14)
    head, _, body = request.partition(b"\r\n\r\n")
    lengths = [int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")]
    while len(body) < sum(lengths):
        piece = student.recv(1 << 14)
        request, body = request + piece, body + piece
    return request


@contextmanager
def cut_off(port: int, answers: int, passed: int, kill: Callable[[], None]) -> Iterator[CutOff]:
    """Run a CutOff in a thread of this process meanwhile."""
    way = CutOff(port, answers, passed, kill)
    thread = threading.Thread(target=way.run, daemon=True)
    thread.start()
    yield way
    thread.join(timeout=30)
