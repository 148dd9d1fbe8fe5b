"""A miniature of everything stage two reads: EgoTaskQA files of made-up questions, and stores with a planted answer.

In each clip one patch of each frame carries a thing; the question names a place, the answer is the colour planted in
the patch of that place. Nothing about it can be told from the question or from the mean over all patches.
"""

import dataclasses
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from egopatch.configs.schema import Config, DataConfig, HeadConfig, RunConfig, StoreConfig, TrainConfig
from egopatch.features import Failure, Fingerprint, StoreSpec, create_store
from egopatch.train.rundir.run_folder import plain

COLOURS = ("red", "green", "blue", "white")
PLACES = ("left", "right", "top", "bottom")
FRAMES, GRID, WIDTH, LENGTH = 2, (3, 4), 32, 8
FIELDS = {"checkpoint": "made-up", "depth": 6}


def write_tiny(
    root: Path, clips: int = 48, seed: int = 0, bad: tuple[str, ...] = (), fields: dict | None = None
) -> Config:
    """Write annotations and stores below `root`; returns a config that trains on them."""
    rng = random.Random(seed)
    names = [f"clip|P{i}|0|{i + 1}" for i in range(clips)]
    planted = {name: {place: rng.choice(COLOURS) for place in PLACES} for name in names}
    for split in ("direct", "indirect"):
        _write_questions(root / "data", split, names, planted, rng)
    path = root / "store"
    write_stores(path, planted, bad, fields or FIELDS)
    return Config(
        data=DataConfig(root=root / "data"),
        store=StoreConfig(path=path, dtype="float16", shard=16),
        head=HeadConfig(width=32, heads=2, ratio=0.5, dropout=0.1),
        train=TrainConfig(epochs=3, batch=32, lr=3e-3, device="cpu"),
        run=RunConfig(dir=root / "runs" / "psa"),
    )


def write_stores(path: Path, planted: dict[str, dict[str, str]], bad: tuple[str, ...], fields: dict) -> None:
    """The clips' store with `bad` ones quarantined, and the texts' store inside it."""
    generator = torch.Generator().manual_seed(7)
    code = torch.randn(len(COLOURS) + len(PLACES), WIDTH, generator=generator)
    spec = StoreSpec.for_patches(FRAMES, GRID, WIDTH, dtype="float16", shard=16)
    store = create_store(path, spec, Fingerprint(fields), list(planted))
    for work in store.missing_shards():
        good = [name for name in work.ids if name not in bad]
        rows = {name: _clip(planted[name], code, generator) for name in good}
        failed = {name: Failure("no video stream", "") for name in work.ids if name in bad}
        store.write_shard(work.shard, rows, dict.fromkeys(good, "sha"), failed)
    texts = questions_texts()
    text_store = create_store(path / "text", StoreSpec.for_text(LENGTH, WIDTH), Fingerprint(fields), texts)
    for work in text_store.missing_shards():
        rows = {text: _text(text, generator) for text in work.ids}
        text_store.write_shard(work.shard, rows, dict.fromkeys(rows, "sha"))


def questions_texts() -> list[str]:
    asked = [f"what colour is the {place} thing?" for place in PLACES]
    return asked + [f"is the {place} thing {colour}?" for place in PLACES for colour in COLOURS]


def with_run(config: Config, name: str, **changes: object) -> Config:
    """`config` with another run folder and changed options such as `head_name="egovlp"`, `train_seed=1`."""
    sections = {"run": dataclasses.replace(config.run, dir=config.run.dir.parent / name)}
    for key, value in changes.items():
        section, option = key.split("_", 1)
        current = sections.get(section, getattr(config, section))
        sections[section] = dataclasses.replace(current, **{option: value})
    return dataclasses.replace(config, **sections)


def written(config: Config) -> str:
    """The path of a file with `config`, beside its run folder."""
    path = config.run.dir.with_suffix(".yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(plain(config)))
    return str(path)


def clock(sleep: Callable[[float], None]) -> SimpleNamespace:
    """In place of the module `time` in one other module: threads that sleep elsewhere are not disturbed."""
    return SimpleNamespace(sleep=sleep, monotonic=time.monotonic)


def events(run: Path, kind: str | None = None) -> list[dict]:
    """The lines of a run's log, or those of one kind."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if kind in (None, line["event"])]


def losses(run: Path) -> list[float]:
    """The loss trace of a run's log."""
    return [event["loss"] for event in events(run, "step")]


def same_weights(one: Config, other: Config) -> bool:
    """Whether the best weights of two runs are equal bit for bit."""
    here, there = (load_file(config.run.dir / "best.safetensors") for config in (one, other))
    return here.keys() == there.keys() and all(torch.equal(here[name], there[name]) for name in here)


def _write_questions(root: Path, split: str, names: list[str], planted: dict, rng: random.Random) -> None:
    folder = root / "qa" / split
    folder.mkdir(parents=True)
    parts = {"train": names[: len(names) * 2 // 3], "val": names[len(names) * 2 // 3 :: 2]}
    parts["test"] = names[len(names) * 2 // 3 + 1 :: 2]
    for part, members in parts.items():
        records = []
        for name in members:
            for place in PLACES:
                colour = planted[name][place]
                asked = rng.choice([colour, rng.choice(COLOURS)])
                verdict = "yes" if asked == colour else "no"
                records.append(_record(name, f"what colour is the {place} thing?", colour, "query", split))
                records.append(_record(name, f"is the {place} thing {asked}?", verdict, "verify", split))
                # Texts that the store has; what they mean does not matter.
                following = PLACES[PLACES.index(place) - 1]
                for record in records[-2:]:
                    record["text_pos"] = f"is the {place} thing {COLOURS[0]}?"
                    record["text_neg"] = record["question"].replace(place, following)
        for number, record in enumerate(records):
            record["question_id"] = f"{split}-{part}-{number}"
        (folder / f"formatted_{part}_qas_encode.json").write_text(json.dumps(records))


def _record(name: str, text: str, answer: str, structural: str, split: str) -> dict:
    kind = "world" if structural == "query" else "intent"
    return {
        "question": text,
        "answer": answer,
        "interval": name,
        "video_id": name.split("|")[0],
        "type": [kind],
        "category": ["descriptive"],
        "semantic": "object",
        "structural": structural,
        "reference": split,
        "reasoning_type": f"{kind}$descriptive$object${structural}${split}",
    }


def _clip(planted: dict[str, str], code: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    n = GRID[0] * GRID[1]
    patches = 0.3 * torch.randn(FRAMES, n, WIDTH, generator=generator)
    for frame in range(FRAMES):
        spots = torch.randperm(n, generator=generator)[: len(PLACES)].tolist()
        for place, spot in zip(PLACES, spots):
            patches[frame, spot] += code[COLOURS.index(planted[place])] + code[len(COLOURS) + PLACES.index(place)]
    return {
        "patches": patches,
        "cls": patches.mean((0, 1)),
        "saliency": patches.norm(dim=-1),
        "timestamps": torch.arange(FRAMES, dtype=torch.float32),
    }


def _text(text: str, generator: torch.Generator) -> dict[str, Tensor]:
    words = text.rstrip("?").split()
    states = torch.zeros(LENGTH, WIDTH)
    for position, word in enumerate(words):
        own = torch.Generator().manual_seed(sum(ord(letter) * 31**i for i, letter in enumerate(word)) % 2**31)
        states[position] = torch.randn(WIDTH, generator=own) + 0.1 * torch.randn(WIDTH, generator=generator)
    return {"states": states, "attention_mask": torch.arange(LENGTH) < len(words)}
