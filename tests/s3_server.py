"""An S3 server on loopback, for tests and for `benchmarks/scale.py`."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_READY = "Running on http://"


@contextmanager
def s3_server(log: Path) -> Iterator[str]:
    """Start a server with one bucket, named bucket; give the query of URIs into it.

    Every request is a line in `log`.
    """
    from pyarrow.fs import FileSystem

    with log.open("wb") as output:
        server = subprocess.Popen(
            [sys.executable, "-u", "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"],
            stdout=output,
            stderr=output,
        )
    try:
        while _READY not in log.read_text():
            assert server.poll() is None, log.read_text()
            time.sleep(0.05)
        address = log.read_text().partition(_READY)[2].split()[0]
        query = f"endpoint_override=http://{address}&region=us-east-1"
        uri = f"s3://bucket?{query}&allow_bucket_creation=true"
        FileSystem.from_uri(uri)[0].create_dir("bucket")
        yield query
    finally:
        server.kill()
        server.wait()
