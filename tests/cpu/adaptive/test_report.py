"""The report: what is in it, and what a real browser makes of it."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import cases
import pytest

from lowbit_attention import RECIPES
from lowbit_attention.adaptive import Observations, choose, write_report
from lowbit_attention.adaptive.report import report_data

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: nothing to open the page with")


NODE = shutil.which("node")
needs_node = pytest.mark.skipif(NODE is None, reason="no Node here: nothing to run the page's script with")


@pytest.fixture(scope="module")
def choice():
    return choose(cases.made_up(layers=6, steps=5), budget=0.06)


@pytest.fixture(scope="module")
def page(choice, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(path, choice, title="A <title> & more")
    return path


class Outside(HTMLParser):
    """Every address that the page names."""

    def __init__(self):
        super().__init__()
        self.addresses = []

    def handle_starttag(self, tag, attrs):
        self.addresses += [(tag, name, value) for name, value in attrs if name in ("src", "href", "data", "action")]


def test_it_is_one_file_that_loads_nothing(page):
    text = page.read_text(encoding="utf-8")
    found = Outside()
    found.feed(text)
    assert found.addresses == []
    assert "default-src 'none'" in text
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|import\(", text)
    assert set(re.findall(r"https?://[^\"' ]+", text)) == {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert "%%" not in text
    assert "<title>A &lt;title&gt; &amp; more</title>" in text


def test_a_name_cannot_end_the_data(tmp_path):
    seen = cases.made_up(layers=2, steps=1, name="</script><script>alert({})</script>%%SCRIPT%%")
    write_report(tmp_path / "r.html", choose(seen, budget=0.06))
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "<script>alert" not in text
    held = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1]
    assert json.loads(held)["rows"][0] == "</script><script>alert(0)</script>%%SCRIPT%%"


def test_the_data_is_what_was_observed(choice):
    data = report_data(choice, "t")
    seen = choice.observations
    assert len(data["rows"]) == 6
    assert data["columns"] == seen.timesteps
    assert [r["name"] for r in data["recipes"]] == ["exact", *seen.candidates]
    for r, name in enumerate(data["rows"]):
        for c, t in enumerate(data["columns"]):
            key = next(k for k in seen.records if k.name == name and k.timestep == t)
            cell = data["cells"][r][c]
            assert data["recipes"][cell["recipe"]]["name"] == choice.recipes[key]
            for numbers, score in zip(cell["scores"], seen.records[key].scores.values(), strict=True):
                assert numbers == pytest.approx([score.score, score.l1, score.cos_sim, score.rmse], rel=1e-4)
    pareto = data["pareto"]
    assert pareto["chosen"]["y"] == pytest.approx(choice.error, rel=1e-4)
    errors = [point["y"] for point in pareto["curve"]]
    times = [point["x"] for point in pareto["curve"]]
    assert errors == sorted(errors)
    assert times == sorted(times, reverse=True)
    assert {p["name"] for p in pareto["alone"]} == {"exact", *seen.candidates}


def test_numbers_that_are_none_become_null():
    seen = cases.made_up(layers=1, steps=1)
    for record in seen.records.values():
        record.scores["sage2_4b"].l1 = float("inf")
    data = report_data(choose(seen, threshold=0.5), "t")
    json.dumps(data, allow_nan=False)
    assert data["cells"][0][0]["scores"][2][1] is None


ERRORS = "<script>window.failed=[];addEventListener('error',e=>failed.push(e.message));</script>"
WORK = """<script>
const $ = (id) => document.getElementById(id), all = (s) => [...document.querySelectorAll(s)];
const change = (id, value) => { const n = $(id); if (n.type === "checkbox") n.checked = value; else n.value = value;
  n.dispatchEvent(new Event("change")); };
const fills = () => all("#heat .cell rect").map((r) => r.getAttribute("fill")).join();
const overlaps = (selector) => { const b = all(selector).map((n) => n.getBoundingClientRect()); let n = 0;
  b.forEach((p, i) => b.slice(i + 1).forEach((q) => { if (p.left < q.right - 1 && q.left < p.right - 1 &&
    p.top < q.bottom - 1 && q.top < p.bottom - 1) n++; })); return n; };
