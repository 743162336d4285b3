"""The report as a reader meets it: in a browser without a head, on a desk and on a phone, in light and in dark."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from reported import HOSTILE, NUM_LAYERS, make_priced_run, make_probe_run, make_run, model_comparison
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from serving import served

from dtmsearch.report.comparison import write_comparison
from dtmsearch.report.model_page import write_model_comparison
from dtmsearch.report.writing import write_report

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
NUM_KINDS = 3
PATIENCE_SECONDS = 60.0
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium and chromedriver here")


class Page:
    """A report in a browser; `show` lays it out anew, `see` where it is not there as it was laid out last."""

    _untouched: tuple[str, int] | None = None  # of the one browser of these tests

    def __init__(self, browser: Any, url: str) -> None:
        self.browser, self.url = browser, url

    def see(self, width: int = 1440) -> None:
        """For tests that only look."""
        if Page._untouched != (self.url, width):
            self.show(width)
            Page._untouched = self.url, width

    def show(self, width: int = 1440, theme: str = "light") -> None:
        Page._untouched = None
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        features = [{"name": "prefers-color-scheme", "value": theme}]
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        self.browser.get(self.url)
        self.until("return document.documentElement.dataset.ready === 'yes'")

    def until(self, script: str) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not self.run(script):
            assert time.monotonic() < deadline, script
            time.sleep(0.02)

    def run(self, script: str, *arguments: Any) -> Any:
        return self.browser.execute_script(script, *arguments)

    def find(self, selector: str) -> Any:
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[Any]:
        found: list[Any] = self.browser.find_elements(By.CSS_SELECTOR, selector)
        return found

    def point_at(self, element: Any) -> ActionChains:
        self.run("arguments[0].scrollIntoView({block: 'center'})", element)
        return ActionChains(self.browser, duration=20).move_to_element(element)

    def rows_shown(self) -> list[str]:
        rows: list[str] = self.run(
            "return [...document.querySelectorAll('#components tbody tr:not([hidden])')].map(r => r.cells[0].innerText)"
        )
        return rows


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    folder = tmp_path_factory.mktemp("page")
    make_run(folder / "store", "further", share=0.9)
    write_report(make_run(folder / "store"), "toy", folder / "report.html")
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))
    try:
        yield Page(browser, Path(folder / "report.html").as_uri())
    finally:
        browser.quit()


# Pages that look otherwise than that of a finished beam.
KINDS = ("priced", "probe", "failed", "running", "pruned", "compared", "models")


@pytest.fixture(scope="module")
def kinds(page: Page, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Page]:
    """Each in the same browser."""
    folder = tmp_path_factory.mktemp("kinds")
    stores = {
        "priced": make_priced_run(folder / "priced"),
        "probe": make_probe_run(folder / "probe"),
        "failed": make_run(folder / "failed", "failed", status="failed", failing=True),
        "running": make_run(folder / "running", "running", status="running"),
        "pruned": make_run(folder / "pruned", "pruned", schemes=("magnitude-0.5", "drop")),
    }
    for kind, store in stores.items():
        write_report(store, kind, folder / f"{kind}.html")
    write_comparison(make_run(folder / "failed", "one"), "one", "failed", folder / "compared.html")
    write_model_comparison(model_comparison(), folder / "models.html")
    return {kind: Page(page.browser, (folder / f"{kind}.html").as_uri()) for kind in KINDS}


@pytest.fixture
def shown(page: Page) -> Page:
    page.show()
    return page


@pytest.fixture
def seen(page: Page) -> Page:
    page.see()
    return page


def test_nothing_is_said_on_the_console_and_nothing_asked_of_a_network(page: Page) -> None:
    page.browser.get_log("browser"), page.browser.get_log("performance")
    page.show()
    for button in page.all("#course button, #sensitivity button"):
        button.click()
    page.until("return [...document.querySelectorAll('.alternative:not([hidden]) .chart')].every(c => c.dataset.drawn)")
    messages = [json.loads(entry["message"])["message"] for entry in page.browser.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    asked = [url for url in urls if url != page.url and not url.startswith(("data:", "blob:"))]
    assert (page.browser.get_log("browser"), asked) == ([], [])


@pytest.mark.parametrize("figure", ["sensitivity-kl-int4-channel", "plan"])
def test_a_heat_map_has_a_cell_for_each_layer_and_kind(seen: Page, figure: str) -> None:
    assert len(seen.all(f"[data-figure='{figure}'] .mark-rect.role-mark path")) == NUM_LAYERS * NUM_KINDS


def test_what_a_store_holds_is_shown_as_text(seen: Page) -> None:
    assert seen.run("return document.title") == "toy \N{EN DASH} dtmsearch"
    assert HOSTILE in seen.find("pre.prompt").text


def test_blanks_are_seen_and_copied_as_they_are(seen: Page) -> None:
    blank = "document.querySelector('pre.prompt i.sp')"
    assert seen.run(f"return {blank}.textContent") == " "
    assert "radial-gradient" in seen.run(f"return getComputedStyle({blank}).backgroundImage")


@pytest.mark.parametrize("width", [1440, 390])
def test_no_text_of_a_chart_is_cut(page: Page, width: int) -> None:
    page.see(width)
    assert page.run(_CUT) == []


def test_a_table_that_is_wider_than_its_place_says_that_it_scrolls(page: Page) -> None:
    page.see(390)
    assert page.find("#held-out .hint").is_displayed()
    assert page.run("const t = document.querySelector('#held-out .wide'); return t.scrollWidth > t.clientWidth")


def test_pointing_at_a_cell_gives_its_numbers(shown: Page) -> None:
    shown.point_at(shown.all("[data-figure='plan'] .mark-rect.role-mark path")[0]).perform()
    shown.until("return document.querySelector('#vg-tooltip-element.visible') !== null")
    said = shown.find("#vg-tooltip-element").text
    assert "model.layers." in said and "bits per weight" in said


def test_a_click_on_a_cell_leaves_its_component_in_the_table(shown: Page) -> None:
    cell = shown.all("[data-figure='sensitivity-kl-int8-channel'] .mark-rect.role-mark path")[0]
    shown.point_at(cell).click().perform()
    shown.until("return [...document.querySelectorAll('#components tbody tr:not([hidden])')].length === 1")
    (component,) = shown.rows_shown()
    said = cell.get_attribute("aria-label") or ""
    assert component in said


def test_a_click_on_another_runs_plan_gives_the_command_that_exports_it(shown: Page) -> None:
    marks = shown.all("[data-figure='sweep-fdt'] .mark-symbol.role-mark path")
    (other,) = [mark for mark in marks if "plan: further" in (mark.get_attribute("aria-label") or "")]
    shown.point_at(other).click().perform()
    shown.until("return document.getElementById('picked').innerText.includes('dtmsearch export further --to dense')")
    assert "bits per weight" in shown.find("#picked").text


def test_the_keyboard_filters_and_clears(shown: Page) -> None:
    shown.find("#kind").send_keys("up")
    assert len(shown.rows_shown()) == NUM_LAYERS and all(name.endswith("up_proj") for name in shown.rows_shown())
    shown.find("#clear").send_keys(Keys.ENTER)
    assert len(shown.rows_shown()) == NUM_LAYERS * NUM_KINDS


def test_the_keyboard_changes_the_metric(shown: Page) -> None:
    shown.find("#sensitivity button[data-part='FDT']").send_keys(Keys.ENTER)
    shown.until("return document.querySelector('[data-figure=\"sensitivity-fdt-int4-channel\"] svg') !== null")
    assert not shown.find("[data-figure='sensitivity-kl-int4-channel']").is_displayed()


def problems_of(page: Page) -> list[Any]:
    """What axe finds, every text open."""
    page.run("for (const text of document.querySelectorAll('details')) text.open = true")
    page.run((files("axe_core_python") / "axe.min.js").read_text(encoding="utf-8"))
    found = page.browser.execute_async_script(
        "axe.run(document, {resultTypes: ['violations']}).then(arguments[arguments.length - 1])"
    )
    return [(v["id"], [node["html"] for node in v["nodes"]][:3]) for v in found["violations"]]


_OVERFLOW = "return Math.max(0, document.documentElement.scrollWidth - window.innerWidth)"


@pytest.mark.parametrize(("width", "theme"), [(390, "dark"), (1440, "light")])
def test_it_fits_and_can_be_read_by_everybody(page: Page, width: int, theme: str) -> None:
    page.show(width, theme)
    assert (problems_of(page), page.run(_OVERFLOW)) == ([], 0)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_page_fits_and_can_be_read_by_everybody(kinds: dict[str, Page], kind: str) -> None:
    page = kinds[kind]
    page.show(390, "light" if KINDS.index(kind) % 2 else "dark")
    assert (problems_of(page), page.run(_OVERFLOW), page.run(_CUT)) == ([], 0, [])


def test_the_predicted_front_is_drawn_with_the_plans_on_it(kinds: dict[str, Page]) -> None:
    page = kinds["priced"]
    page.show()
    front = "[data-figure='front']"
    assert len(page.all(f"{front} .mark-area.role-mark path")) == 1
    names = page.run(
        f'return [...document.querySelectorAll("{front} .mark-text.role-mark text")].map(t => t.textContent)'
    )
    assert "this plan" in names and "uniform int2-channel" in names


def test_a_page_prints_without_what_only_a_screen_has(kinds: dict[str, Page]) -> None:
    page = kinds["priced"]
    page.show(390)
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        shown = page.run(
            "return [...document.querySelectorAll('.hint, .choices, .filters')].filter(e => e.offsetParent)"
        )
        scrolled = page.run("return getComputedStyle(document.querySelector('.tall')).maxHeight")
    finally:
        page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    assert (shown, scrolled) == ([], "none")


# The store behind a server.


def test_the_list_of_runs_follows_the_store(page: Page, tmp_path: Path) -> None:
    store = make_run(tmp_path)
    make_run(tmp_path, "other", share=0.9)
    with served(store) as address:
        shown = Page(page.browser, address)
        shown.show(390, "dark")
        assert "token" not in page.run("return location.href")
        assert (problems_of(shown), page.run(_OVERFLOW), page.run(_CUT)) == ([], 0, [])
        record = store.run("toy")
        assert record is not None
        with store.writer("toy") as writer:
            writer.put_run(replace(record, status="failed", message="the machine was lost"))
        cell = "tr[data-run='toy'] td[data-key='status']"
        shown.until(f'return document.querySelector("{cell}").textContent === "failed: the machine was lost"')
        shown.find("tr[data-run='other'] a").click()
        shown.until("return document.title.startsWith('other') && document.documentElement.dataset.ready === 'yes'")
        shown.until("return document.getElementById('live').textContent.startsWith('finished: ')")


# Texts in charts that do not lie within their chart, in pixels beyond it.
_CUT = """
return [...document.querySelectorAll('.chart')].filter(chart => chart.closest('[hidden]') === null).flatMap(chart => {
  const box = chart.querySelector('svg').getBoundingClientRect();
  return [...chart.querySelectorAll('svg text')].filter(text => {
    const own = text.getBoundingClientRect();
    return own.width && (own.left < box.left - 1 || own.right > box.right + 1 || own.bottom > box.bottom + 1);
  }).map(text => `${chart.dataset.figure}: ${text.textContent}`);
})
"""
