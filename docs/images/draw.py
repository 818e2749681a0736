"""Draws the pictures of the documentation, each for a light and a dark page: `python docs/images/draw.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
FONT = "font-family='system-ui, sans-serif' font-size='15'"


@dataclass(frozen=True)
class Palette:
    """Colours of one kind of page."""

    name: str
    ink: str
    faint: str
    kept: str
    gone: str
    new: str


PALETTES = (
    Palette("light", ink="#1f2328", faint="#8c959f", kept="#b6d7f5", gone="#f6c9c4", new="#bfe5c4"),
    Palette("dark", ink="#e6edf3", faint="#7d8590", kept="#1f4f7c", gone="#7d2f2a", new="#235f36"),
)


def text(x: float, y: float, words: str, colour: str, anchor: str = "start") -> str:
    """Words that begin, end or are centred at a point."""
    return f"<text x='{x}' y='{y}' fill='{colour}' text-anchor='{anchor}' {FONT}>{words}</text>"


def box(x: float, y: float, wide: float, high: float, fill: str, line: str, dashed: bool = False) -> str:
    """A rectangle; dashed where it stands for something that is gone."""
    dash = " stroke-dasharray='5 4'" if dashed else ""
    return f"<rect x='{x}' y='{y}' width='{wide}' height='{high}' rx='4' fill='{fill}' stroke='{line}'{dash}/>"


def page(name: str, wide: int, high: int, title: str, draw: Callable[[Palette], list[str]]) -> None:
    """Writes one picture twice."""
    for palette in PALETTES:
        body = "\n".join(draw(palette))
        head = f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {wide} {high}' width='{wide}' role='img'>"
        svg = f"{head}\n<title>{title}</title>\n{body}\n</svg>\n"
        (HERE / f"{name}-{palette.name}.svg").write_text(svg, encoding="utf-8")


def tower(palette: Palette, x: float, order: str, live: int, told: str) -> list[str]:
    """Stages of one sequence, from the top layers down; the first `live` ones are kept."""
    shapes = []
    for depth in range(len(order)):
        kept = depth < live
        y = 50 + 46 * depth
        shapes.append(box(x, y, 150, 38, palette.kept if kept else palette.gone, palette.ink, dashed=not kept))
        shapes.append(text(x + 75, y + 24, "-".join(order[: depth + 1]), palette.ink, "middle"))
    return [*shapes, text(x + 75, 50 + 46 * len(order) + 20, told, palette.ink, "middle")]


def draw_stages(palette: Palette) -> list[str]:
    """Two sequences of one shard; slice 1 is hit."""
    return [
        text(75, 30, "layers, from the top down", palette.faint),
        *tower(palette, 75, "0123", 1, "keeps 0"),
        *tower(palette, 295, "2301", 3, "keeps 2-3-0: answers"),
        text(515, 72, "a box is a stage: one group of layers,", palette.ink),
        text(515, 94, "trained on the slices in its name.", palette.ink),
        text(515, 134, "Somebody in slice 1 is deleted:", palette.ink),
        text(515, 156, "every stage with a 1 in its name goes.", palette.ink),
        text(515, 196, "What stays never saw slice 1.", palette.ink),
    ]


def draw_life(palette: Palette) -> list[str]:
    """What a deletion and a repair do to the model that answers."""
    spans = (
        (40, 220, palette.kept, "trained on slices 2-3-0-1", "everyone is in it"),
        (260, 220, palette.gone, "answers with 2-3-0", "all of slice 1 is forgotten"),
        (480, 260, palette.new, "answers with 2-3-0-1 again", "slice 1 without the deleted person"),
    )
    shapes = []
    for x, wide, fill, above, below in spans:
        shapes += [box(x, 60, wide, 44, fill, palette.ink), text(x + wide / 2, 87, above, palette.ink, "middle")]
        shapes.append(text(x + wide / 2, 128, below, palette.faint, "middle"))
    shapes += [text(260, 40, "delete: seconds, no training", palette.ink, "middle")]
    return [*shapes, text(480, 40, "train: the repair", palette.ink, "middle")]


def draw_store(palette: Palette) -> list[str]:
    """Which part of a store is published, and which one stays."""
    public = ("README.md, s3t.json", "adapter_model.safetensors", "shard-00/2/", "shard-00/2-3/", "shard-00/2-3-0/")
    private = (".s3t/partition.key", ".s3t/state.sqlite", "who is where, who was deleted, receipts")
    return [
        box(30, 30, 330, 190, palette.kept, palette.ink),
        text(50, 58, "published: a folder or a repository", palette.ink),
        *(text(60, 90 + 27 * line, words, palette.ink) for line, words in enumerate(public)),
        box(400, 30, 350, 190, palette.gone, palette.ink),
        text(420, 58, "private state: yours alone; back it up", palette.ink),
        *(text(430, 90 + 27 * line, words, palette.ink) for line, words in enumerate(private)),
    ]


if __name__ == "__main__":
    page("stages", 830, 270, "Stages of two sequences, and which of them a deletion removes", draw_stages)
    page("deletion", 780, 150, "What answers before a deletion, after it, and after the repair", draw_life)
    page("store", 780, 250, "The published and the private part of a store", draw_store)