const seen = {};
seen.ready = document.documentElement.dataset.ready;
seen.cells = all("#heat .cell").length;
seen.dots = all("#heat .chosen").length;
seen.titles = all("#title").map((n) => n.textContent);
seen.rows = all("#heat .row").map((n) => n.firstChild.data);
const first = fills();
change("recipe", 0); seen.recipe = fills() !== first; seen.hint = $("heat-hint").textContent;
const second = fills();
change("metric", "rmse"); seen.metric = fills() !== second;
change("sort", "worst"); seen.sorted = all("#heat .row").map((n) => n.firstChild.data);
change("sort", "name"); seen.named = all("#heat .row").map((n) => n.firstChild.data);
change("overlay", false); seen.without = all("#heat .chosen").length;
change("overlay", true);
const column = () => all("#worst tbody tr").map((r) => r.cells[3].textContent);
seen.table = column();
all("#worst th")[3].click(); seen.reversed = column();
const lines = () => all("#tensors .histogram polyline").length;
seen.lines = lines();
const box = all("#stages input")[0]; box.checked = false; box.dispatchEvent(new Event("change")); seen.fewer = lines();
const drawn = () => all("#tensors svg").map((n) => n.innerHTML).join();
const one = drawn(); all("#worst tbody tr")[0].click(); change("layer", 3); seen.layer = drawn() !== one;
const cell = all("#heat .cell")[0];
cell.dispatchEvent(new MouseEvent("mousemove", { clientX: 300, clientY: 300 })); seen.tip = $("tip").textContent;
const before = getComputedStyle(document.body).backgroundColor; $("theme").click();
seen.theme = getComputedStyle(document.body).backgroundColor !== before;
seen.overlaps = overlaps("#pareto text") + overlaps("#heat text.row") + overlaps("#heat text.column");
seen.wider = document.documentElement.scrollWidth - innerWidth;
seen.best = all("#pareto .best").length;
seen.alone = all("#pareto .alone").length; seen.mark = all("#pareto .mark").length;
seen.failed = window.failed;
const p = document.createElement("pre"); p.id = "seen"; p.textContent = JSON.stringify(seen); document.body.append(p);
</script>"""


def opened(page, folder, width, work=WORK):
    """What a browser saw and did on the page, and what it complained about."""
    text = page.read_text(encoding="utf-8").replace("<body>", "<body>" + ERRORS).replace("</body>", work + "</body>")
    copy = folder / "work.html"
    copy.write_text(text, encoding="utf-8")
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}",
         f"--window-size={width},1400", "--virtual-time-budget=4000", "--enable-logging=stderr", "--dump-dom",
         copy.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.S)
    assert found, done.stdout[-2000:]
    complaints = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    unescaped = found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    return json.loads(unescaped), complaints


@needs_browser
@pytest.mark.parametrize("width", [1280, 800])
def test_in_a_browser(choice, page, tmp_path, width):
    seen, complaints = opened(page, tmp_path, width)
    assert complaints == []
    assert seen["failed"] == []
    assert seen["ready"] == "yes"
    assert seen["titles"] == ["A <title> & more"]
    assert seen["cells"] == seen["dots"] == 30
    assert seen["rows"] == [str(n) for n in range(6)]  # what all names share is left out
    assert seen["recipe"]
    assert seen["metric"]
    assert seen["layer"]
    assert seen["theme"]
    assert "sage2_8b" in seen["hint"]
    records = choice.observations.records
    worst = sorted(
        range(6), key=lambda n: -max(r.scores["sage2_8b"].rmse for k, r in records.items() if f".{n}." in k.name)
    )
    assert seen["sorted"] == [str(n) for n in worst]
    assert seen["named"] == seen["rows"]
    assert seen["without"] == 0
    errors = [float(x) for x in seen["table"]]
    assert errors == sorted(errors, reverse=True)
    assert [float(x) for x in seen["reversed"]] == sorted(errors)
    assert seen["lines"] == 8  # three stages of Q and K, two of V
    assert seen["fewer"] == 5
    assert "timestep 1000" in seen["tip"]
    assert "sage2_4b: score" in seen["tip"]
    assert seen["best"] > 5
    assert seen["alone"] == 5
    assert seen["mark"] == 1
    assert seen["overlaps"] == 0
    assert seen["wider"] <= 0


HOSTILE = ("__proto__", "constructor", "toString", "hasOwnProperty", "%%DATA%%", "</script>", "$&", "\\u003c")
"""Names that every JavaScript object has, or that filling in a page could take for something else.

Cases T24 and T37 of the shared list."""


def hostile(folder):
    """The page of a model whose modules have such names, some without distributions; titled by one of them."""
    seen = Observations({n: RECIPES[n] for n in ("sage2_8b", "sage2_4b")}, like="sm_89", runs=1)
    for name in HOSTILE:
        one = cases.made_up(layers=1, steps=1, candidates=("sage2_8b", "sage2_4b"), name=name)
        if name in ("constructor", "__proto__"):
            one.distributions.clear()
        seen.merge(one)
    write_report(folder / "page.html", choose(seen, threshold=0.5), title="%%DATA%%</script>")
    return folder / "page.html"


def test_names_that_mean_something_to_a_page_are_only_names(tmp_path):
    text = hostile(tmp_path).read_text(encoding="utf-8")
    held = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])
    assert held["rows"] == list(HOSTILE)
    assert held["title"] == "%%DATA%%</script>"
    assert "<title>%%DATA%%&lt;/script&gt;</title>" in text
    assert text.count("</script>") == 2


@needs_node
def test_such_names_draw_everything(tmp_path):
    hostile(tmp_path)
    stub = Path(__file__).with_name("page_stub.js")
    done = subprocess.run(
        [NODE, stub, tmp_path / "page.html"], capture_output=True, text=True, timeout=60, check=False, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["ready"] == "yes"
    assert seen["cells"] == len(HOSTILE) * 2
    assert seen["layers"] == list(HOSTILE)
    assert seen["drawn"] == [name not in ("constructor", "__proto__") for name in HOSTILE]


@needs_browser
def test_such_names_in_a_browser(tmp_path):
    count = WORK[: WORK.index("const first")] + WORK[WORK.index("seen.failed") :]
    seen, complaints = opened(hostile(tmp_path), tmp_path, 1280, count)
    assert complaints == []
    assert seen["failed"] == []
    assert seen["ready"] == "yes"
    assert seen["titles"] == ["%%DATA%%</script>"]
    assert seen["cells"] == len(HOSTILE) * 2


@needs_browser
def test_one_timestep_in_a_browser(tmp_path):
    seen_once = cases.made_up(layers=4, steps=1)
    write_report(tmp_path / "page.html", choose(seen_once, fraction=0.5, recipes=("sage2_4b", "sage2_8b")))
    count = WORK[: WORK.index("const first")] + WORK[WORK.index("seen.failed") :]
    seen, complaints = opened(tmp_path / "page.html", tmp_path, 1280, count)
    assert complaints == []
    assert seen["failed"] == []
    assert seen["cells"] == 4 * len(seen_once.candidates)  # a column for each recipe
    assert seen["dots"] == 4
