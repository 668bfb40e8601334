"""The service as a process: its socket, its signals, its log."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Coroutine, Generator, Sequence
from pathlib import Path
from typing import Any

import torch
import uvicorn

from mtcl_torchrec.serving.http.app import Limits, create_app
from mtcl_torchrec.serving.http.ranking import Ranker
from mtcl_torchrec.serving.http.versions import Models

GRACE_S = 30  # for what is in flight when the process is told to end
log = logging.getLogger("mtcl_torchrec.serving.http")


def serve(
    path: Path | Sequence[Path],
    load: Callable[[Any], Ranker],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    watch: float = 5.0,
    max_candidates: int = 5000,
    beside: Sequence[Path] = (),
    limits: Limits | None = None,
    threads: int | None = None,
    log_level: str = "info",
) -> None:
    """Serve a model until SIGTERM or SIGINT; what is in flight then is finished.  SIGHUP loads a newer model now.

    Args:
        path: a run directory, or what else `load` reads; several are one model.
        load: makes a ranker of the path.
        host: the address to listen on; there is no authentication.
        port: 0 takes a free one; the log says which.
        watch: seconds between two looks at whether there is a newer model; 0: none.
        max_candidates: largest number of candidates, items wanted, or rows in one request.
        beside: files that `load` reads besides the path; a change of theirs is a newer model, too.
        limits: what else is taken on.
        threads: of torch in a forward; None leaves one core to the network, where OMP_NUM_THREADS does not say.
        log_level: such as "info" (one line for a request) or "debug" (and who asked).

    Raises:
        ConfigError: the model cannot recommend.
        DataError: there is no model.
        OSError: the address cannot be listened on.
    """
    _log_to_stderr(log_level)
    listening = _bound(host, port)
    if threads is None and "OMP_NUM_THREADS" not in os.environ:
        # Threads of a forward that wait for each other lose more to whatever else runs than they gain.
        threads = max(1, torch.get_num_threads() - 1)
    if threads is not None:
        torch.set_num_threads(threads)
    if not _is_loopback(listening):
        log.warning("%s is open to the network, and there is no authentication: see to who can reach it", host)
    models = Models(path, load, max_candidates=max_candidates, beside=beside)
    if models.in_training():
        log.warning("training of %s is not finished: this is its best epoch so far", models.shown)
    app = create_app(models, limits, watch=watch)
    config = uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=GRACE_S, lifespan="on",
                            server_header=False, proxy_headers=False)  # fmt: skip
    address, port = listening.getsockname()[:2]
    shown = f"[{address}]" if ":" in address else address
    ready = f"serving {models.shown} (model {models.current.name}) on http://{shown}:{port}"
    _Server(config, models.reload, ready).run(sockets=[listening])
    log.info("stopped")


class _Server(uvicorn.Server):
    """uvicorn's server, which says when it listens, ends with status 0 when told to end, and reloads on SIGHUP."""

    def __init__(self, config: uvicorn.Config, reload: Callable[[], Coroutine[Any, Any, Any]], ready: str) -> None:
        super().__init__(config)
        self._reload, self._ready = reload, ready
        self._reloading: set[asyncio.Task] = set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, and say so: who waits for the line may connect."""
        await super().startup(sockets)
        if self.started:
            log.info("%s", self._ready)

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Handle signals while the server runs."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        loop.add_signal_handler(signal.SIGHUP, self._on_hangup)
        yield

    def _on_hangup(self) -> None:
        task = asyncio.get_running_loop().create_task(self._reload())
        self._reloading.add(task)  # the loop itself keeps no task alive
        task.add_done_callback(self._reloading.discard)


def _bound(host: str, port: int) -> socket.socket:
    """A socket that holds the address and does not listen yet: nobody waits while the model is loaded."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        raise OSError(f"cannot listen on {host}:{port} ({error.strerror or error})") from None
    return listening


def _is_loopback(listening: socket.socket) -> bool:
    return ipaddress.ip_address(listening.getsockname()[0]).is_loopback


def _log_to_stderr(level: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for name, lowest in ((log.name, level.upper()), ("uvicorn.error", "WARNING")):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(lowest)
