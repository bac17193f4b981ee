"""Start and stop the runtimes' servers: vMLX, mlx-vlm and mlx_lm, a row of SERVERS for each.

All of them speak OpenAI's chat completions. dsv4/acceptance/client.py is the client.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dsv4.errors import UserError
from dsv4.toolchain.child_process import last_log_line
from dsv4.toolchain.python_env import LONG_PROMPTS, SCRIPTS, toolchain_environment

# vMLX 1.3.97 recognises the model family by the served name.
NAME = "deepseek-v4-flash-mlx-q4q8"
LM_NAME = "default_model"  # in mlx_lm, the model that it was started with
HOST = "127.0.0.1"
# Length of an answer to a request without max_tokens, thinking included. vMLX 1.6.81 has this
# value, mlx_lm 512, mlx-vlm 2,048.
ANSWER_TOKENS = "16384"


@dataclass(frozen=True)
class Server:
    """How to start a runtime's server.

    start: the arguments between Python and the bundle; options: those after the bundle; env: the
    environment variables that it needs; model: the model's name in requests, "" for the bundle's
    path.
    """

    start: tuple[str, ...]
    options: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    model: str = ""


# By package. Of the packages that a toolchain has, the first serves.
SERVERS = {
    "vmlx": Server(
        ("-m", "vmlx_engine.cli", "serve"),
        ("--served-model-name", NAME),
        model=NAME,
    ),
    # A torchvision built for another torch would keep it from starting. Text needs none.
    "mlx-vlm": Server(
        ("-c", "import sys; sys.modules['torchvision'] = None; "
               "from mlx_vlm.server import main; main()", "--model"),
        ("--max-tokens", ANSWER_TOKENS),
    ),
    # mlx-lm has no DeepSeek-V4: jang's model is registered with it. Without LONG_PROMPTS that model
    # has a cache for short prompts only; with it, no prompt's cache can be copied for the next one.
    # mlx_lm 0.31.3 answers GET /v1/models with an empty body where HF_HUB_CACHE does not exist. Any
    # folder without models will do.
    "mlx-lm": Server(
        ("-c", "import jang_tools.dsv4.mlx_register; from mlx_lm.server import main; main()",
         "--model"),
        ("--prompt-cache-size", "0", "--max-tokens", ANSWER_TOKENS),
        {**LONG_PROMPTS, "HF_HUB_CACHE": str(SCRIPTS / "stacks")},
        LM_NAME,
    ),
}  # fmt: skip


def server_kind(packages: Mapping[str, str | None]) -> str:
    """Return the key of SERVERS for a toolchain's packages. Raises UserError when it has none."""
    found = [kind for kind in SERVERS if packages.get(kind)]
    if not found:
        raise UserError("serve", "a toolchain without a server", " or ".join(SERVERS), "set STACK")
    return found[0]


def server_command(
    python: Path, bundle: Path, port: int, kind: str = "vmlx", start: tuple[str, ...] = ()
) -> list[str]:
    """Return the command line of one of SERVERS; start: replaces its own start."""
    server = SERVERS[kind]
    address = ("--host", HOST, "--port", str(port))
    return [str(python), *(start or server.start), f"{bundle.resolve()}", *address, *server.options]


def model_name(kind: str, bundle: Path) -> str:
    """Return the name by which requests to one of SERVERS call the bundle."""
    return SERVERS[kind].model or f"{bundle.resolve()}"


def server_environment(kind: str) -> dict[str, str]:
    """Return the environment of one of SERVERS."""
    return {**toolchain_environment(), **SERVERS[kind].env}


def check_free(port: int) -> None:
    """Raise UserError when the port is in use."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise UserError(
                f"{HOST}:{port}", error.strerror or str(error), "a free port", "choose PORT=…"
            ) from error


def free_port() -> int:
    """Return a port that is not in use."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def running_server(
    python: Path, bundle: Path, log: Path, patience: float = 180, kind: str = "vmlx",
    start: tuple[str, ...] = (),
) -> Iterator[str]:  # fmt: skip
    """Start one of SERVERS on a free port, yield its URL once it answers, and stop it at the end.

    start: see `server_command`. The server's output goes to `log`. Raises UserError when it ends
    early or does not answer within `patience` seconds.
    """
    port = free_port()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        server = subprocess.Popen(
            server_command(python, bundle, port, kind, start), stdout=output, stderr=output,
            env=server_environment(kind),
        )  # fmt: skip
        try:
            _wait_for(server, port, log, patience)
            yield f"http://{HOST}:{port}"
        finally:
            server.terminate()
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def _wait_for(server: subprocess.Popen, port: int, log: Path, patience: float) -> None:
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise UserError(
                "the server",
                f"exit status {server.returncode}: {last_log_line(log)}",
                "a server that stays up",
                f"read {log}",
            )
        if _is_healthy(port):
            return
        time.sleep(0.2)
    raise UserError("the server", f"no answer in {patience:.0f} s", "an answer", f"read {log}")


def _is_healthy(port: int) -> bool:
    with (
        contextlib.suppress(OSError, http.client.HTTPException),
        contextlib.closing(http.client.HTTPConnection(HOST, port, timeout=5)) as connection,
    ):
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    return False


def served_name(names: list[str]) -> str:
    """Return the name of the bundle among those that a server lists; "" when it is not listed.

    vMLX lists NAME, mlx-vlm and mlx_lm the bundle's path.
    """
    return next((name for name in names if name == NAME or Path(name).is_absolute()), "")
