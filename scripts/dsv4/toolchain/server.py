"""The servers of the runtimes: their command lines, their life, and what they answer.

vMLX, mlx-vlm and mlx_lm speak the same protocol, OpenAI's chat completions, each from a command of
its own; SERVERS has a row for each.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import queue
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsv4.errors import UserError
from dsv4.storage.checkpoint import parse_json
from dsv4.text import escape_line
from dsv4.toolchain.child_process import last_log_line
from dsv4.toolchain.python_env import LONG_PROMPTS, toolchain_environment

# vMLX 1.3.97 recognises the model family by the served name.
NAME = "deepseek-v4-flash-mlx-q4q8"
LM_NAME = "default_model"  # what mlx_lm calls the model that it was started with
HOST = "127.0.0.1"
# Of an answer when the request has no max_tokens, as vMLX 1.6.81 has it: mlx_lm ends one after 512,
# mlx-vlm after 2,048, thinking included.
ANSWER_TOKENS = "16384"
ANSWER_BYTES = 4 << 20  # of an answer: 1,000 tokens take 10 KB
TEXT = (str, None)
MESSAGE = {"content?": TEXT, "reasoning_content?": TEXT, "reasoning?": TEXT}
ANSWER = {"choices": [{"message": MESSAGE, "finish_reason?": TEXT}]}


@dataclass(frozen=True)
class Answer:
    """What the server said: visible text, reasoning, and why it stopped."""

    content: str
    reasoning: str
    finish_reason: str

    @property
    def text(self) -> str:
        return f"{self.reasoning} {self.content}".strip()


@dataclass(frozen=True)
class Server:
    """How a runtime's server is started: the words between Python and the bundle, those after the
    bundle, and the variables that it needs."""

    start: tuple[str, ...]
    options: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)


# By the package that tells a toolchain of the kind; of those that lie in one, the first serves.
SERVERS = {
    "vmlx": Server(
        ("-m", "vmlx_engine.cli", "serve"),
        ("--served-model-name", NAME),
    ),
    # Text needs no torchvision, and one that was built for another torch keeps it from starting.
    "mlx-vlm": Server(
        ("-c", "import sys; sys.modules['torchvision'] = None; "
               "from mlx_vlm.server import main; main()", "--model"),
        ("--max-tokens", ANSWER_TOKENS),
    ),
    # No mlx-lm has DeepSeek-V4 of its own: it is taught jang's model, whose cache is one for short
    # prompts without the variable. With it, no prompt's cache can be copied for the next prompt.
    "mlx-lm": Server(
        ("-c", "import jang_tools.dsv4.mlx_register; from mlx_lm.server import main; main()",
         "--model"),
        ("--prompt-cache-size", "0", "--max-tokens", ANSWER_TOKENS),
        LONG_PROMPTS,
    ),
}  # fmt: skip


def server_kind(packages: Mapping[str, str | None]) -> str:
    """Which of SERVERS a toolchain with these packages has. Raises UserError when it has none."""
    found = [kind for kind in SERVERS if packages.get(kind)]
    if not found:
        raise UserError("serve", "a toolchain without a server", " or ".join(SERVERS), "set STACK")
    return found[0]


def server_command(
    python: Path, bundle: Path, port: int, kind: str = "vmlx", start: tuple[str, ...] = ()
) -> list[str]:
    """The command line of one of SERVERS; start: other words than its own before the bundle."""
    server = SERVERS[kind]
    where = (str(bundle.resolve()), "--host", HOST, "--port", str(port))
    return [str(python), *(start or server.start), *where, *server.options]


def server_environment(kind: str) -> dict[str, str]:
    """The environment in which it is started."""
    return {**toolchain_environment(), **SERVERS[kind].env}


def check_free(port: int) -> None:
    """Raise UserError when something listens on the port already."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise UserError(
                f"{HOST}:{port}", error.strerror or str(error), "a free port", "choose PORT=…"
            ) from error


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def running_server(
    python: Path, bundle: Path, log: Path, patience: float = 180, kind: str = "vmlx",
    start: tuple[str, ...] = (),
) -> Iterator[str]:  # fmt: skip
    """Start one of SERVERS on a free port, yield its URL once it answers, and stop it at the end.

    start: as `command` takes it. Its output goes to `log`. Raises UserError when it ends early or
    does not answer in `patience` s.
    """
    port = free_port()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        server = subprocess.Popen(
            server_command(python, bundle, port, kind, start), stdout=output, stderr=output,
            env=server_environment(kind),
        )  # fmt: skip
        try:
            url = f"http://{HOST}:{port}"
            _wait_for(server, url, log, patience)
            yield url
        finally:
            server.terminate()
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def _wait_for(server: subprocess.Popen, url: str, log: Path, patience: float) -> None:
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise UserError(
                "the server",
                f"exit status {server.returncode}: {last_log_line(log)}",
                "a server that stays up",
                f"read {log}",
            )
        with contextlib.suppress(UserError):
            if http_exchange(url, "GET", "/health", "", 5)[0] == 200:
                return
        time.sleep(0.2)
    raise UserError("the server", f"no answer in {patience:.0f} s", "an answer", f"read {log}")


