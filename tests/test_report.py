"""Pages: statistics against closed forms, numbers against the files, and a look by a real browser."""

import csv
import html
import json
import math
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import run_config
from compare import make_runs, write_grid
from experiments import Run, holm, read_grid, significance
from PIL import Image
from report import write_page
from scipy.stats import t as student

from uvit_dia.errors import UserError
from uvit_dia.evaluation import make_card, write_card

ROOT = Path(__file__).parents[1]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
AXES = {"model.unit": ["none", {"kind": "dia_lstm", "gate_scale": 4}], "train.batch_size": [32, 128]}


def cells(*rows: tuple) -> dict:
    """Cells of (series, x, scores by seed), the first one the baseline."""
    found = {}
    for series, x, scores in rows:
        frame = pd.DataFrame({"seed": list(scores), "fid": list(scores.values())})
        found[series, x] = frame.assign(baseline=rows[0][0])
    return found


def finish(run: Run, distance: float, num_images: int, reference: str = "digits") -> None:
    """Leave in the run's folder what training and scoring leave there."""
    folder, train = run.folder, run.config.train
    for path in (folder.pipeline, folder.samples):
        path.mkdir(parents=True)
    shutil.copy(folder.root / "cell.yaml", folder.config)
    steps = range(100, train.num_steps + 1, 100)
    rows = [
        {
            "step": step, "images": step * train.batch_size, "loss": 1 / step, "grad_norm": 0.1, "lr": 1e-3,
            "spikes": 7, "images_per_second": 1000.0, "memory_gib": 1.25,
        }
        for step in steps
    ]  # fmt: skip
    folder.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    about = {"step": train.num_steps}
    (folder.pipeline / "training.json").write_text(json.dumps(about))
    Image.new("L", (64, 64), 99).save(folder.samples / f"step_{train.num_steps:08d}.png")
    metrics = {"frechet_distance": distance, "kernel_distance_mean": distance / 1e4}
    real = {"name": reference, "sha256": reference, "num_images": num_images}
    write_card(make_card([{"seed": 0} | metrics], run.config.evaluate, real, about), run.card_path)


def grid(root: Path, num_images: int = 600, seeds: int = 3, **axes: list) -> list[Run]:
    """A grid's folder, finished: the second unit is better by 1 at seed 0, by 1.1 at seed 1, ..."""
    parser = run_config.run_parser("")
    digits = ["--config", str(ROOT / "configs" / "digits.yaml"), "--output_dir", str(root)]
    count = ["--evaluate.num_images", str(num_images)]
    base = run_config.to_config(parser, parser.parse_args([*digits, *count, "--train.num_steps", "400"]))
    axes = (axes or AXES) | {"train.seed": list(range(seeds))}
    runs = make_runs(base, axes, "images")
    write_grid(root, runs, {"equal": "images", "command": "python compare", "hardware": "h"})
    for run in runs:
        seed = run.config.train.seed
        better = run.labels.get("model.unit", "none") != "none"
        finish(run, 20 + 5 * seed - better * (1 + seed / 10), num_images)
    return runs


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("grids") / "small"
    grid(root)
    write_page(root)
    return root


@pytest.fixture
def copied(small, tmp_path) -> tuple[Path, list[Run]]:
    """The same grid to change, and its runs."""
    root = Path(shutil.copytree(small, tmp_path / "grid"))
    (root / "report.html").unlink()
    return root, read_grid(root)[1]


def test_holm_adjusts_step_by_step_and_leaves_out_what_was_no_test():
    # R: p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm")
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    found = holm([0.01, math.nan, 0.04])
    assert found[0] == pytest.approx(0.02) and math.isnan(found[1]) and found[2] == pytest.approx(0.04)
    assert holm([0.6, 0.7]) == [1, 1] and holm([]) == []


