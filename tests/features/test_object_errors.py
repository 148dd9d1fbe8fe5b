"""Object storage errors print one clear line, and credentials are neither shown nor stored."""

import http.server
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from egopatch.configs.schema import StoreConfig
from egopatch.features import BadLocation, StoreError, create_store, open_store
from egopatch.features.__main__ import main as features
from egopatch.features.io.bucket import Bucket, Version
from egopatch.features.values.errors import WriteConflict
from egopatch.features.values.location import ObjectUrl, parse_location
from tests.extract.fetch.loopback import Answer, answering
from tests.features.conftest import FINGERPRINT, IDS, SPEC, fill
from tests.features.objects import KEY, SECRET, objects
from tests.features.test_verify import clips_and_texts


def only_line(capfd: pytest.CaptureFixture[str]) -> str:
    """What was printed; never a credential, and an error in one line."""
    out, err = capfd.readouterr()
    assert SECRET not in out + err
    assert KEY not in out + err
    assert err.count("\n") <= 1
    return err


def _error(code: str, more: str = "") -> bytes:
    return f"<Error><Code>{code}</Code>{more}</Error>".encode()


def _refuse(request: http.server.BaseHTTPRequestHandler) -> Answer:
    """Repeats what it was sent, as S3 does with a key that it does not know."""
    sent = f"<StringToSign>{request.headers} {SECRET}</StringToSign><AWSAccessKeyId>{KEY}</AWSAccessKeyId>"
    elsewhere = "elsewhere" in request.path
    return 301 if elsewhere else 403, _error("PermanentRedirect" if elsewhere else "SignatureDoesNotMatch", sent), {}


@pytest.fixture
def refusing(environment: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with answering(_refuse) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server)
        yield


def test_refused_credentials_are_reported_without_showing_them(
    refusing: None, capfd: pytest.CaptureFixture[str]
) -> None:
    for command in (["info"], ["verify"], ["repair"]):
        assert features([*command, "s3://bucket/store"]) == 1
        line = only_line(capfd)
        assert "s3://bucket/store: 127.0.0.1 refused the credentials while " in line
        assert "; check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and their permissions" in line
    with pytest.raises(StoreError, match=r"refused the credentials while .* ") as caught:
        create_store("s3://bucket/store", SPEC, FINGERPRINT, IDS)
    assert caught.value.__cause__ is None  # a traceback would not show the server's text either
    assert caught.value.__suppress_context__


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (400, "ExpiredToken", "they have expired; set new ones (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION"),
        (403, "RequestTimeTooSkewed", "set this machine's clock"),
    ],
)
def test_expired_credentials_and_a_wrong_clock_are_named(
    status: int,
    code: str,
    said: str,
    environment: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with answering(lambda _: (status, _error(code), {})) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server)
        assert features(["info", "s3://bucket/store"]) == 1
    assert said in only_line(capfd)


def test_a_bucket_in_another_region_names_aws_region(refusing: None) -> None:
    with pytest.raises(
        StoreError, match=r"^s3://elsewhere/store: .* expects another region while .*; check AWS_REGION$"
    ):
        open_store("s3://elsewhere/store")


def test_a_missing_bucket_is_named(environment: str, capfd: pytest.CaptureFixture[str]) -> None:
    for command in ("info", "verify", "repair"):
        assert features([command, "s3://nowhere-at-all/store"]) == 1
        assert "bucket 'nowhere-at-all' does not exist at 127.0.0.1; create it, or check store.path" in only_line(capfd)
    with pytest.raises(StoreError, match="bucket 'nowhere-at-all' does not exist"):
        create_store("s3://nowhere-at-all/store", SPEC, FINGERPRINT, IDS)


