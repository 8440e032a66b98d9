"""The report in headless Chromium: fits a phone and a desktop, light and dark, and shows what it should."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import numpy
import pytest
from matplotlib.image import imread
from report_cases import NEW, OLD, complete_run, evaluation, prompt, ruler, save

from longlora.evaluation.report.write import write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the path"),
]
WIDTHS = {"phone": 390, "desktop": 1200}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report on two runs with every section filled, with names as long as they get."""
    root = tmp_path_factory.mktemp("report")
    lengths = (OLD // 2, OLD, 3 * OLD // 2, NEW)
    changes: dict[str, Any] = {
        "retrieval": [
            *(
                prompt(
                    task,
                    length,
                    depth,
                    trial,
                    correct=trial < 4 - index - (index > 1),
                    log_probability=-1.0 - index - trial / 9,
                )
                for task in ("passkey", "needle")
                for index, length in enumerate(lengths)
                for depth in (0.0, 0.25, 0.5, 0.75, 1.0)
                for trial in range(4)
            ),
            *ruler(
                {
                    name: {length: [1 - index / 4, 1.0] for index, length in enumerate(lengths)}
                    for name in ("niah_single_1", "niah_multikey_3", "vt", "cwe", "fwe")
                }
            ),
        ],
        "harness": [{"task": "arc_easy", "metric": "acc_norm", "value": 0.5, "stderr": 0.02, "samples": 500}],
        "cost": [{"task": "needle", "seconds": 1234.5, "tokens_read": 12345678, "tokens_reused": 98765432}],
    }
    runs = [complete_run(root / name, **changes) for name in ("smollm2_135m_8k_s2_sinks", "smollm2_135m_8k_full")]
    save(runs[1], trained=evaluation("trained", seconds=9.0, **changes))
    write_report(runs, root)
    return root / "report.html"


def chromium(*arguments: str) -> str:
    assert CHROMIUM is not None
    quiet = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=2000")
    made = subprocess.run([CHROMIUM, *quiet, *arguments], capture_output=True, text=True, timeout=120, check=True)
    return made.stdout


def framed(page: Path, width: int) -> Path:
    """A page that shows the report in a frame of `width` pixels, as a window cannot be made as narrow as a phone, and
    writes down how wide it is laid out and what sticks out of it."""
    look = """
      const page = frame.contentDocument, root = page.documentElement;
      page.querySelectorAll('details').forEach(folded => folded.open = true);
      const inside = element => element.closest('.scroll, pre') !== null;
      const out = [...page.body.querySelectorAll('*')].filter(element => !inside(element.parentElement))
        .filter(element => element.getBoundingClientRect().right > root.clientWidth + 1).map(item => item.tagName);
      const texts = [...page.querySelectorAll('svg text')].map(text => text.getBoundingClientRect().height);
      const cramped = [...page.querySelectorAll('td, th')].filter(cell => cell.scrollWidth > cell.clientWidth + 2)
        .map(cell => cell.innerText);
      document.title = JSON.stringify({wide: root.scrollWidth, room: root.clientWidth, out: out.slice(0, 5),
        cramped: cramped.slice(0, 5),
        smallest: Math.min(...texts), paper: getComputedStyle(page.body).backgroundColor});
    """
    srcdoc = page.read_text(encoding="utf-8").replace("&", "&amp;").replace('"', "&quot;")
    path = page.with_name(f"framed{width}.html")
    path.write_text(
        "<!DOCTYPE html><meta charset='utf-8'><meta name='color-scheme' content='light dark'><style>body{margin:0}"
        f"iframe{{border:0;width:{width}px;height:14000px}}</style><title></title>"
        f'<iframe id="frame" srcdoc="{srcdoc}"></iframe>'
        f"<script>const frame = document.getElementById('frame'); frame.onload = () => {{ {look} }}</script>",
        encoding="utf-8",
    )
    return path


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_page_is_not_wider_than_the_screen_and_its_figures_are_legible(page: Path, width: int) -> None:
    dom = chromium("--dump-dom", framed(page, width).as_uri())
    title = re.search(r"<title>(.*?)</title>", dom, re.DOTALL)
    assert title is not None
    found = json.loads(unescape(title[1]))
    assert found["room"] == width
    assert found["wide"] <= width, found
    assert found["out"] == []
    assert found["cramped"] == []
    assert found["smallest"] >= 8  # pixels of a line of text


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_screenshot_has_paper_ink_and_shaded_cells_of_the_scheme(
    page: Path, tmp_path: Path, width: int, dark: bool
) -> None:
    picture = tmp_path / "page.png"
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    chromium(*scheme, f"--window-size={width},9000", f"--screenshot={picture}", framed(page, width).as_uri())
    pixels = (numpy.asarray(imread(picture))[:, :width, :3] * 255).round().astype(int)
    brightness = pixels.mean(axis=2)
    paper = numpy.median(brightness)
    assert paper < 40 if dark else paper > 230
    # Text stands out from the paper, and both ends of the scale of shares are there.
    assert (brightness > 200).mean() > 0.005 if dark else (brightness < 60).mean() > 0.005
    for shade in ((0xFE, 0xE8, 0x38), (0x00, 0x22, 0x4E)):
        assert (numpy.abs(pixels - shade).sum(axis=2) < 6).sum() > 500
