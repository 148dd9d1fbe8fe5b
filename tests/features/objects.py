"""A bucket on a loopback server; a test module imports the fixtures `bucket`, `environment` and `server`."""

import subprocess
import sys
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

KEY, SECRET = "LOOPBACKKEYID", "loopback/secret+K3Y"


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """Its address."""
    pytest.importorskip("obstore", reason="needs the extra s3")
    script = Path(__file__).with_name("object_server.py")
    process = subprocess.Popen([sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
    finally:
        process.terminate()  # a forked child of a test may keep its standard input open
        process.communicate(timeout=10)


@pytest.fixture
def environment(server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The variables that a user sets; gives the server's address."""
    for name, value in {
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": server,
        "NO_PROXY": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    return server


@pytest.fixture
def bucket(environment: str) -> str:
    """URL of a folder in an empty bucket of its own."""
    name = f"bucket-{uuid.uuid4().hex[:12]}"
    urllib.request.urlopen(urllib.request.Request(f"{environment}/{name}", method="PUT")).close()
    return f"s3://{name}/some/stores"


def objects(url: str) -> dict[str, bytes]:
    """Everything in the bucket of `url`, by key."""
    import obstore
    from obstore.store import S3Store

    store = S3Store(url.split("/")[2], client_options={"allow_http": True})
    keys = [meta["path"] for page in obstore.list(store) for meta in page]
    found = {}
    for key in keys:
        # A job that is watched at work lets go of leases between the listing and the reading.
        with suppress(FileNotFoundError):
            found[key] = bytes(obstore.get(store, key).bytes())
    return found
