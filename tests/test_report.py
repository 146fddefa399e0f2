"""The page of a training, which stands alone."""

import json
import re

from small import call, clips_fixture, mistake, model_fixture  # noqa: F401 (fixtures)

import train
from support import report


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


def test_a_page_of_an_unfinished_run_and_of_none(tmp_path):
    mistake(call(report, tmp_path / "none"), "holds no run", "settings.json")
    (tmp_path / "settings.json").write_text(json.dumps({"steps": 9, "batch": 2}))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0, "flops": 1e9, "seconds": 2.0}\n{"step": 2, "lo')
    assert call(report, tmp_path).status == 0
    assert "1 of 9" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_curve_spans_what_it_shows():
    svg = report.curve("title", {"up": [(0, 0.0), (10, 2.0)], "none": []})
    assert 'd="M60.0 230.0L890.0 30.0"' in svg and ">up<" in svg and ">none<" not in svg
    assert ">0<" in svg and ">2<" in svg and ">10<" in svg
    long = report.curve("", {"a": [(x, float(x % 2)) for x in range(10000)]}, points=100)
    assert long.count("L") == 99
    assert report.curve("", {"a": []}) == report.curve("", {"a": [(1, float("nan"))]}) == ""
    assert "nan" not in report.curve("", {"a": [(1, 3.0)]})
