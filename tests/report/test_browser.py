"""The page of a report in a real browser: it draws, sorts, compares, and fits phones and the dark."""

from __future__ import annotations

import base64
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from made_runs import make_run, shape_of

from moe_evo.report.write import write_report

CHROMIUM, DRIVER = shutil.which("chromium") or shutil.which("chromium-browser"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None, reason="needs chromium and chromedriver (apt install chromium chromium-driver)"
)

HOSTILE = "<img src=x onerror=document.title='broken'>"

# how many pixels of each plot's canvas have not its most frequent colour, plots outside the shown run left out
PAINTED = """
const canvases = (node) => [...node.querySelectorAll("*")].flatMap((one) =>
  [...(one.tagName === "CANVAS" ? [one] : []), ...(one.shadowRoot ? canvases(one.shadowRoot) : [])]);
return [...document.querySelectorAll(".plot")].filter((plot) => plot.offsetParent).map((plot) => {
  const painted = canvases(plot).filter((one) => one.width && one.height).map((one) => {
    const data = new Uint32Array(one.getContext("2d").getImageData(0, 0, one.width, one.height).data.buffer);
    const counts = new Map();
    for (const pixel of data) counts.set(pixel, (counts.get(pixel) || 0) + 1);
    return data.length - Math.max(...counts.values());
  });
  return [plot.className, plot.clientWidth, Math.max(0, ...painted)];
});
"""


class Browser:
    """Headless Chromium on pages from disk."""

    def __init__(self, profile: Path) -> None:
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        options.binary_location = str(CHROMIUM)
        for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                         f"--user-data-dir={profile}", "--disable-background-networking"):  # fmt: skip
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        # both paths are given, so that selenium looks for nothing and downloads nothing
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))

    def open(self, page: Path, *, width: int = 1280, dark: bool = False) -> None:
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.set_dark(dark=dark)
        self.driver.get(page.as_uri())
        self.wait("return document.documentElement.dataset.ready === 'true'")

    def set_dark(self, *, dark: bool) -> None:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})

    def run(self, script: str, *arguments: object) -> Any:
        return self.driver.execute_script(script, *arguments)

    def wait(self, script: str, timeout_s: float = 60) -> None:
        """Until the script answers true."""
        until = time.monotonic() + timeout_s
        while not self.run(script):
            assert time.monotonic() < until, f"never true: {script}; {self.errors()}"
            time.sleep(0.05)

    def painted(self) -> dict[str, tuple[int, int]]:
        """Width and painted pixels of the plots that are shown, by class; waits until all are painted."""
        until = time.monotonic() + 60
        while True:
            found = {name: (width, pixels) for name, width, pixels in self.run(PAINTED)}
            if all(pixels for _, pixels in found.values()) or time.monotonic() > until:
                return found
            time.sleep(0.1)

    def errors(self) -> list[str]:
        logged = [one for one in self.driver.get_log("browser") if one["level"] in ("SEVERE", "WARNING")]
        # 'rendering' is advice to whoever reads canvases back often, which only these tests do
        return [one["message"] for one in logged if one["source"] != "rendering"]

    def choose(self, select: str, text: str) -> None:
        self.run(
            "const select = document.querySelector(arguments[0]);"
            "select.value = [...select.options].find((one) => one.textContent === arguments[1]).value;"
            "select.dispatchEvent(new Event('change', {bubbles: true}))",
            select, text,
        )  # fmt: skip

    def texts(self, selector: str) -> list[str]:
        script = "return [...document.querySelectorAll(arguments[0])].filter((one) => one.offsetParent)"
        found: list[str] = self.run(f"{script}.map((one) => one.innerText.trim())", selector)
        return found


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.driver.quit()


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    def written(*folders: Path) -> Path:
        target = tmp_path_factory.mktemp("page") / "report.html"
        write_report([str(one) for one in folders], str(target), overwrite=False)
        return target

    return written


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory, write: Callable[..., Path]) -> Path:
    """Runs that keep 2, 3, 4 and 5 experts, one that merely began, and one with a hostile name."""
    root = tmp_path_factory.mktemp("several")
    runs = [make_run(root / f"keep{kept}", num_kept=kept, failures=4, parameters=True) for kept in (4, 2, 5, 3)]
    runs.append(make_run(root / "begun", done=12))
    runs.append(make_run(root / HOSTILE, task=HOSTILE, failures=1))
    return write(*(run.path for run in runs))


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory, write: Callable[..., Path]) -> Path:
    path = tmp_path_factory.mktemp("single") / "run"
    return write(make_run(path, shape=shape_of(24, 64), num_kept=24, failures=2).path)


