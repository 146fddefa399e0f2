"""paper/price.py: what a number of operations costs, and that the paper's are counted as everywhere else."""

import pytest

from paper import price
from support import report


def test_a_price_is_hours_times_price_an_hour():
    speed, an_hour = price.GPUS["H100"]
    assert price.dollars(speed * 3600 * 10, "H100") == pytest.approx(10 * an_hour)


def test_the_papers_run_is_counted_as_in_a_runs_report():
    flops = price.paper_flops()
    assert flops == pytest.approx(report.PAPER_FLOPS, rel=0.01)
    # Dense layers of 14.3e9 weights over 32,760 tokens, once forward, once again and once backward, are a part of it.
    assert flops > 900 * 8 * 3 * 2 * 14e9 * 32_760
