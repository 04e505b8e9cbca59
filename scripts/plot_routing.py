"""Draw which leaf of a tree of adapters each word of a text takes.

python scripts/plot_routing.py --checkpoint_dir checkpoints/smollm2-135m-instruct --adapter_dir out/my_tree --text_files
'[a.txt, b.txt]' --out routing.svg
"""

from html import escape
from pathlib import Path

import torch
from torch import Tensor

from lit_llama.checkpoint import load_model
from lit_llama.command_line import run
from lit_llama.errors import InputError
from lit_llama.files import atomic_file, refuse_overwrite
from lit_llama.hardware import pick_device
from lit_llama.lora import load_adapter
from lit_llama.lora_tree import mutual_information, router_logits
from lit_llama.lora_tree_routing import descend
from lit_llama.model import Llama
from lit_llama.tokenizer import Tokenizer

COLORS = ("#bcd7f5", "#f8cf9b", "#bfe3b4", "#f3bcc4", "#d9c8ee", "#f2e58f", "#b5e3e0", "#dccfc0")
STYLE = (
    "text { font: 12px ui-monospace, Menlo, Consolas, monospace; fill: #1c1c1c; white-space: pre }"
    " .title { font-weight: 700 }"
)
COLUMNS, CHARACTER, LINE, MARGIN = 96, 7.25, 19, 16
"""Characters a line; width of one, height of a line and margin in pixels."""


def main(
    *,
    checkpoint_dir: Path,
    adapter_dir: Path,
    text_files: list[Path],
    out: Path,
    router: str | None = None,
    max_tokens: int = 160,
    device: str = "auto",
    overwrite: bool = False,
) -> None:
    """Write an SVG of texts with each token in the colour of its leaf.

    Args:
        checkpoint_dir: Base model.
        adapter_dir: A tree of adapters on it (pretrain/lora_tree.py).
        text_files: Texts, one beneath the other.
        out: The picture.
        router: Whose decisions to draw, such as layers.10.mlp; by default the router that tells the texts apart best,
            or with one text uses its leaves most evenly.
        max_tokens: Of each text.
        device: cpu, cuda, mps, or auto for the best there is.
        overwrite: Replace the picture.
    """
    refuse_overwrite(out, overwrite)
    tokenizer = Tokenizer.from_checkpoint(checkpoint_dir)
    model = load_model(checkpoint_dir, device=pick_device(device))
    load_adapter(model, adapter_dir)
    tree = getattr(model, "lora_tree", None)
    if tree is None or tree.config.router not in ("tree", "frozen"):
        raise InputError(f"{adapter_dir} is not a tree of adapters that decides by itself: there is nothing to draw")
    if router is not None and router not in tree.routers:
        raise InputError(f"--router {router!r}: there are {', '.join(tree.routers)}")
    texts = {path: encode(tokenizer, path, max_tokens) for path in text_files}
    leaves = {path: leaves_of(model, ids) for path, ids in texts.items()}
    counts = torch.stack(
        [
            torch.stack([own.bincount(minlength=tree.config.leaves) for own in by_router.values()])
            for by_router in leaves.values()
        ]
    )  # (texts, routers, leaves)
    shown = router or list(tree.routers)[most_telling(counts)]
    drawn = [(path.stem, pieces_of(tokenizer, texts[path]), leaves[path][shown].tolist()) for path in text_files]
    with atomic_file(out) as file:
        file.write(picture(shown, tree.config.leaves, drawn))
    taken = counts[:, list(tree.routers).index(shown)].sum(0).double()
    print(f"{out}: {shown}, " + ", ".join(f"leaf {leaf} {share:.0%}" for leaf, share in enumerate(taken / taken.sum())))


def encode(tokenizer: Tokenizer, path: Path, max_tokens: int) -> list[int]:
    try:
        ids = tokenizer.encode(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {error}") from None
    if not ids:
        raise InputError(f"{path}: no text in it")
    return ids[:max_tokens]


def leaves_of(model: Llama, ids: list[int]) -> dict[str, Tensor]:
    """The leaf of each token, int64 (tokens,), by router."""
    input_ids = torch.tensor([ids], device=model.model.norm.weight.device)
    return {name: descend(logits[0]).cpu() for name, logits in router_logits(model, input_ids).items()}


def pieces_of(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """What each token adds to the text; characters of several tokens come with their last."""
    whole = [tokenizer.decode(ids[:count]).rstrip("\ufffd") for count in range(len(ids) + 1)]
    return [after[len(before) :] for before, after in zip(whole, whole[1:], strict=False)]


def most_telling(counts: Tensor) -> int:
    """The router whose leaf says most about the text a token is of; by one text, the one of the most even leaves.

    Args:
        counts: tokens (texts, routers, leaves).
    """
    if len(counts) > 1:
        return max(range(counts.shape[1]), key=lambda number: mutual_information(counts[:, number : number + 1]))
    return int(torch.special.entr(counts[0].double() / counts[0].sum(-1, keepdim=True)).sum(-1).argmax())


def picture(router: str, leaves: int, texts: list[tuple[str, list[str], list[int]]]) -> str:
    """SVG of texts (title, pieces, the leaf of each) beneath each other, each piece on the colour of its leaf."""
    parts, y = [], MARGIN + LINE
    legend = f"{router}: "
    parts.append(_words(MARGIN, y, legend, "title"))
    for leaf in range(leaves):
        x = MARGIN + CHARACTER * (len(legend) + 9 * leaf)
        parts += [_box(x, y, 8, leaf), _words(x, y, f" leaf {leaf} ")]
    for title, pieces, own in texts:
        y += 2 * LINE
        parts.append(_words(MARGIN, y, title, "title"))
        y, column = y + LINE, 0
        for piece, leaf in zip(pieces, own, strict=True):
            for number, line in enumerate(piece.split("\n")):
                if number or column + len(line) > COLUMNS:
                    y, column = y + LINE, 0
                if line:
                    x = MARGIN + CHARACTER * column
                    parts += [_box(x, y, len(line), leaf), _words(x, y, line)]
                    column += len(line)
    width, height = 2 * MARGIN + COLUMNS * CHARACTER, y + MARGIN
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" width="{width:.0f}"'
        f' height="{height}" role="img"><title>Leaves taken by {escape(router)}</title><style>{STYLE}</style>'
        f'<rect width="100%" height="100%" fill="#ffffff"/>{"".join(parts)}</svg>\n'
    )


def _box(x: float, y: int, characters: int, leaf: int) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y - 13}" width="{characters * CHARACTER:.1f}" height="17"'
        f' fill="{COLORS[leaf % len(COLORS)]}"/>'
    )


def _words(x: float, y: int, text: str, css: str = "") -> str:
    length = f'textLength="{len(text) * CHARACTER:.1f}" lengthAdjust="spacingAndGlyphs"'
    return f'<text x="{x:.1f}" y="{y}" xml:space="preserve" {length} class="{css}">{escape(text)}</text>'


if __name__ == "__main__":
    run(main)