def test_every_plot_is_painted_without_an_error_or_a_request(browser: Browser, single: Path) -> None:
    browser.open(single)
    plots = browser.painted()
    assert set(plots) == {"plot curve", "plot map", "plot lineage", "plot"}
    for width, pixels in plots.values():
        assert width > 600
        assert pixels > 500
    assert browser.run("return performance.getEntriesByType('resource').map((one) => one.name)") == []
    assert browser.errors() == []


def test_clicking_a_heading_sorts_and_clicking_again_turns_the_order(browser: Browser, several: Path) -> None:
    browser.open(several)
    heading = "document.querySelectorAll('#runs thead button')[2].click()"
    assert browser.texts("#runs thead th")[2].startswith("experts")
    cells = "#runs tbody td:nth-of-type(2)"
    before = browser.texts(cells)
    browser.run(heading)
    ascending = browser.texts(cells)
    assert ascending == sorted(before) != before
    browser.run(heading)
    assert browser.texts(cells) == sorted(before, reverse=True)
    browser.run("document.querySelectorAll('#runs thead button')[1].click()")  # test scores: the best first
    scores = [text[:5] for text in browser.texts("#runs tbody td:nth-of-type(1)")]
    assert scores[:-1] == sorted(scores[:-1], reverse=True)
    assert scores[-1] == "–", "what has no score stands last"


def test_the_table_is_filtered_by_words_and_kind(browser: Browser, several: Path) -> None:
    browser.open(several)
    assert len(browser.texts("#runs tbody tr")) == 6
    browser.choose("#filter-key", "all")
    assert len(browser.texts("#runs tbody tr")) == 5 * 4 + 2
    typed = "const field = document.querySelector('#filter'); field.value = 'keep2 frequency';"
    browser.run(f"{typed} field.dispatchEvent(new Event('input'))")
    assert browser.texts("#runs tbody th") == ["keep2"]
    assert browser.texts("#filter-count") == ["1 line"]


def test_choosing_a_run_shows_it_and_draws_it(browser: Browser, several: Path) -> None:
    browser.open(several)
    browser.choose("#run-choice", "keep5")
    browser.wait("return document.querySelector('#run-2 .map-text').textContent !== ''")
    assert browser.texts("article.run h2") == ["keep5"]
    assert browser.painted()["plot curve"][1] > 500
    browser.run("[...document.querySelectorAll('#runs a')].find((one) => one.textContent === 'keep3').click()")
    browser.wait("return document.querySelector('#run-3 .map-text').textContent !== ''")
    assert browser.texts("article.run h2") == ["keep3"]
    assert browser.texts("article.run .map-text") == [
        "12 of 32 experts in 4 layers; dark: kept whole, pale: merged in part."
    ]
    browser.choose("#run-3 .map-choice", "frequency pruning")
    browser.wait("return document.querySelector('#run-3 .map-text').textContent.endsWith('dark: kept.')")
    assert browser.errors() == []


def test_choosing_two_runs_puts_them_side_by_side(browser: Browser, several: Path) -> None:
    browser.open(several)
    first = browser.texts("#compare .scores td")
    assert browser.texts("#compare .differences tbody th") == ["search.num_kept"]
    assert browser.texts("#compare .differences td") == ["4", "2"]
    browser.choose("#first", "keep5")
    browser.choose("#second", "keep3")
    browser.wait("return document.querySelector('.map-b-title').textContent === 'B: keep3'")
    browser.wait("return document.querySelector('.map-a-title').textContent === 'A: keep5'")
    assert browser.texts("#compare .differences td") == ["5", "3"]
    assert browser.texts("#compare .scores td") != first
    assert "both keep" in browser.texts("#compare .overlap-text")[0]
    plots = browser.painted()
    assert {"plot map-a", "plot map-b", "plot map-both"} <= set(plots)
    browser.choose("#second", "begun (unfinished)")
    browser.wait("return document.querySelector('.map-b-title').textContent === 'B: begun'")
    assert browser.errors() == []


