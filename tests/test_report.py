"""The page of a training, which stands alone."""

import json
import re

import pytest
from small import call, clips_fixture, mistake, model_fixture  # noqa: F401 (fixtures)

import train
from support import plots, report


def test_a_run_ends_with_a_page_that_stands_alone(model, clips, tmp_path):
    out = tmp_path / "a <run>"
    flags = ["--model", model, "--data", clips, "--out", out, "--rank", 2, "--batch", 2, "--steps", 4]
    assert call(train, *flags, "--sample-every", 2, "--val-every", 2).status == 0
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 4 and page.count("data:image/png;base64,") == 3
    assert not re.search(r"(src|href)=['\"](?!data:)", page) and "a &lt;run&gt;" in page and "<run>" not in page
    for words in ("sync", "copy", "4 of 4", "the same on the paper", "drop_caption", "8 GPUs of 80 GB", "CPU, threads"):
        assert words in page, words
    again = call(report, out)
    assert again.status == 0 and again.out.strip() == str(out / "report.html")
    assert (out / "report.html").read_text(encoding="utf-8") == page


def test_the_best_of_the_run_is_marked_not_the_lowest(tmp_path):
    (tmp_path / "settings.json").write_text(json.dumps({"steps": 9, "batch": 2}))
    figures = [(0, 0, 3.0), (5, 5, 2.0), (9, 5, 1.9)]  # the last is lower, by less than it is uncertain
    lines = [{"step": step, "best": best, "sync": y, "async": y, "clean": y, "copy": y} for step, best, y in figures]
    lines = [line | {"loss": 1.0, "flops": 1e9, "seconds": 2.0} for line in lines]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = report.write(tmp_path).read_text(encoding="utf-8")
    assert page.count(">best: step 5<") == 3 and "step 9<" not in page
    assert "<td>2 s on this machine</td>" in page and "<td>12 h 55 min<" in page


def test_a_page_of_an_unfinished_run_and_of_none(tmp_path):
    mistake(call(report, tmp_path / "none"), "holds no run", "settings.json")
    (tmp_path / "settings.json").write_text(json.dumps({"steps": 9, "batch": 2}))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0, "flops": 1e9, "seconds": 2.0}\n{"step": 2, "lo')
    assert call(report, tmp_path).status == 0
    assert "1 of 9" in (tmp_path / "report.html").read_text(encoding="utf-8")


def shown(svg: str, name: str) -> list[list[float]]:
    """The points of a line of an SVG."""
    path = re.search(rf'<g id="{name}">\s*<path d="([^"]*)"', svg)[1]
    return [[float(number) for number in point.split()] for point in re.split("[ML]", path)[1:]]


def ticks(svg: str) -> list[str]:
    return re.findall(r"<text [^>]*>([^<]*)</text>", svg)


def test_a_curve_spans_what_it_shows():
    svg = plots.curves("title", [{"step": 0, "up": 0.0}, {"step": 10, "up": 2.0}], [("up", "none")])
    (left, bottom), (right, top) = shown(svg, "up")
    width, height = (float(number) for number in re.search(r'viewBox="0 0 ([0-9.]+) ([0-9.]+)"', svg).groups())
    assert right - left > 0.85 * width and bottom - top > 0.6 * height
    assert ">up<" in svg and ">none<" not in svg and ">title<" in svg
    assert {"0", "2", "10"} <= {text.removesuffix(".0").removesuffix(".00") for text in ticks(svg)}
    long = plots.curves("", [{"step": x, "a": float(x % 2)} for x in range(10000)], [("a",)], points=100)
    assert len(shown(long, "a")) == 100 and {y for _, y in shown(long, "a")} == {shown(long, "a")[0][1]}
    assert plots.curves("", [], [("a",)]) == plots.curves("", [{"step": 1, "a": float("nan")}], [("a",), ()]) == ""
    single = plots.curves("", [{"step": 1, "a": 3.0}], [("a",)])
    assert "nan" not in single and len(shown(single, "a")) == 2  # a dot


def test_each_panel_has_its_own_range_and_the_best_step_is_marked():
    metrics = [{"step": 1, "small": 0.1, "large": 50.0}, {"step": 9, "small": 0.11, "large": 70.0}]
    panels = [("small",), ("large",), ("empty",)]
    svg = plots.curves("validation", metrics, panels, best=9)
    heights = [abs(points[0][1] - points[1][1]) for points in (shown(svg, "small"), shown(svg, "large"))]
    assert heights[0] == pytest.approx(heights[1], rel=0.01) and svg.count(">best: step 9<") == 2
    assert svg == plots.curves("validation", metrics, panels, best=9) and ">empty<" not in svg
