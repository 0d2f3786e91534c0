"""The teacher runs in a process of its own, and sends hidden states. The student learns from its whole distribution.

    python examples/teacher_over_loopback.py                      # both, in a temporary folder
    python examples/teacher_over_loopback.py teacher 8800         # the teacher alone, on a port of this machine
    python examples/teacher_over_loopback.py student FOLDER http://127.0.0.1:8800

For each token the teacher sends its last hidden state, after its final norm: 2 bytes times its width. Its logits would be 2
bytes times the vocabulary. The student fetches the teacher's output layer once. After every step it keeps a checkpoint in
FOLDER. If the teacher dies, start it again and give the student the same command: it goes on where it was.
"""

import http.client
import os
import subprocess
import sys
import tempfile
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch

import topd

VOCAB, TEACHER_WIDTH, STUDENT_WIDTH, SEQUENCES, LENGTH, STEPS, PATIENCE_S = 1_000, 4_096, 32, 16, 64, 12, 60.0


class Teacher(torch.nn.Module):
    """Stands for a large model: its states say which token is likely after each token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = torch.nn.Embedding(VOCAB, TEACHER_WIDTH), torch.nn.RMSNorm(TEACHER_WIDTH)
        self.lm_head = torch.nn.Linear(TEACHER_WIDTH, VOCAB, bias=False)
        torch.nn.init.normal_(self.lm_head.weight, std=0.05)

    def states(self, input_ids):
        """Return the last hidden states, after the final norm: what the output layer multiplies."""
        return self.norm(self.embed(input_ids))


class Answers(BaseHTTPRequestHandler):
    """GET /head: the output layer. POST /states: token ids in, hidden states out."""

    def do_GET(self) -> None:
        self.send(self.server.teacher.lm_head.weight)

    def do_POST(self) -> None:
        ids = torch.frombuffer(bytearray(self.rfile.read(int(self.headers["Content-Length"]))), dtype=torch.int64)
        self.send(self.server.teacher.states(ids.view(shape_in(self.headers))))

    def send(self, values) -> None:
        data = values.detach().to(torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Shape", ",".join(map(str, values.shape)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_arguments) -> None:
        """Print no line for each request."""


def shape_in(headers):
    return [int(size) for size in headers["Shape"].split(",")]


def serve(port: int) -> None:
    """Answer until the process ends."""
    torch.manual_seed(0)
    server = ThreadingHTTPServer(("127.0.0.1", port), Answers)
    server.teacher = Teacher().requires_grad_(False)
    print(f"the teacher answers on http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()


def received(url: str, what: str, input_ids=None):
    """Return what the teacher sends, as float32; `what` names the request in an error."""
    headers = {} if input_ids is None else {"Shape": ",".join(map(str, input_ids.shape))}
    body = None if input_ids is None else input_ids.numpy().tobytes()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=PATIENCE_S) as answer:
            data, shape = bytearray(answer.read()), shape_in(answer.headers)
    except (OSError, http.client.HTTPException) as error:  # no connection, a torn answer, a timeout, an error's status
        raise ConnectionError(f"the teacher did not answer {what} at {url}: {type(error).__name__}: {error}") from error
    return torch.frombuffer(data, dtype=torch.bfloat16).view(shape).float()


class Student(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(VOCAB, STUDENT_WIDTH)
        self.lm_head = torch.nn.Linear(STUDENT_WIDTH, VOCAB, bias=False)

    @torch.no_grad()
    def rollouts(self):
        """Return tokens [B, T] that it samples itself."""
        columns = [torch.randint(VOCAB, (SEQUENCES,))]
        for _ in range(LENGTH - 1):
            columns.append(torch.multinomial(self.lm_head(self.embed(columns[-1])).softmax(-1), 1)[:, 0])
        return torch.stack(columns, 1)


def train(folder: Path, url: str) -> None:
    """Train from the teacher's states, from the checkpoint in `folder` where there is one."""
    torch.manual_seed(1)
    student, first, checkpoint = Student(), 0, folder / "student.pt"
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-1)
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        first = saved["step"]
        student.load_state_dict(saved["student"])
        optimizer.load_state_dict(saved["optimizer"])
        print(f"goes on at step {first} of {checkpoint}", flush=True)
    teacher = topd.Head(received(f"{url}/head", "the request for its output layer"))
    for step in range(first, STEPS):
        torch.manual_seed(step)  # a step that is done again samples the same tokens
        input_ids = student.rollouts()
        states = received(f"{url}/states", f"request {step}, of {SEQUENCES} x {LENGTH} tokens,", input_ids)
        loss = topd.linear_divergence(student.embed(input_ids), topd.Head(student.lm_head.weight), states, teacher).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        unfinished = checkpoint.with_suffix(".unfinished")
        torch.save({"step": step + 1, "student": student.state_dict(), "optimizer": optimizer.state_dict()}, unfinished)
        os.replace(unfinished, checkpoint)
        print(f"step {step:2d}  reverse KL to the teacher: {loss.item():8.5f} nats", flush=True)


def run_student(folder: Path, url: str) -> None:
    """Train; end with a message where the teacher is gone."""
    try:
        train(folder, url)
    except ConnectionError as error:
        again = f"{sys.argv[0]} student {folder} {url}"
        sys.exit(f"error: {error}\nstart the teacher again, then run: python {again}\nwhat was learned is in {folder}")


def main() -> None:
    if sys.argv[1:2] == ["teacher"]:
        serve(int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    elif sys.argv[1:2] == ["student"]:
        run_student(Path(sys.argv[2]), sys.argv[3])
    else:
        command = [sys.executable, __file__, "teacher"]
        with tempfile.TemporaryDirectory() as folder, subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as teacher:
            try:
                run_student(Path(folder), teacher.stdout.readline().split()[-1])
            finally:
                teacher.terminate()


if __name__ == "__main__":
    main()