def test_a_paired_test_sees_a_steady_gain_that_the_spread_between_seeds_hides_from_the_other():
    none, dia = dict(a=10, b=14, c=19), dict(c=18.2, b=12.9, a=9)  # by seed
    (test,) = significance(cells(("none", "32", none), ("dia", "32", dia)), "fid")
    gains = [-1, -1.1, -0.8]
    centre = sum(gains) / 3
    error = math.sqrt(sum((g - centre) ** 2 for g in gains) / 2 / 3)
    assert test["paired"] == pytest.approx(2 * student.cdf(centre / error, df=2))
    assert test["difference"] == pytest.approx(centre) and test["n"] == 3
    assert test["paired"] < 0.01 and test["two_sample"] > 0.7 and test["holm"] == test["paired"]


def test_each_cell_is_tested_against_the_first_value_at_the_same_x_by_the_seeds_that_both_have():
    found = cells(
        ("none", "32", dict(a=1, b=2)), ("none", "128", dict(a=5, b=7, c=9)), ("dia", "32", dict(b=3, c=1)),
        ("dia", "128", dict(c=8, a=5)), ("light", "32", dict(a=math.nan)),
        ("light", "128", dict(a=4, b=7, c=10)),
    )  # fmt: skip
    tests = significance(found, "fid")
    assert [(test["key"], test["n"]) for test in tests] == [
        (("dia", "32"), 1), (("dia", "128"), 2), (("light", "128"), 3)
    ]  # fmt: skip
    assert [test["difference"] for test in tests] == pytest.approx([1, -0.5, 0])
    assert math.isnan(tests[0]["paired"]) and math.isnan(tests[0]["holm"])
    assert tests[1]["holm"] == pytest.approx(min(1, 2 * tests[1]["paired"]))  # two tests could be made


def test_without_axes_but_the_seed_there_is_nothing_to_test():
    assert significance(cells(("", "", dict(a=1, b=2))), "fid") == []


def test_the_page_holds_everything_in_itself_and_its_links_lead_somewhere(small):
    page = (small / "report.html").read_text()
    assert not re.search(r"https?://|<script|@import|url\(", page)
    sources = re.findall(r'<img alt="([^"]+)" src="([^"]+)"', page)
    assert len(sources) == page.count("<img") == 2 + 2 + 4  # scores, curves, samples
    assert all(source.startswith("data:image/png;base64,") for _, source in sources)
    links = re.findall(r'<a href="([^"]+)"', page)
    assert len(links) == 2 * 12 + 1 and all((small / link).exists() for link in links)
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", (small / "report.md").read_text())
    assert len(pictures) == 8 and all((small / picture).is_file() for picture in pictures)


def test_every_number_is_that_of_a_card_and_stands_beside_its_run(small):
    rows = list(csv.DictReader((small / "report.csv").open()))
    text = (small / "report.md").read_text()
    assert len(rows) == 12
    for row in rows:
        (path,) = (small / row["run"] / "evaluation").glob("*.json")
        distance = json.loads(path.read_text())["metrics"]["frechet_distance"]
        assert float(row["frechet_distance"]) == distance
        (line,) = [line for line in text.splitlines() if line.startswith(f"| [{row['run']}]({row['run']}/)")]
        assert f" {distance:.4g} |" in line and f"({row['run']}/evaluation/{path.name})" in line
        assert row["spikes"] == "7" and row["images"] == str(400 * 128)


