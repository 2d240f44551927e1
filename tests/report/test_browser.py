"""The page in a real browser: it draws, complains of nothing, fits laptop and phone, and answers pointer and keys."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmtrain.report.write import write_report
from tests.report.browser import BINARY, Browser, browser
from tests.report.made import NASTY, make_run, make_sweep, write_lines
from tests.report.test_evaluations import write_evaluation

pytestmark = [pytest.mark.browser, pytest.mark.skipif(BINARY is None, reason="there is no Chromium on the PATH")]

SIZES = {"laptop": (1366, 768), "phone": (390, 844)}
DRAWN = """(() => {
const style = getComputedStyle(document.documentElement);
const runs = [0, 1, 2].map(i => parseInt(style.getPropertyValue(`--run-${i}`).trim().slice(1), 16))
  .map(rgb => [rgb >> 16, rgb >> 8 & 255, rgb & 255]);
const near = (data, i, rgb) => [0, 1, 2].every(c => Math.abs(rgb[c] - data[i + c]) < 45);
const isRun = (data, i) => data[i + 3] > 180 && runs.some(rgb => near(data, i, rgb));
return [...document.querySelectorAll("canvas")].map(canvas => {
  const copy = Object.assign(document.createElement("canvas"), {width: canvas.width, height: canvas.height});
  const pen = copy.getContext("2d", {willReadFrequently: true});
  pen.drawImage(canvas, 0, 0);
  const data = pen.getImageData(0, 0, canvas.width, canvas.height).data;
  let curve = 0;
  for (let i = 0; i < data.length; i += 4) if (isRun(data, i)) curve++;
  const colours = new Set(new Uint32Array(data.buffer)).size;
  return [canvas.getAttribute("aria-label") || "sample", colours, curve];
});
})()"""
"""Of each canvas: what it is, how many colours it has, and how many pixels of about a run's own colour."""
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pages of one run with everything in it, of three runs, of a sweep, and of the least that a run can be."""
    folder = tmp_path_factory.mktemp("pages")
    runs = [
        make_run(folder / name, 1200 if name == "third" else 1500, i, eventful=name == "first")
        for i, name in enumerate(("first", "second", "third"))
    ]
    least = folder / ("a-very-long-name-without-any-space-in-it-" * 4)
    least.mkdir()
    write_lines(least / "metrics.jsonl", [{"step": 1, "tokens": 8, "loss": 3.0}])
    (least / "config.json").write_text(json.dumps({"model": {"name": NASTY}, NASTY: NASTY}))
    (least / "log.txt").write_text(f"2026-01-05 09:00:00 {NASTY}\n")
    for name in ("needle", NASTY):
        write_evaluation(runs[0], task=name, seed=len(name))
    given = {"one": runs[:1], "three": runs, "sweep": [make_sweep(folder / "s")], "least": [least]}
    return {name: write_report(paths, folder / f"{name}.html", print) for name, paths in given.items()}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as made:
        yield made


def shown_whole(page: Browser, path: Path, size: str, dark: bool = False) -> None:
    """Open a page on a screen as high as itself, so that all of it is drawn."""
    page.complaints.clear()
    width, height = SIZES[size]
    page.open(path, width, height, dark)
    height = page.run("document.documentElement.scrollHeight")
    page.call(
        "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=size == "phone"
    )
    page.settle()


def check_drawn(canvases: list) -> None:
    """Fail for a chart without axes and texts, or without a curve in its run's colour, and for an empty map."""
    assert canvases
    for label, colours, curve in canvases:
        assert colours > (1 if label == "sample" else 8), label
        assert curve >= 10 or "read cells" in label, label


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["one", "three", "sweep", "least"])
def test_all_charts_are_drawn_and_nothing_overflows(
    page: Browser, pages: dict[str, Path], name: str, size: str, dark: bool
) -> None:
    shown_whole(page, pages[name], size, dark)
    assert page.complaints == []
    assert page.run(OVERFLOW) <= 0
    drawn = page.run(DRAWN)
    assert len(drawn) >= {"one": 20, "three": 20, "sweep": 2, "least": 1}[name]
    check_drawn(drawn)
    ground = page.run("getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(17, 21, 27)" if dark else "rgb(245, 246, 248)")
    assert "[object" not in page.run("document.body.innerText")


