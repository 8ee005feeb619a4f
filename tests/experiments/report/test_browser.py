"""Reports in a browser, on a screen as narrow as a phone's.

The tests are skipped on a machine without Chromium or Chrome.
"""

import html
import json
import os
import re
import shutil
import subprocess

import pytest

from hintjax.cli import main
from hintjax.experiments.report import page
from hintjax.experiments.report.drawn import drawing

pytestmark = pytest.mark.quick

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
WIDTH = 400  # pixels
# Each page is in a frame of this width: the window of a browser may not be so narrow.
MEASURE = """
addEventListener("load", () => {
  const found = [...document.querySelectorAll("iframe")].map(frame => {
    const page = frame.contentDocument;
    page.querySelectorAll("details").forEach(part => part.open = true);
    const text = [...page.querySelectorAll("h1, p, li, td, th, caption, summary")];
    const boxes = [...page.querySelectorAll(".box")];
    return {
      title: page.title,
      width: page.scrollingElement.scrollWidth,
      images: [...page.images].map(image => [image.naturalWidth, image.width]),
      font: Math.min(...text.map(one => parseFloat(getComputedStyle(one).fontSize))),
      scrolling: boxes.filter(box => box.scrollWidth > box.clientWidth).map(
        box => box.querySelector("td.words") ? "names and values" : "table"),
      ends: boxes.map(box => box.getBoundingClientRect().right),
    };
  });
  const measured = document.createElement("pre");
  measured.textContent = JSON.stringify(found);
  document.body.replaceChildren(measured);
});
"""


def opened(pages, folder):
    """What a browser measures of pages, and the lines of its console."""
    frames = "".join(
        f'<iframe width="{WIDTH}" height="800" style="border: 0" '
        f'srcdoc="{html.escape(text)}"></iframe>'
        for text in pages
    )
    host = f"<!DOCTYPE html><body>{frames}<script>{MEASURE}</script></body>"
    (folder / "host.html").write_text(host, encoding="utf-8")
    ran = subprocess.run(
        [
            *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"),
            *("--enable-logging=stderr", "--virtual-time-budget=10000"),
            *(f"--user-data-dir={folder / 'browser'}", (folder / "host.html").as_uri()),
        ],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"HOME": str(folder)},
    )
    measured = re.search(r"<pre>(\[.*\])</pre>", ran.stdout, re.DOTALL)
    assert measured, f"{ran.stdout[-500:]}\n{ran.stderr[-2000:]}"
    console = [line for line in ran.stderr.splitlines() if ":CONSOLE" in line]
    return json.loads(html.unescape(measured[1])), console


@pytest.fixture(scope="module")
def reports(by_hand, compared_by_hand, tmp_path_factory):
    """The reports of a run, of a comparison, and of two runs; with long names."""
    folder = tmp_path_factory.mktemp("reports")
    long = "my_package.networks.of_the_long_name:student_with_a_long_name_of_its_own"
    classes = tuple(f"a class with a long name {number}" for number in range(12))
    run = by_hand(folder / "run", names=classes, student=long, pairs=("a=b", "c=d"))
    arms = ["kd", "fitnets", "attention transfer, with the hints of another layer"]
    compared = compared_by_hand(folder / "compared", arms)
    if drawing():
        from matplotlib.figure import Figure

        Figure(figsize=(16, 9), dpi=100).savefig(compared / "comparison.png")
        Figure(figsize=(4.4, 3), dpi=100).savefig(run / "attention.png")
    main(["report", str(run)])
    main(["report", str(compared)])
    other = by_hand(folder / "a longer name of a run", "at", student=long)
    main(["report", str(run), str(other), "--output", str(folder / "report.html")])
    files = [where / "report.html" for where in (run, compared, folder)]
    return [file.read_text(encoding="utf-8") for file in files]


needs_browser = pytest.mark.skipif(
    BROWSER is None, reason=f"none of {', '.join(BROWSERS)} is installed"
)


@needs_browser
def test_reports_are_readable_on_a_narrow_screen(reports, tmp_path):
    measured, console = opened(reports, tmp_path)
    assert console == []
    assert len(measured) == len(reports)
    for found in measured:
        assert found["width"] <= WIDTH, found["title"]
        assert max(found["ends"]) <= WIDTH
        assert found["font"] >= 14
        assert bool(found["images"]) == drawing()
        for natural, shown in found["images"]:
            assert natural > 0
            assert shown >= 0.65 * natural  # the texts in a picture stay readable
        # Names and values are read without scrolling; other tables scroll in a box.
        assert "names and values" not in found["scrolling"], found["title"]


@needs_browser
def test_the_browser_tells_a_page_that_is_wide_broken_or_blocked(tmp_path):
    wide = page.page("wide", page.Html('<p style="width: 500px">wide</p>'))
    broken = page.page("broken", page.image(b"no image", "png", "nothing"))
    blocked = page.page("blocked", page.Html("<script>0</script>"))
    measured, console = opened([wide, broken, blocked], tmp_path)
    assert measured[0]["width"] > WIDTH
    assert measured[1]["images"][0][0] == 0
    assert len(console) == 1 and "Content Security Policy" in console[0]
