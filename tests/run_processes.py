"""Several processes of one run on this machine."""

import socket
import subprocess
import sys

from command import ENVIRONMENT, QUICK_COMPILATION, ROOT


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def start_all(command: list[str], count: int, devices: int) -> list[subprocess.Popen[str]]:
    """Processes of one run on this machine; `{}` in the command stands for what connects them."""
    port = free_port()
    flags = f"--xla_force_host_platform_device_count={devices} {QUICK_COMPILATION}"
    return [
        subprocess.Popen(
            [sys.executable, *(x.format(f"127.0.0.1:{port},{count},{i}") for x in command)],
            cwd=ROOT,
            env={**ENVIRONMENT, "XLA_FLAGS": flags},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for i in range(count)
    ]


def end_all(running: list[subprocess.Popen[str]], limit: float = 300) -> list[tuple[int, str, str]]:
    """Every process's exit status, output and errors."""
    try:
        texts = [process.communicate(timeout=limit) for process in running]
    finally:
        for process in running:
            process.kill()
    return [(process.returncode, *text) for process, text in zip(running, texts, strict=True)]