def test_figures_of_the_summary_are_on_the_screen(page: Browser, pages: dict[str, Path]) -> None:
    shown_whole(page, pages["one"], "laptop")
    text = page.run("document.getElementById('summary').innerText")
    records = [json.loads(line) for line in (pages["one"].parent / "first/metrics.jsonl").read_text().splitlines()]
    loss = [record["loss"] for record in records if record.get("loss") is not None][-1]
    valid = [record for record in records if "val_loss" in record][-1]
    for figure in (
        f"{loss:.4f}",
        f"{valid['val_loss']:.4f}",
        f"{valid['val_bits_per_byte']:.4f}",
        "1,500",
        "7.2B parameters",
    ):
        assert figure in text, figure
    assert text.index("rolled back from step") < text.index("Training loss")


def test_texts_of_a_run_are_shown_as_they_are(page: Browser, pages: dict[str, Path]) -> None:
    shown_whole(page, pages["least"], "laptop")
    assert page.run("document.querySelectorAll('img, iframe, #page script').length") == 0
    assert NASTY in page.run("document.getElementById('options').textContent")
    assert NASTY in page.run("document.getElementById('log').textContent") and page.complaints == []


def middle(page: Browser, share: float = 0.5) -> tuple[float, float]:
    """A point of the loss's chart, by its share of the width."""
    box = page.run(
        "(() => { const box = document.querySelector('#curves canvas').getBoundingClientRect();"
        " return [box.left, box.top, box.width, box.height]; })()"
    )
    return box[0] + share * box[2], box[1] + box[3] / 2


def test_pointing_reads_values_and_dragging_zooms_all_charts(page: Browser, pages: dict[str, Path]) -> None:
    shown_whole(page, pages["three"], "laptop")
    before = page.run(DRAWN)
    page.pointer("mouseMoved", *middle(page))
    page.settle()
    told = page.run("document.querySelector('#curves .readout').innerText")
    assert all(name in told for name in ("first", "second", "third", "training", "steps"))
    page.pointer("mouseMoved", *middle(page, 0.97))
    page.settle()
    told = page.run("document.querySelector('#curves .readout').innerText")
    assert "second" in told and "third" not in told  # it ended before
    page.pointer("mousePressed", *middle(page, 0.4), held=True)
    page.pointer("mouseMoved", *middle(page, 0.5), held=True)
    page.pointer("mouseReleased", *middle(page, 0.5))
    page.settle()
    assert page.run("document.querySelector('.range').hidden") is False
    low, high = (
        int(text.strip(" ✕").replace(",", ""))
        for text in page.run("document.querySelector('.range').innerText").split("–")
    )
    assert 500 < low < 620 and 660 < high < 780
    assert len(before) == len(page.run(DRAWN))
    check_drawn(page.run(DRAWN)[:1])
    page.run("document.querySelector('.range').click()")
    assert page.run("document.querySelector('.range').hidden") is True and page.complaints == []


def test_keys_do_what_the_pointer_does(page: Browser, pages: dict[str, Path]) -> None:
    shown_whole(page, pages["one"], "laptop")
    page.run("document.querySelector('#curves canvas').focus()")
    page.key("ArrowRight")
    page.settle()
    assert "step" in page.run("document.querySelector('#curves .readout').innerText")
    for key, hidden in (("+", False), ("0", True)):
        page.key(key)
        assert page.run("document.querySelector('.range').hidden") is hidden
    page.run("document.querySelector('#experts canvas').focus()")
    page.key("ArrowDown")
    assert "layer" in page.run("document.querySelector('#experts .told').innerText") and page.complaints == []


def test_axes_runs_views_and_themes_can_be_chosen(page: Browser, pages: dict[str, Path]) -> None:
    shown_whole(page, pages["three"], "phone")
    for button in page.run("[...document.querySelectorAll('button')].map((one, i) => i)"):
        page.run(f"document.querySelectorAll('button')[{button}].click()")
    for i in range(page.run("document.querySelectorAll('select').length")):
        page.run(
            f"(() => {{ const one = document.querySelectorAll('select')[{i}]; if (one) {{ one.value = '0';"
            " one.dispatchEvent(new Event('change')); } })()"
        )
    page.settle()
    assert page.run("document.documentElement.dataset.theme") == "dark"
    assert page.run("document.querySelectorAll('.chip[aria-pressed=false]').length") == 3
    assert page.run(OVERFLOW) <= 0 and page.complaints == []
