"""Figures as SVG: valid, with their own ids, scales that fit, and names shown as they are."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
from report_cases import complete_run, evaluation, save

from longlora.artifacts import RunFolder
from longlora.evaluation.report import curves
from longlora.evaluation.report.compare import read_comparison
from longlora.evaluation.report.plots import Look
from longlora.evaluation.report.style import shade_colours


def texts(svg: str | None) -> set[str]:
    return set(re.findall(r"<text[^>]*>([^<]*)</text>", svg or ""))


def test_plots_are_valid_xml_with_their_own_ids(tmp_path: Path) -> None:
    found = read_comparison([complete_run(tmp_path / "run")])
    made = [
        curves.loss_by_position(found),
        curves.perplexity_by_length(found),
        curves.log_probability_by_length(found, "passkey", ""),
        curves.training_curves(found.runs),
        curves.training_curves(found.runs, name="again"),
    ]
    ids: list[str] = []
    for svg in made:
        assert svg is not None
        root = ElementTree.fromstring(svg)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert root.get("width") is None
        assert not list(root.iter("{http://www.w3.org/2000/svg}image"))
        ids += [element.attrib["id"] for element in root.iter() if "id" in element.attrib]
    assert len(ids) == len(set(ids))
    assert curves.log_probability_by_length(found, "needle", "needle") is None


def test_position_axis_is_logarithmic_for_growing_ranges(tmp_path: Path) -> None:
    edges = [0, 2, 4, 8, 16, 32, 64, 128]
    rows = [
        {"document": "first", "start": start, "stop": stop, "tokens": stop - start, "loss": 3.0}
        for start, stop in pairwise(edges)
    ]
    run = save(RunFolder(tmp_path), base=evaluation("base", positions=rows))
    svg = curves.loss_by_position(read_comparison([run]))
    assert {"8", "16", "32", "64", "128"} <= texts(svg)


def test_training_of_several_runs_is_told_apart_by_the_names_of_runs(tmp_path: Path) -> None:
    runs = [complete_run(tmp_path / name) for name in ("$x$", "_y")]
    svg = curves.training_curves(read_comparison(runs).runs)
    assert {"trained · $x$, mean of 2", "trained · _y, mean of 2"} <= texts(svg)


def test_training_of_a_run_whose_trained_model_was_not_measured(tmp_path: Path) -> None:
    run = complete_run(tmp_path / "run")
    run.evaluation("trained").unlink()
    assert curves.training_curves(read_comparison([run]).runs) is not None


def test_numbers_too_large_for_a_perplexity_do_not_stop_the_plot(tmp_path: Path) -> None:
    rows = evaluation("base")["perplexity"]
    rows[1]["loss"] = 5000.0
    run = save(RunFolder(tmp_path), base=evaluation("base", perplexity=rows))
    assert curves.perplexity_by_length(read_comparison([run])) is not None


def test_models_of_six_runs_look_different(tmp_path: Path) -> None:
    runs = [save(RunFolder(tmp_path / str(seed)), trained=evaluation("trained", seed=seed)) for seed in range(6)]
    looks = [Look.of(column) for column in read_comparison(runs).columns]
    assert len({look.colour for look in looks}) == len({look.marker for look in looks}) == 6


def luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("percent", range(0, 101, 5))
def test_text_on_every_shade_has_the_contrast_that_wcag_asks_for(percent: int) -> None:
    shade, ink = (luminance(colour) for colour in shade_colours(percent / 100))
    contrast = (max(shade, ink) + 0.05) / (min(shade, ink) + 0.05)
    assert contrast >= 4.5


def test_shades_grow_brighter_with_the_share() -> None:
    shades = [luminance(shade_colours(share / 20)[0]) for share in range(21)]
    assert shades == sorted(shades)
