"""Reports in a real browser: they ask for nothing, nothing overlaps, tables sort, charts answer."""

import shutil
from dataclasses import dataclass, replace

import pytest
from report_records import SITES, append_lines, example_line, large_record, mixer_line
from report_records import write_examples as examples_into
from runs_for_tests import save_model, settings_for, write_clients

from fedalt.engine.schedule import Event
from fedalt.report.cells import collect
from fedalt.report.compared_page import comparison_page
from fedalt.report.comparison import write_results
from fedalt.report.page import write_page
from fedalt.report.records import read_record
from fedalt.report.run_page import run_page
from fedalt.runs.compare import Entry, jobs_of
from fedalt.runs.lifecycle import resume_run, start_run
from fedalt.runs.setup import prepare

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")

METHODS = ("fedalt", "local", "fedit", "fedlease", "fedsa_lora", "feddpa")
CLIENTS = ("a", "b", "c", "d")

# The boxes of all visible texts, those of a figure apart, as far as a scrolling table shows them;
# its head and foot lie over its rows on purpose.
TEXTS = """() => {
  const boxes = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; (node = walk.nextNode()); ) {
    const parent = node.parentElement;
    if (!node.data.trim() || parent.closest("script, svg, .tall tfoot, .tall thead")) continue;
    if (!parent.checkVisibility({ contentVisibilityAuto: true })) continue;
    const frame = (parent.closest(".scroll") ?? document.body).getBoundingClientRect();
    const range = document.createRange();
    range.selectNodeContents(node);
    for (const box of range.getClientRects()) {
      const [left, right] = [Math.max(box.left, frame.left), Math.min(box.right, frame.right)];
      const [top, bottom] = [Math.max(box.top, frame.top), Math.min(box.bottom, frame.bottom)];
      if (left < right && top < bottom)
        boxes.push(["page", node.data.trim().slice(0, 30), left, top, right, bottom]);
    }
  }
  document.querySelectorAll("[data-figure]").forEach((figure) => {
    for (const text of figure.querySelectorAll("svg text")) {
      if (!text.textContent.trim() || text.getAttribute("opacity") === "0") continue;
      const box = text.getBoundingClientRect();
      const name = figure.dataset.figure;
      boxes.push([name, text.textContent, box.left, box.top, box.right, box.bottom]);
    }
  });
  return boxes;
}"""