def test_the_page_tells_mean_spread_counts_and_significance(small):
    text = (small / "report.md").read_text().replace("\N{NO-BREAK SPACE}", " ")
    assert "| none | 32 | 25 ± 5 | 3 |" in text  # of 20, 25, 30
    assert "| dia_lstm gate_scale=4 | 128 | 23.9 ± 4.9 | 3 |" in text  # of 19, 23.9, 28.8
    assert "Differences to none, 2 tests" in text
    p = 2 * student.cdf(-1.1 / (0.1 / math.sqrt(3)), df=2)
    pooled = (5**2 + 4.9**2) / 2
    two_sample = 2 * student.cdf(-1.1 / math.sqrt(pooled * 2 / 3), df=4)
    assert f"| 32 | -1.1 | 3 | {p:.3g} | {2 * p:.3g} | {two_sample:.3g} |" in text
    assert "| none | 32 | 7, 7, 7 | 0 | 1000 ± 0 | 1.25 |" in text
    assert "1.4826 MAD" in text and "python compare" in text and "| hardware | h |" in text
    assert text.index("## KID") < text.index(
        "## Frechet distance, not FID"
    )  # the cards' headline comes first


def test_a_grid_of_seeds_alone_has_one_mean_and_no_comparison(tmp_path):
    grid(tmp_path, **{"train.seed": []})
    text = write_page(tmp_path).with_suffix(".md").read_text().replace("\N{NO-BREAK SPACE}", " ")
    assert "the cell with the fewest has 3 seeds" in text and "| all | 25 ± 5 | 3 |" in text
    assert "is compared with" not in text and "Differences" not in text


def test_further_axes_are_held_equal_in_every_comparison(tmp_path):
    grid(tmp_path, seeds=2, **AXES | {"train.batch_size": [32], "train.ema_decay": [0.9, 0.99]})
    text = write_page(tmp_path).with_suffix(".md").read_text()
    assert "Each unit is compared with **none** at the same batch size and ema decay, after" in text
    assert "| unit | batch size | ema decay | difference |" in text
    assert (
        "Differences to none, 2 tests" in text and "| dia_lstm gate_scale=4 | 32 | 0.99 | -1.05 | 2 |" in text
    )


def test_the_page_says_what_real_images_score_where_that_compares(tmp_path):
    runs = grid(tmp_path, 10_000, 1, **{"model.unit": ["none"]})
    card = json.loads(runs[0].card_path.read_text())
    for comparable in (True, False):
        metrics = {"frechet_distance": 2.17828, "kernel_distance_mean": -7e-06}
        anchor = {"metrics": metrics, "num_images": 10_000, "comparable": comparable}
        runs[0].card_path.write_text(json.dumps(card | {"anchor": anchor}))
        text = write_page(tmp_path).with_suffix(".md").read_text()
        assert text.count("10,000 held-out real images score") == 2 * comparable
        assert ("real images score 2.178 against the same reference." in text) == comparable


@pytest.mark.parametrize(
    ("num_images", "seeds", "is_small", "few_seeds"),
    [(10_000, 3, False, False), (10_000, 2, True, True), (600, 3, True, False), (600, 1, True, True)],
)
def test_a_grid_too_small_says_that_it_proves_only_that_the_tool_works(
    num_images, seeds, is_small, few_seeds, tmp_path
):
    grid(tmp_path / "g", num_images, seeds, **{"model.unit": ["none", "dia_lstm"]})
    text = write_page(tmp_path / "g").read_text()
    assert ("proves only that the tool works" in text) == is_small
    assert ("Under 3 seeds" in text) == few_seeds
    assert (">nan<" in text) == (seeds == 1)


def test_a_grid_under_way_shows_what_there_is_and_says_what_is_missing(copied):
    root, runs = copied
    runs[0].card_path.unlink()
    (runs[0].folder.root / "log.txt").write_text("  3%|█ error: evaluate: no room\n 100%|")
    for path in (runs[1].folder.pipeline, runs[1].folder.samples):
        shutil.rmtree(path)
    runs[1].folder.metrics.unlink()
    text = write_page(root).read_text()
    assert "10 of 12 runs are scored; the cell with the fewest has 1 seed." in text
    assert "error: evaluate: no room" in text and "not started" in text
    for run in runs:
        run.card_path.unlink(missing_ok=True)
    assert "No run has a score yet" in write_page(root).read_text()


