"""One self-contained HTML page about a run: what it made, its score, its training, how to make it again."""

import base64
import io
import json
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from uvit_dia.checkpoint import RunFolder
from uvit_dia.errors import UserError
from uvit_dia.experiments import read_grid

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h1, h2 { line-height: 1.2 } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd }
img { max-width: 100%; height: auto } figure { margin: 1rem 0 } figcaption { color: #555; font-size: .9rem }
.scroll, pre { overflow-x: auto } pre { background: #f6f6f6; padding: 1rem }
table { border-collapse: collapse }
td, th { padding: .25rem .8rem .25rem 0; text-align: left; border-bottom: 1px solid #eee }
@media print { body { max-width: none; margin: 0 } details { display: block } }
"""


def run_page(folder: RunFolder) -> str:
    """The page of a run's folder, from the files in it alone; UserError where that holds no run."""
    records = folder.read_metrics()
    if not folder.config.is_file():
        raise UserError(f"{folder.root}: no run, as it has no config.yaml")
    config = folder.config.read_text()
    cards = [json.loads(path.read_text()) for path in sorted(folder.evaluation.glob("*.json"))]
    grids = sorted(folder.samples.glob("*.png"), key=lambda path: path.stat().st_mtime, reverse=True)
    sections = [f"<h1>{escape(folder.root.name)}</h1>", headline(records, cards)]
    if grids:
        sections += ["<h2>Samples</h2>", *(picture(path.read_bytes(), path.stem) for path in grids[:2])]
    sections += [section for card in cards for section in score_section(card)]
    if records:
        sections += [
            "<h2>Training</h2>",
            picture(curves(records), "every logged step; the loss scale is logarithmic"),
        ]
    again = f"accelerate launch scripts/train.py --config {folder.config} --output_dir runs/again"
    sections += [
        "<h2>Make it again</h2>",
        f"<pre>{escape(again)}</pre>",
        f"<details open><summary>config.yaml</summary><pre>{escape(config)}</pre></details>",
    ]
    return page(folder.root.name, sections)


def page(title: str, sections: list[str]) -> str:
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    icon = '<link rel="icon" href="data:,">'  # else browsers ask for one
    body = "\n".join(sections)
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}{icon}<title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def headline(records: list[dict[str, Any]], cards: list[dict[str, Any]]) -> str:
    """One sentence a fact: how far it trained, and the headline metric of the newest card."""
    facts = []
    if records:
        last = records[-1]
        facts.append(f"{last['step']:,} steps, {last['images']:,} images, loss {last['loss']:.4f}")
        facts.append(f"{last['spikes']} loss spikes")
    if cards:
        name = cards[-1]["headline"]
        facts.append(f"{name.removesuffix('_mean').replace('_', ' ')} {cards[-1]['metrics'][name]:.4g}")
    return f"<p>{escape('; '.join(facts) or 'nothing trained yet')}.</p>"


def score_section(card: dict[str, Any]) -> list[str]:
    """A card as a table beside its anchor, with the notes that make it readable."""
    anchor = card["anchor"]
    rows = [
        [name.replace("_", " "), f"{value:.4g}", f"{anchor['metrics'][name]:.4g}" if anchor else ""]
        for name, value in card["metrics"].items()
    ]
    where, real = card["provenance"], card["reference"]
    provenance = [[key, str(value)] for key, value in (where | card["versions"]).items()]
    what = f"{card['num_generated']:,} generated images against {real['num_images']:,} of {real['name']}"
    held_out = f"{anchor['num_images']:,} held-out images" if anchor else ""
    return [
        f"<h2>Score at step {where.get('step', '?')}</h2>",
        f"<p>{escape(what)}; features of {escape(card['extractor']['name'])}.</p>",
        table(["metric", "generated", held_out], rows),
        *(f"<p>{escape(note)}</p>" for note in card["notes"]),
        f"<details><summary>provenance</summary>{table(['', ''], provenance)}</details>",
    ]


def table(header: list[str], rows: list[list[str]]) -> str:
    cells = "".join(f"<th>{escape(name)}</th>" for name in header)
    lines = ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    return f'<div class="scroll"><table><tr>{cells}</tr>{"".join(lines)}</table></div>'


def picture(png: bytes, caption: str) -> str:
    data = base64.b64encode(png).decode()
    alt = escape(caption)
    return (
        f'<figure><img alt="{alt}" src="data:image/png;base64,{data}"><figcaption>{alt}</figcaption></figure>'
    )


def grid_page(root: Path) -> str:
    _, runs = read_grid(root)
    rows = []
    for run in runs:
        card = run.card()
        score = card["metrics"] if card else {}
        rows.append([run.name, f"{run.images_done():,}", *(f"{score[k]:.4g}" for k in list(score)[:2])])
    return page(root.name, [table(["run", "images", "distance", "KID"], rows)])


def curves(records: list[dict[str, Any]]) -> bytes:
    """Loss, gradient norm and learning rate over steps, as a PNG."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    panels = {"loss": "loss", "grad_norm": "gradient norm", "lr": "learning rate"}
    for axes, (key, label) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        axes.plot([r["step"] for r in records], [r[key] for r in records])
        axes.set(xlabel="step", title=label, yscale="log" if key == "loss" else "linear")
        axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def write_page(root: Path) -> Path:
    """Write the page as the run's report.html and return its path."""
    folder = RunFolder(root)
    text = grid_page(root) if (root / "grid.yaml").is_file() else run_page(folder)
    folder.report.write_text(text)
    return folder.report
