"""Draw the documentation's pictures: `python docs/pictures/draw.py` writes the SVG files beside this script.

A picture is a list of rows. A row has a title and boxes joined by arrows, read from left to right; its last box is
joined to the first box of the next row.
"""

from dataclasses import dataclass
from html import escape
from pathlib import Path

FOLDER = Path(__file__).parent

BOX_W, BOX_GAP, LINE_H, PAD = 168, 26, 17, 12
MARGIN, TITLE_H, ROW_GAP = 18, 26, 26
# Where an arrow enters a row; titles stand to the right of it.
TIP_X = 14
FONT = "font-family='system-ui, Segoe UI, Helvetica, Arial, sans-serif'"


@dataclass(frozen=True)
class Box:
    """One stop.

    Attributes:
        head: Heading.
        lines: Lines of text below it.
    """

    head: str
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """Stops in the order in which data reaches them.

    Attributes:
        title: What the row is about.
        colour: Fill of its boxes.
        boxes: The stops.
    """

    title: str
    colour: str
    boxes: tuple[Box, ...]


STAGE_ONE, STORE, STAGE_TWO = "#e8f1fb", "#fdf3dc", "#e9f6ea"

TWO_STAGES = (
    Row(
        "Stage one, once per data set: extract",
        STAGE_ONE,
        (
            Box("videos", ("T frames of a clip,", "decoded in child", "processes")),
            Box("frozen encoder", ("EgoVLPv2, EgoVLP,", "MFAS or lite")),
            Box("patch tokens", ("[T, N, D] of a clip,", "CLS [D] and", "saliency [T, N]")),
            Box("store", ("Zarr or HDF5 shards,", "checksums, ledger")),
        ),
    ),
    Row(
        "Stage two, as often as you like: train",
        STAGE_TWO,
        (
            Box("batch", ("clips with all the", "questions about them")),
            Box("select", ("the k patches of each", "frame that match the", "question")),
            Box("aggregate", ("attention: patch,", "frame, video")),
            Box("answer", ("Open, Binary, All;", "table and report")),
        ),
    ),
)

WAY_OF_A_CLIP = (
    Row(
        "What has to be encoded",
        STAGE_ONE,
        (
            Box("extract.datasets", ("annotation files ->", "Clip, Question")),
            Box("extract.planning", ("clip -> row -> shard;", "bytes, hours, refusals")),
            Box("extract.engines", ("shards -> workers,", "one lease a shard")),
        ),
    ),
    Row(
        "Encoding it",
        STAGE_ONE,
        (
            Box("extract.worker", ("decode ahead, encode,", "write behind")),
            Box("extract.video", ("file -> frames", "[T, 3, H, W]")),
            Box("extract.encoders", ("frames [B, T, 3, H, W]", "-> PatchTokens")),
        ),
    ),
    Row(
        "Committing it",
        STORE,
        (
            Box("features.store", ("rows of one shard", "from one owner")),
            Box("features.formats", ("rows -> Zarr or HDF5", "shard files")),
            Box("features.storage", ("publish in a folder or", "in object storage")),
            Box("features.state", ("ledger record: ids,", "rows, checksums")),
        ),
    ),
)

WAY_OF_A_TOKEN = (
    Row(
        "From the store to a batch",
        STORE,
        (
            Box("features.store", ("rows, checked, read", "ahead")),
            Box("train.data", ("disk, memory or GPU ->", "clips with questions")),
            Box("train.heads", ("question -> queries,", "selector, bias")),
        ),
    ),
    Row(
        "From tokens to logits",
        STAGE_TWO,
        (
            Box("train.ops", ("select_attend: keep k,", "pool [B, T, H, D]")),
            Box("train.heads", ("frames -> video ->", "logits [B, A]")),
            Box("train.fitting", ("loss, step, best on val,", "resume")),
        ),
    ),
    Row(
        "From logits to the table",
        STAGE_TWO,
        (
            Box("train.scores", ("Open, Binary, All,", "intervals")),
            Box("train.rundir", ("card, log, weights of", "one run")),
            Box("train.sweeps", ("ratios x seeds, run", "groups")),
            Box("train.report", ("table, plots, one HTML", "page")),
        ),
    ),
)