def test_cards_that_do_not_compare_are_refused_and_nothing_is_written(copied):
    root, runs = copied
    card = json.loads(runs[5].card_path.read_text())
    card["reference"]["sha256"] = "others"
    runs[5].card_path.write_text(json.dumps(card))
    with pytest.raises(UserError, match="reference sets differ"):
        write_page(root)
    assert not (root / "report.html").exists()


def test_a_score_of_another_count_than_the_grid_asks_for_does_not_count(copied):
    root, runs = copied
    write_card(json.loads(runs[0].card_path.read_text()) | {"num_generated": 20}, runs[0].card_path)
    assert runs[0].card() is None and "11 of 12 runs are scored" in write_page(root).read_text()


def test_what_people_named_is_shown_as_it_is(copied):
    odd, (root, runs) = "<b>|*x*`[y](z)", copied
    runs = [replace(runs[0], labels=runs[0].labels | {"model.unit": odd})]
    write_grid(root, runs, {"equal": "steps", "command": "<i>"})
    page = write_page(root).read_text()
    assert f"<td>{odd}</td>" in html.unescape(page) and "<b>" not in page and "&lt;i&gt;" in page


def test_a_run_has_the_same_page_smaller(copied):
    page = write_page(copied[1][0].folder.root).read_text()
    assert page.count("data:image/png;base64,") == 2 and "1,600 steps, 51,200 images" in page
    assert "7 loss spikes" in page and "num_steps: 1600" in page and "Frechet distance, not FID" in page
    assert not re.search("https?://", page.split("Make it again")[0])


def test_a_folder_that_is_neither_is_refused_and_left_alone(tmp_path):
    with pytest.raises(UserError, match="no run"):
        write_page(tmp_path)
    assert not any(tmp_path.iterdir())


def browse(page: Path, folder: Path, width: int = 390) -> tuple[str, str, Path]:
    """A page in a frame as wide as a phone: what it measured, the browser's log, a screenshot."""
    told = "parent.postMessage([document.documentElement.scrollWidth, document.images.length].join(), '*')"
    (folder / "page.html").write_text(page.read_text() + f"<script>onload = () => {told}</script>")
    listen = "onmessage = event => document.body.append(`measured ${event.data};`)"
    frame = f'<iframe src="page.html" width="{width}" height="3000" style="border: 0"></iframe>'
    (folder / "frame.html").write_text(f"<!doctype html><body><script>{listen}</script>{frame}</body>")
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --hide-scrollbars --enable-logging=stderr --timeout=20000 "
        f"--user-data-dir={folder / 'profile'} --window-size=1000,3000 --dump-dom"
    ).split()
    shot = folder / "shot.png"
    done = subprocess.run(
        [CHROMIUM, *flags, f"--screenshot={shot}", f"file://{folder / 'frame.html'}"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    return done.stdout, done.stderr, shot


needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium")


@needs_browser
def test_a_browser_shows_the_page_on_a_phone_without_errors_or_sideways_scrolling(small, tmp_path):
    dom, log, shot = browse(small / "report.html", tmp_path)
    assert "measured 390,8;" in dom, log  # px wide; pictures
    assert "CONSOLE" not in log
    with Image.open(shot) as picture:
        phone = picture.convert("RGB").crop((0, 0, 390, 3000))
    colours = {colour for count, colour in phone.getcolors(1 << 24) if count > 20}
    assert {(0x01, 0x73, 0xB2), (0xDE, 0x8F, 0x05)} <= colours  # the two series are drawn


@needs_browser
def test_the_look_finds_an_error_and_sideways_scrolling_where_they_are(tmp_path):
    (tmp_path / "bad.html").write_text(
        "<!doctype html><div style='width: 800px'>wide</div><script>oops()</script>"
    )
    dom, log, _ = browse(tmp_path / "bad.html", tmp_path)
    assert "oops is not defined" in log and "CONSOLE" in log
    assert re.search(r"measured 8\d\d,0;", dom)