def test_a_missing_store_is_reported_and_nothing_is_written(bucket: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert features(["info", f"{bucket}/nothing"]) == 1
    assert f"no store at {bucket}/nothing (store.json is missing)" in only_line(capfd)
    assert objects(bucket) == {}


def test_an_unreachable_endpoint_is_named_without_its_credentials(
    environment: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{KEY}:{SECRET.replace('/', '%2F')}@127.0.0.1:9")
    monkeypatch.setattr("egopatch.features.io.bucket.RETRIES", 1)
    assert features(["info", "s3://bucket/store"]) == 1
    assert "127.0.0.1 cannot be reached while reading store.json; check AWS_ENDPOINT_URL and" in only_line(capfd)


def test_a_listing_that_breaks_off_is_requested_again(environment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    breaks = 0

    def break_off(request: http.server.BaseHTTPRequestHandler) -> Answer:
        """Lists one object, or the folder of one, and breaks off within as many answers as there are still `breaks`."""
        nonlocal breaks
        key = "<Key>store/ledger/1</Key><LastModified>2026-01-01T00:00:00Z</LastModified><ETag>e</ETag><Size>1</Size>"
        folder = "<CommonPrefixes><Prefix>store/ledger/</Prefix></CommonPrefixes>"
        found = folder if "delimiter" in request.path else f"<Contents>{key}</Contents>"
        body = f"<ListBucketResult><IsTruncated>false</IsTruncated>{found}</ListBucketResult>".encode()
        breaks -= 1
        return 200, body if breaks < 0 else body[:20], {"Content-Length": str(len(body))}

    with answering(break_off) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server)
        bucket = Bucket(ObjectUrl("s3://bucket/store"))
        listings: dict[Callable[[], object], object] = {
            lambda: [*bucket.listing("ledger")]: ["ledger/1"],
            lambda: bucket.folders(""): {"ledger"},
            lambda: bucket.exists(""): True,
        }
        for listed, expected in listings.items():
            breaks = 2
            assert listed() == expected
        monkeypatch.setattr("egopatch.features.io.bucket.RETRIES", 1)
        breaks = 2
        with pytest.raises(StoreError, match="cannot be reached while listing ledger; check AWS_ENDPOINT_URL"):
            bucket.listing("ledger")


@pytest.mark.slow
def test_a_server_that_is_busy_for_seconds_is_asked_again(environment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first: list[float] = []

    def be_busy(request: http.server.BaseHTTPRequestHandler) -> Answer:
        """Asks for patience, for three seconds from the first request on."""
        first.append(time.monotonic())
        if first[-1] - first[0] < 3:
            return 503, _error("SlowDown"), {}
        return 200, b"content", {"ETag": "e", "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT"}

    with answering(be_busy) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server)
        assert Bucket(ObjectUrl("s3://bucket/store")).get("store.json").content == b"content"


def test_readers_of_a_server_that_fails_do_not_wait_for_each_other(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after the other would each ask for the ledger, in vain, for ten seconds."""
    import obstore
    from obstore.exceptions import GenericError

    store = create_store(f"{bucket}/store", SPEC, FINGERPRINT, IDS)
    fill(store)
    asked: list[str] = []

    def fail(at: object, key: str, **options: object) -> None:
        asked.append(key)
        raise GenericError("<Code>SlowDown</Code>")

    monkeypatch.setattr(obstore, "get", fail)
    with pytest.raises(StoreError, match=r"failed while reading shards/.* \(SlowDown\); run the same command again"):
        store.read(IDS)
    assert not [key for key in asked if "ledger" in key]


def test_a_conditional_write_of_a_deleted_object_is_a_conflict(
    environment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def know_nothing(request: http.server.BaseHTTPRequestHandler) -> Answer:
        """The key does not exist, as S3 says of a conditional write; or the bucket, if that has the name."""
        return 404, _error("NoSuchBucket" if "nowhere" in request.path else "NoSuchKey"), {}

    with answering(know_nothing) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server)
        with pytest.raises(WriteConflict, match=r"another process has written s3://bucket/store/ids\.jsonl in"):
            Bucket(ObjectUrl("s3://bucket/store")).put_if_unchanged("ids.jsonl", b"", Version("tag", None))
        with pytest.raises(StoreError, match="bucket 'nowhere' does not exist"):
            Bucket(ObjectUrl("s3://nowhere/store")).put_if_unchanged("ids.jsonl", b"", Version("tag", None))


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["AWS_ACCESS_KEY_ID"], "AWS_ACCESS_KEY_ID is not set; set it in the environment"),
        (["AWS_SECRET_ACCESS_KEY"], "AWS_SECRET_ACCESS_KEY is not set; set it in the environment"),
        (
            ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"],
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY are not set; set them in the environment",
        ),
    ],
)
def test_missing_credentials_name_the_unset_variables(
    environment: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], names: list[str], said: str
) -> None:
    for name in names:
        monkeypatch.delenv(name)
    assert features(["verify", "s3://bucket/store"]) == 2
    assert f"needs credentials, but {said}" in only_line(capfd)


def test_a_missing_obstore_names_the_pip_command(
    environment: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for module in [name for name in sys.modules if name.partition(".")[0] == "obstore"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "obstore", None)
    assert features(["info", "s3://bucket/store"]) == 2
    assert "needs the package obstore, which is not installed; run: pip install 'egopatch[s3]'" in only_line(capfd)


@pytest.mark.parametrize(
    "url",
    [
        f"s3://{KEY}:{SECRET}@bucket/store",
        f"s3://bucket/store?key={SECRET}",
        f"s3://bucket/store#{SECRET}",
        f"s3://{KEY}:{SECRET}/bucket",
    ],
)
def test_credentials_in_the_url_are_refused_and_not_repeated(url: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        features(["info", url])
    out, err = capfd.readouterr()
    assert SECRET not in out + err
    assert "credentials come from the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)" in " ".join(err.split())
    with pytest.raises(BadLocation) as refused:
        open_store(url)
    with pytest.raises(ValueError, match=r"store.path holds a user, a query or a fragment") as wrong:
        StoreConfig(path=url)
    assert SECRET not in str(refused.value) + str(wrong.value)


@pytest.mark.parametrize(
    "url", ["s3://bucket", "s3:///store", "ftp://host/store", "s3://bucket/a//b", "s3://b/../a", "s3://[bucket/a"]
)
def test_invalid_store_urls_are_refused(url: str) -> None:
    with pytest.raises(
        BadLocation, match="cannot be the location of a store; expected a folder, or scheme://bucket/prefix"
    ):
        open_store(url)


def test_hdf5_needs_a_folder(bucket: str) -> None:
    with pytest.raises(BadLocation, match=r"format is 'hdf5', but .*s3://.* and HDF5 needs a folder; use zarr"):
        create_store(f"{bucket}/store", SPEC, FINGERPRINT, IDS, "hdf5")
    with pytest.raises(ValueError, match=r"store.format is 'hdf5'; expected zarr in object storage"):
        StoreConfig(path="s3://bucket/store", format="hdf5")
    assert objects(bucket) == {}


def test_credentials_appear_in_no_output_log_or_file(
    bucket: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Through every command, with logging wide open."""
    caplog.set_level(logging.DEBUG)
    clips_and_texts(parse_location(f"{bucket}/store"), "zarr")
    assert features(["info", f"{bucket}/store"]) == 0
    assert features(["info", f"{bucket}/store", "--json"]) == 0
    assert features(["verify", f"{bucket}/store"]) == 0
    assert features(["repair", f"{bucket}/store"]) == 0
    assert features(["convert", f"{bucket}/store", "--dtype", "bfloat16"]) == 0
    assert features(["derive", f"{bucket}/store", "--keep", "0.5", "--to", str(tmp_path / "small")]) == 0
    out, err = capfd.readouterr()
    assert "store_bfloat16: 10 clips" in out
    held = b"".join([*objects(bucket).values(), *(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())])
    names = " ".join(objects(bucket))
    for credential in (KEY, SECRET):
        assert credential not in out + err + caplog.text + names
        assert credential.encode() not in held


def test_info_and_verify_work_on_a_store_in_a_bucket(bucket: str, capsys: pytest.CaptureFixture[str]) -> None:
    store = create_store(f"{bucket}/store", SPEC, FINGERPRINT, IDS)
    fill(store)
    assert features(["info", f"{bucket}/store", "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert (info["path"], info["committed"]) == (f"{bucket}/store", 10)
    assert features(["verify", f"{bucket}/store/", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"]
    assert features(["convert", f"{bucket}/store", "--to", f"{bucket}/store/copy"]) == 1
    assert "inside the store" in capsys.readouterr().err
