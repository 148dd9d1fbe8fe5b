"""A data set, a checkpoint and a tokenizer on a loopback server."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import yaml

from tests.extract.fetch.loopback import Server

TOKENIZER = ("config.json", "tokenizer.json")


@dataclasses.dataclass(frozen=True)
class Published:
    """A data set, a checkpoint and a tokenizer on a server, and where a config wants them."""

    root: Path
    server: Server
    contents: dict[str, bytes]

    @property
    def args(self) -> list[str]:
        return [
            *("data", "--sources", str(self.root / "sources.yaml"), "--data.root", str(self.root / "data")),
            *(
                "--encoder.checkpoint",
                str(self.root / "weights/Net.pth"),
                "--text.model",
                str(self.root / "weights/tok"),
            ),
        ]

    @property
    def lock(self) -> dict[str, Any]:
        return json.loads((self.root / "sources.lock.json").read_text())

    def write_sources(self, **changes: Any) -> None:
        tree = {
            "datasets": {"egotaskqa": self._source({"Data.tgz": ["Data/qa", "qa"], "qa_videos.tgz": ["qa_videos"]})},
            "checkpoints": {"net": self._source(["Net.pth"]) | changes},
            "tokenizers": {"tok": self._source(list(TOKENIZER))},
        }
        (self.root / "sources.yaml").write_text(yaml.safe_dump(tree))

    def _source(self, files: Any) -> dict[str, Any]:
        common = {"purpose": "made up", "terms": "none", "page": self.server.link("/page")}
        return {**common, "url": self.server.link(), "files": files}