@dataclass(frozen=True)
class Stops:
    """A watcher who interrupts the run in the middle of a round."""

    round: int

    def on_event(self, event: Event) -> None:
        if (event.round, event.client_id) == (self.round, "c"):
            raise KeyboardInterrupt

    def on_record(self, line) -> None:
        """Look away."""


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Files of reports by what they are of."""
    place = tmp_path_factory.mktemp("reports")
    model, data = save_model(place / "model"), write_clients(place / "data", clients=CLIENTS)
    entries = [
        Entry(name, settings_for(model, data, method={"name": name}, rounds={"rounds": 3}))
        for name in METHODS
    ]
    jobs = jobs_of(entries, (0,), place / "compared")
    for job in jobs:
        start_run(prepare(job.settings), job.path)
    write_results(place / "compared", collect(entries, (0,), jobs))

    crashed = place / "crashed"
    prepared = prepare(replace(entries[0].settings, local_baseline=True))
    with pytest.raises(KeyboardInterrupt):
        start_run(prepared, crashed, Stops(1))
    resume_run(prepared, crashed)

    single = shutil.copytree(jobs[0].path, place / "single")
    for at in range(3):
        weights = dict.fromkeys(SITES, 0.4 + 0.1 * at)
        append_lines(single, [mixer_line(client, at, weights) for client in CLIENTS])
    examples_into(single, [example_line(client, n) for client in CLIENTS for n in range(6)])

    runs = {
        "single": single,
        "fedlease": jobs[METHODS.index("fedlease")].path,
        "crashed": crashed,
        "large": large_record(place / "large", crashed),
    }
    made = {name: run_page(read_record(run)) for name, run in runs.items()}
    made["compared"] = comparison_page(place / "compared")
    files = {name: place / f"{name}.html" for name in made}
    for name, page in made.items():
        write_page(page, files[name])
    return files


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        running = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def visit(browser):
    """Opens a file in a window of its own and gives the page and all that it said and asked for."""
    contexts = []

    def opened(file, width=1280, scheme="light"):
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, reduced_motion="reduce"
        )
        contexts.append(context)
        page, heard = context.new_page(), []
        page.on("console", lambda message: heard.append(message.text))
        page.on("pageerror", lambda error: heard.append(str(error)))
        page.on("request", lambda request: heard.append(request.url))
        page.goto(file.as_uri())
        page.wait_for_selector("html[data-drawn]", timeout=60_000)
        return page, heard

    yield opened
    for context in contexts:
        context.close()


def overlaps(boxes):
    """Pairs of texts that share more than a pixel and a half in both directions."""
    found = []
    boxes = sorted(boxes, key=lambda box: box[3])
    for at, (place, text, left, _, right, bottom) in enumerate(boxes):
        for other in boxes[at + 1 :]:
            if other[3] >= bottom - 1.5:
                break
            across = min(right, other[4]) - max(left, other[2]) > 1.5
            if across and other[0] == place and min(bottom, other[5]) - other[3] > 1.5:
                found.append((place, text, other[1]))
    return found


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", ["single", "fedlease", "crashed", "large", "compared"])
def test_a_page_asks_for_nothing_and_has_room_for_every_text(pages, visit, name, width):
    page, heard = visit(pages[name], width)
    assert heard == [pages[name].as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    boxes = page.evaluate(TEXTS)
    figures = {box[0] for box in boxes} - {"page"}
    assert len(figures) == page.locator("[data-figure]").count() > 2
    assert overlaps(boxes) == []


def test_the_check_for_overlaps_finds_one(pages, visit):
    page, _ = visit(pages["single"])
    page.add_style_tag(content="h1 { margin-bottom: -2rem; }")
    assert any("FedALT" in second for _, _, second in overlaps(page.evaluate(TEXTS)))


def test_a_table_sorts_on_a_click_and_back_on_another(pages, visit):
    page, _ = visit(pages["crashed"])
    table = page.locator("table", has=page.get_by_text("Scores on test data"))
    head = table.locator("th", has=page.get_by_role("button", name="own", exact=True))
    feet = table.locator("tfoot").inner_text()

    def values():
        cells = table.locator("tbody td:nth-child(3)")
        return [float(cell.get_attribute("data-value")) for cell in cells.all()]

    head.get_by_role("button").click()
    assert head.get_attribute("aria-sort") == "descending"
    assert values() == sorted(values(), reverse=True)
    head.get_by_role("button").focus()
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "ascending"
    assert values() == sorted(values())
    client = table.locator("th", has=page.get_by_role("button", name="client"))
    client.get_by_role("button").click()
    assert table.locator("tbody th").all_inner_texts() == list(CLIENTS)
    assert table.locator("th[aria-sort]").count() == 1
    assert table.locator("tfoot").inner_text() == feet


@pytest.mark.parametrize(
    ("name", "figure", "told"),
    [
        ("crashed", "train-loss", ("client", "round", "loss")),
        ("single", "similarity", ("client", "other", "cosine")),
        ("single", "mixer-layers", ("layer", "weight")),
        ("compared", "gains", ("method", "client", "gain over local")),
    ],
)
def test_a_chart_tells_the_value_under_the_pointer(pages, visit, name, figure, told):
    page, heard = visit(pages[name])
    place = page.locator(f"[data-figure='{figure}'] svg")
    place.scroll_into_view_if_needed()
    box = place.bounding_box()
    tip = page.locator("#vg-tooltip-element.visible")
    page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + box["height"] * 0.6)
    page.mouse.move(box["x"] + box["width"] * 0.61, box["y"] + box["height"] * 0.61)
    tip.wait_for(timeout=5000)
    text = tip.inner_text()
    assert all(word in text for word in told)
    assert any(letter.isdigit() for letter in text)
    assert len(heard) == 1


def test_a_token_tells_its_weight_under_the_pointer(pages, visit):
    page, _ = visit(pages["single"])
    token = page.locator(".tokens i").nth(3)
    token.hover()
    shown = token.evaluate("each => getComputedStyle(each, '::after').content")
    assert f'"0.{token.get_attribute("data-w")}"' == shown.replace('" "', "").replace(" ", "")


def test_a_dark_page_is_dark_and_its_charts_are_light(pages, visit):
    def colours(scheme):
        page, _ = visit(pages["single"], scheme=scheme)
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        label = page.locator("[data-figure='train-loss'] svg text").first
        return [sum(map(int, each[4:-1].split(","))) / 3 for each in (
            ground, label.evaluate("each => getComputedStyle(each).fill"))]  # fmt: skip

    ground, label = colours("dark")
    assert ground < 40
    assert label > 200
    ground, label = colours("light")
    assert ground > 240
    assert label < 60