def test_a_legend_entry_hides_what_it_names(browser: Browser, single: Path) -> None:
    browser.open(single)
    before = browser.painted()["plot curve"][1]
    browser.run("document.querySelectorAll('.curve-legend button')[1].click()")
    assert browser.run("return document.querySelectorAll('.curve-legend button')[1].ariaPressed") == "false"
    until = time.monotonic() + 20
    while browser.painted()["plot curve"][1] >= before and time.monotonic() < until:
        time.sleep(0.1)
    assert browser.painted()["plot curve"][1] < before


def test_names_run_no_code(browser: Browser, several: Path) -> None:
    browser.open(several)
    browser.choose("#run-choice", HOSTILE)
    browser.choose("#first", HOSTILE)
    browser.wait("return document.querySelector('.map-a-title').textContent.startsWith('A: <img')")
    assert browser.run("return document.title") == "6 runs – moe_evo"
    assert browser.run("return document.querySelectorAll('img').length") == 0
    hovered = "[...views.values()].flatMap((view) => view.model.toolbar.tools.map((tool) => `${tool.tooltips}`))"
    assert not any("onerror" in text for text in browser.run(f"return {hovered}"))
    assert browser.errors() == []


@pytest.mark.parametrize("dark", [False, True])
def test_a_phone_scrolls_down_and_never_sideways(browser: Browser, several: Path, single: Path, *, dark: bool) -> None:
    for page in (several, single):
        browser.open(page, width=375, dark=dark)
        assert all(300 < width <= 375 for width, _ in browser.painted().values())
        assert browser.run("return document.documentElement.scrollWidth") == 375
        assert browser.run("return document.body.scrollWidth") == 375
        heights = "[...document.querySelectorAll('tbody tr')].map((row) => row.clientHeight)"
        assert browser.run(f"return Math.max(...{heights})") < 300, "no column is squeezed to letters"
        assert browser.errors() == []


# how many lines of text an element has
LINES = """
return [...document.querySelectorAll(arguments[0])].filter((one) => one.offsetParent).map((one) => {
  const range = document.createRange();
  range.selectNodeContents(one);
  return new Set([...range.getClientRects()].map((line) => Math.round(line.bottom))).size;
});
"""


@pytest.mark.parametrize("width", [1280, 390, 320])
def test_a_figure_in_the_head_of_a_run_stands_on_one_line(browser: Browser, several: Path, *, width: int) -> None:
    browser.open(several, width=width)
    assert "16.00 M" in browser.texts(".headline dd")
    assert browser.run(LINES, ".headline dd:not(.remark)") == [1] * 5
    assert "50\u00a0% of the full model's 32.00 M" in browser.texts(".headline .remark")


def test_the_legend_of_the_lineage_shows_the_star_of_the_winner(browser: Browser, single: Path) -> None:
    for width in (1280, 390):
        browser.open(single, width=width)
        star = "document.querySelector('.key .star')"
        assert browser.run(f"return getComputedStyle({star}).clipPath").count(",") == 9  # a star has ten corners
        assert browser.run(f"return {star}.getBoundingClientRect().width") > 12
        assert browser.run(f"return {star}.parentElement.innerText").strip().startswith("the winner")
        assert "star" in browser.run(
            "return [...views.get(document.querySelector('.lineage')).model.renderers]"
            ".flatMap((one) => one.data_source.get_column('marker') ?? [])"
        ), "what the legend explains is drawn"


def test_dark_mode_is_dark_in_plots_too_and_changes_with_the_system(browser: Browser, single: Path) -> None:
    browser.open(single, dark=True)
    script = "return getComputedStyle(document.body).backgroundColor"
    assert browser.run(script) == "rgb(16, 20, 24)"
    tone = "return [...views.values()][0]?.model.background_fill_color"
    assert browser.run(tone) == "#181d23"
    browser.set_dark(dark=False)
    browser.wait(f"{tone} === '#ffffff'")
    assert browser.run(script) == "rgb(246, 247, 249)"
    browser.wait("return views.size === 4 && Bokeh.documents.length === 4")  # nothing of before is left
    assert len(browser.painted()) == 4
    assert browser.errors() == []


def test_a_copied_command_is_the_one_beside_the_button(browser: Browser, single: Path) -> None:
    browser.open(single)
    browser.run("document.querySelector('.command .copy').click()")
    browser.wait("return document.querySelector('.command .copy').textContent === 'copied'")


def test_the_page_prints(browser: Browser, single: Path) -> None:
    browser.open(single)
    pdf = base64.b64decode(browser.driver.execute_cdp_cmd("Page.printToPDF", {})["data"])
    assert pdf.startswith(b"%PDF")
