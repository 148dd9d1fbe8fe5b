"""Malicious or damaged archives leave the folder unchanged."""

import io
import os
import random
import shutil
import stat
import tarfile
import zipfile
from pathlib import Path

import pytest

from egopatch.extract.fetch import archives
from egopatch.extract.fetch.archives import ArchiveError, unpack

CLIP = "qa_videos/L1-F1|P1|10|95.mp4"


def tar(path: Path, members: dict[str, bytes | tarfile.TarInfo]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                archive.addfile(content)
                continue
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def zipped(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "into").mkdir()
    (tmp_path / "into" / "kept").write_bytes(b"kept")
    return tmp_path / "into"


def refused(archive: Path, folder: Path, message: str) -> str:
    """The line with which an archive is refused; the folder stays as it was."""
    with pytest.raises(ArchiveError, match=message) as error:
        unpack(archive, folder)
    assert "\n" not in str(error.value)
    assert files_in(folder) == {"kept": b"kept"}
    return str(error.value)


DAMAGED = "not a zip or tar file, or damaged or truncated"


@pytest.mark.parametrize("make", [tar, zipped])
def test_members_with_pipes_are_unpacked_next_to_existing_files(tmp_path: Path, folder: Path, make) -> None:  # type: ignore[no-untyped-def]
    (folder / "Data").mkdir()
    (folder / "Data" / "a").write_bytes(b"old")
    archive = make(tmp_path / "archive", {CLIP: b"video", "Data/a": b"new", "./Data/b/c": b""})
    assert unpack(archive, folder) == (3, 8)
    assert files_in(folder) == {CLIP: b"video", "Data/a": b"new", "Data/b/c": b"", "kept": b"kept"}


@pytest.mark.parametrize("make", [tar, zipped])
def test_unpacked_files_follow_the_umask(tmp_path: Path, folder: Path, make) -> None:  # type: ignore[no-untyped-def]
    archive = make(tmp_path / "archive", {CLIP: b"video"})
    before = os.umask(0o002)
    try:
        unpack(archive, folder)
    finally:
        os.umask(before)
    assert stat.S_IMODE((folder / CLIP).stat().st_mode) == 0o664
    assert stat.S_IMODE((folder / CLIP).parent.stat().st_mode) == 0o775


@pytest.mark.parametrize("make", [tar, zipped])
@pytest.mark.parametrize("name", ["../out", "/etc/out", "a/../../out", "a\\..\\out"])
def test_member_path_outside_the_folder_is_refused(tmp_path: Path, folder: Path, name: str, make) -> None:  # type: ignore[no-untyped-def]
    archive = make(tmp_path / "archive", {"good": b"1", name: b"2"})
    line = refused(archive, folder, "would be unpacked outside")
    assert repr(name) in line
    assert str(archive) in line
    assert sorted(p.name for p in tmp_path.iterdir()) == ["archive", "into"]


@pytest.mark.parametrize(
    "member",
    [
        special("link", tarfile.SYMTYPE, "/etc/passwd"),
        special("link", tarfile.SYMTYPE, "good"),
        special("link", tarfile.LNKTYPE, "good"),
        special("fifo", tarfile.FIFOTYPE),
        special("device", tarfile.CHRTYPE),
    ],
)
def test_links_and_devices_are_refused(tmp_path: Path, folder: Path, member: tarfile.TarInfo) -> None:
    archive = tar(tmp_path / "archive", {"good": b"1", "bad": member})
    refused(archive, folder, f"member '{member.name}' is neither a file nor a folder")


def test_a_link_in_a_zip_is_refused(tmp_path: Path, folder: Path) -> None:
    member = zipfile.ZipInfo("link")
    member.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "archive", "w") as archive:
        archive.writestr(member, "/etc/passwd")
    refused(tmp_path / "archive", folder, "member 'link' is neither a file nor a folder")


@pytest.mark.parametrize("make", [tar, zipped])
def test_archive_larger_than_the_free_disk_is_refused(
    tmp_path: Path,
    folder: Path,
    make,  # type: ignore[no-untyped-def]
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    archive = make(tmp_path / "archive", {"a": b"\0" * 600_000, "b": b"\0" * 600_000})
    assert archive.stat().st_size < 10_000
    free = archives.RESERVE + 1_000_000
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 10**12 - free, free))
    refused(archive, folder, r"unpacks to 1\.2 MB or more, but only 1\.0 MB may be used")


@pytest.mark.parametrize("make", [tar, zipped])
def test_damaged_archive_is_refused_in_one_line(tmp_path: Path, folder: Path, make) -> None:  # type: ignore[no-untyped-def]
    archive = make(tmp_path / "archive", {"a": bytes(range(256)) * 4000, "b": b"b"})
    content = archive.read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"not an archive" * 100, b"<html>"):
        archive.write_bytes(damaged)
        refused(archive, folder, DAMAGED)
    archive.write_text("version https://git-lfs.github.com/spec/v1\n")
    refused(archive, folder, "archive is a pointer of Git LFS, not the file itself; run `git lfs pull`")


@pytest.mark.parametrize("headers", [{"mtime": "inf"}, {"GNU.sparse.map": "a,b"}])
def test_header_with_invalid_numbers_is_refused_in_one_line(
    tmp_path: Path, folder: Path, headers: dict[str, str]
) -> None:
    member = tarfile.TarInfo("a")
    member.pax_headers = headers
    refused(tar(tmp_path / "archive", {"a": member}), folder, DAMAGED)


@pytest.mark.parametrize("compression", ["gz", "xz", "bz2"])
def test_a_changed_byte_of_a_compressed_archive_is_found(tmp_path: Path, folder: Path, compression: str) -> None:
    archive = tmp_path / "archive"
    with tarfile.open(archive, f"w:{compression}") as opened:  # type: ignore[call-overload]
        for name in "ab":
            member = tarfile.TarInfo(name)
            member.size = 1_000_000
            opened.addfile(member, io.BytesIO(random.Random(name).randbytes(member.size)))
    content = bytearray(archive.read_bytes())
    content[-len(content) // 4] ^= 0x55
    archive.write_bytes(content)
    refused(archive, folder, DAMAGED)
