"""`--json` of every command on stores: one object on standard output, with the keys that docs/usage.md names."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from egopatch.features import create_store
from egopatch.features.__main__ import COMMANDS, main
from egopatch.features.commands.export import KINDS
from egopatch.features.formats.interface import CODECS
from egopatch.features.formats.registry import FORMATS
from egopatch.features.storage.pick import storage_at
from egopatch.features.tools.feature_files import WRITERS
from tests.features.conftest import FINGERPRINT, IDS, SPEC, fill
from tests.features.test_verify import TEXT_SPEC, TEXTS
from tests.json_keys import documented_keys


def test_every_command_prints_the_documented_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store, copy = str(tmp_path / "store"), str(tmp_path / "copy")
    fill(create_store(tmp_path / "store", SPEC, FINGERPRINT, IDS))
    fill(create_store(tmp_path / "store" / "text", TEXT_SPEC, FINGERPRINT, TEXTS))
    (tmp_path / "videos").mkdir()
    commands = {
        "info": [store],
        "verify": [store, "--sources", str(tmp_path / "videos")],
        "repair": [store],
        "unlock": [store],
        "convert": [store, "--to", copy],
        "compare": [store, copy],
        "derive": [store, "--keep", "0.5"],
        "export": [store, "--to", "npy", "--out", str(tmp_path / "files")],
        "import": [str(tmp_path / "files"), "--to", str(tmp_path / "imported"), "--grid", "2x3"],
    }
    assert commands.keys() == COMMANDS.keys()
    for name, args in commands.items():
        assert main([name, *args, "--json"]) == 0, name
        shown = capsys.readouterr()
        also = name in ("info", "verify")
        assert json.loads(shown.out).keys() == documented_keys(f"features {name}", also), name
        assert shown.err == ""
    assert not storage_at(tmp_path / "imported").exists("text")


def test_cli_format_tables_match_the_registries() -> None:
    assert tuple(CODECS) == tuple(FORMATS)
    assert tuple(WRITERS) == KINDS


@pytest.mark.parametrize("command", ["info", "unlock"])
def test_commands_that_read_no_tokens_do_not_import_torch(command: str, tmp_path: Path) -> None:
    """Torch, Zarr and h5py take two seconds to import; the rest of these commands takes a third of one."""
    fill(create_store(tmp_path / "store", SPEC, FINGERPRINT, IDS))
    program = "from egopatch.features.__main__ import main; import sys; code = main(sys.argv[1:]); print(*sys.modules)"
    run = [sys.executable, "-c", program, command, str(tmp_path / "store")]
    *_, modules = subprocess.run(run, check=True, capture_output=True, text=True).stdout.splitlines()
    assert not {"torch", "zarr", "h5py"} & set(modules.split())