def draw(rows: tuple[Row, ...]) -> str:
    """The picture as SVG text."""
    heights = [max(len(box.lines) for box in row.boxes) * LINE_H + 22 + 2 * PAD for row in rows]
    width = 2 * MARGIN + max(len(row.boxes) * (BOX_W + BOX_GAP) - BOX_GAP for row in rows)
    height = 2 * MARGIN + sum(heights) + len(rows) * TITLE_H + (len(rows) - 1) * ROW_GAP
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' width='{width}' {FONT}>",
        "<defs><marker id='tip' viewBox='0 0 8 8' refX='7' refY='4' markerWidth='7' markerHeight='7' orient='auto'>"
        "<path d='M0 0 L8 4 L0 8 z' fill='#555'/></marker></defs>",
        f"<rect width='{width}' height='{height}' rx='10' fill='#ffffff'/>",
    ]
    top = MARGIN
    for number, (row, tall) in enumerate(zip(rows, heights)):
        indent = MARGIN + (2 * TIP_X if number else 0)
        parts.append(f"<text x='{indent}' y='{top + 15}' font-size='14' fill='#333'>{escape(row.title)}</text>")
        top += TITLE_H
        for column, box in enumerate(row.boxes):
            left = MARGIN + column * (BOX_W + BOX_GAP)
            parts.append(_box(box, left, top, tall, row.colour))
            if column:
                parts.append(_arrow(left - BOX_GAP, top + tall / 2, left - 1, top + tall / 2))
        top += tall
        if number + 1 < len(rows):
            last = MARGIN + (len(row.boxes) - 1) * (BOX_W + BOX_GAP) + BOX_W / 2
            parts.append(_turn(last, top, MARGIN + TIP_X, top + ROW_GAP + TITLE_H))
            top += ROW_GAP
    return "\n".join([*parts, "</svg>"]) + "\n"


def _box(box: Box, left: float, top: float, tall: float, colour: str) -> str:
    middle = left + BOX_W / 2
    texts = [
        f"<text x='{middle}' y='{top + PAD + 14}' font-size='14' font-weight='600' fill='#111' "
        f"text-anchor='middle'>{escape(box.head)}</text>"
    ]
    texts += [
        f"<text x='{middle}' y='{top + PAD + 34 + n * LINE_H}' font-size='12.5' fill='#444' "
        f"text-anchor='middle'>{escape(line)}</text>"
        for n, line in enumerate(box.lines)
    ]
    frame = f"<rect x='{left}' y='{top}' width='{BOX_W}' height='{tall}' rx='8' fill='{colour}' stroke='#8a94a0'/>"
    return "\n".join([frame, *texts])


def _arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    return f"<path d='M{x1} {y1} L{x2} {y2}' stroke='#555' stroke-width='1.6' fill='none' marker-end='url(#tip)'/>"


def _turn(x1: float, y1: float, x2: float, y2: float) -> str:
    """From the bottom of a row's last box to the top of the next row's first, through the gap between the rows."""
    between = y1 + ROW_GAP / 2
    path = f"M{x1} {y1} V{between} H{x2} V{y2 - 1}"
    return f"<path d='{path}' stroke='#555' stroke-width='1.6' fill='none' marker-end='url(#tip)'/>"


PICTURES = {"two_stages": TWO_STAGES, "way_of_a_clip": WAY_OF_A_CLIP, "way_of_a_token": WAY_OF_A_TOKEN}


def main() -> None:
    """Write every picture."""
    for name, rows in PICTURES.items():
        (FOLDER / f"{name}.svg").write_text(draw(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