def served_name(names: list[str]) -> str:
    """Of the names that a server lists the one by which `make serve` serves; "" without one.

    vMLX is told NAME; mlx-vlm and mlx_lm go by the bundle's path.
    """
    return next((name for name in names if name == NAME or Path(name).is_absolute()), "")


def ask_question(
    url: str, question: str, max_tokens: int, timeout: float = 600, model: str = NAME
) -> Answer:
    """Ask one question at temperature 0. Raises UserError when the server gives no usable
    answer."""
    messages = [{"role": "user", "content": question}]
    return read_answer(
        chat_completion(url, {"model": model, "messages": messages}, max_tokens, timeout), url
    )


def chat_completion(url: str, talk: dict[str, Any], max_tokens: int, timeout: float = 600) -> bytes:
    """What a server answers to a talk at temperature 0. Raises UserError for another status than
    200."""
    body = json.dumps({**talk, "max_tokens": max_tokens, "temperature": 0})
    status, data = http_exchange(url, "POST", "/v1/chat/completions", body, timeout)
    if status != 200:
        detail = escape_line(data[:400].decode(errors="replace"), 400)
        raise UserError(url, f"HTTP {status}: {detail}", "200", "read the server's log")
    return data


def read_answer(data: bytes, url: str) -> Answer:
    """What the server at `url` said. Raises UserError when it is of another form, or nothing."""
    return parse_answer_text(parse_json(data, f"{url}: its answer", ANSWER), url)


def parse_answer_text(value: dict[str, Any], url: str) -> Answer:
    """The answer in what a server said, of the form ANSWER. Raises UserError when there is none."""
    if not value["choices"]:
        raise UserError(
            url, "no choices in its answer", "an answer", "start the server with `make serve`"
        )
    choice = value["choices"][0]
    message = choice["message"]
    return Answer(
        message.get("content") or "",
        message.get("reasoning_content") or message.get("reasoning") or "",
        choice.get("finish_reason") or "",
    )


def http_exchange(
    url: str, method: str, path: str, body: str, seconds: float, headers: Mapping[str, str] = {},
    hear: Callable[[bytes], bool] | None = None,
) -> tuple[int, bytes]:  # fmt: skip
    """One request to a server, directly: no proxy, and no redirection is followed.

    hear: told each piece of the answer as it comes; when it returns False, this side hangs up.
    Returns status and body. Raises UserError when that takes longer than `seconds` in all, whatever
    the server does meanwhile, or is more than ANSWER_BYTES.
    """
    answers: queue.SimpleQueue[tuple[int, bytes] | Exception] = queue.SimpleQueue()
    held: list[socket.socket] = []

    def work() -> None:
        try:
            answers.put(_http_exchange(url, method, path, body, seconds, headers, hear, held))
        except Exception as error:
            answers.put(error)

    threading.Thread(target=work, daemon=True).start()  # one that is stuck ends with this process
    try:
        answer = answers.get(timeout=max(seconds, 0))
    except queue.Empty as error:
        for connected in held:  # so that the server need not go on for nobody
            _close_connection(connected)
        raise UserError(url, f"no whole answer in {seconds:g} s", "one", "see its log") from error
    if isinstance(answer, (OSError, ValueError, http.client.HTTPException)):
        todo = "start the server with `make serve`"
        raise UserError(url, f"{type(answer).__name__}: {answer}", "an answer", todo) from answer
    if isinstance(answer, Exception):
        raise answer
    status, data = answer
    if len(data) > ANSWER_BYTES:
        raise UserError(
            url, f"more than {ANSWER_BYTES:,} bytes", "an answer", "read the server's log"
        )
    return status, data


def _http_exchange(
    url: str, method: str, path: str, body: str, seconds: float, headers: Mapping[str, str],
    hear: Callable[[bytes], bool] | None, held: list[socket.socket],
) -> tuple[int, bytes]:  # fmt: skip
    scheme, _, rest = url.partition("://")
    host, _, prefix = rest.partition("/")
    secure = scheme == "https"
    kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
    # A socket waits a little longer than `exchange`, whose line is the one to be read.
    with contextlib.closing(kind(host, timeout=seconds + 5)) as connection:
        connection.connect()
        held.append(connection.sock)
        headers = {"Content-Type": "application/json", **headers}
        connection.request(method, f"{prefix and '/'}{prefix}{path}", body.encode(), headers)
        with connection.getresponse() as response:
            data = bytearray()
            while len(data) <= ANSWER_BYTES and (piece := response.read1(65536)):
                data += piece
                if hear and not hear(piece):
                    _close_connection(held[0])
                    break
            return response.status, bytes(data)


def _close_connection(connected: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connected.shutdown(socket.SHUT_RDWR)
