"""`mtcl serve`: a run behind HTTP."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from mtcl_torchrec.cli.app import ContentsOption, ItemsOption, app, newer_files
from mtcl_torchrec.cli.arguments import check_model
from mtcl_torchrec.schema import ConfigError


@app.command()
def serve(
    run_dir: Annotated[
        list[Path],
        typer.Argument(help="What `mtcl train`, `demo` or `export` wrote; several runs are one deep ensemble."),
    ],
    host: Annotated[str, typer.Option(help="The address to listen on.  There is no authentication.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    watch: Annotated[float, typer.Option(min=0, help="Seconds between looks for a newer model; 0: none.")] = 5,
    max_candidates: Annotated[int, typer.Option(min=1, help="Candidates, items or rows in one request.")] = 5000,
    max_batch: Annotated[int, typer.Option(min=1, help="Rows of several requests that are scored together.")] = 2000,
    gather_ms: Annotated[
        float, typer.Option(min=0, max=1000, help="How long a request waits for others; 0: each by itself.")
    ] = 2,
    max_open: Annotated[int, typer.Option(min=1, help="Requests at a time; a further one is answered 503.")] = 64,
    max_body_mb: Annotated[float, typer.Option(min=0.001, max=1024, help="Largest body of a request.")] = 4,
    threads: Annotated[
        int | None, typer.Option(min=1, help="torch's threads in a forward; one less than cores by default.")
    ] = None,
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], typer.Option(help="debug also says which users ask.")
    ] = "info",
    contents: ContentsOption = None,
    items: ItemsOption = None,
) -> None:
    """Answer POST /recommend and /score over HTTP, by the run's model.

    A newer model in RUN_DIR, new fusion weights, or a newer file of --contents or --items take over without a request
    being dropped: found by looking, on SIGHUP, or on POST /reload.  GET /healthz, /metrics (Prometheus), /openapi.json
    and /docs.  SIGTERM finishes what is in flight.
    """
    check_model(run_dir, "serve")
    from mtcl_torchrec.serving.recommender import Recommender

    try:
        from mtcl_torchrec.serving.http.app import Limits
        from mtcl_torchrec.serving.http.process import serve
    except ImportError as error:
        raise ConfigError(f"mtcl serve needs more packages: pip install 'mtcl_torchrec[serve]' ({error})") from None
    limits = Limits(max_batch=max_batch, gather_ms=gather_ms, max_open=max_open, max_body=int(max_body_mb * 2**20))
    newer = newer_files(contents, items)
    serve(
        run_dir, partial(Recommender.load, **newer), host=host, port=port, watch=watch, max_candidates=max_candidates,
        beside=[*newer["contents"].values(), *newer["items"]], limits=limits, threads=threads, log_level=log_level,
    )  # fmt: skip
