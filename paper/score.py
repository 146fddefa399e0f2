"""VBench-I2V's score: nine dimensions, each brought to [0, 1], and their weighted means.

The total is the mean of two scores: of the video's quality, and of how well it follows its image. All constants are
those of `scripts/constant.py` in https://github.com/Vchitect/VBench, used as in its `scripts/cal_i2v_final_score.py`,
except that a missing dimension does not count as 0: no mean that needs it is given.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

from torch import Tensor

from support import cli

Score = TypeVar("Score", float, Tensor)


class Dimension(NamedTuple):
    column: str  # in the paper's table
    weight: float
    low: float  # the score that becomes 0
    high: float  # the score that becomes 1


QUALITY = {
    "subject_consistency": Dimension("SC", 1, 0.1462, 1),
    "background_consistency": Dimension("BC", 1, 0.2615, 1),
    "motion_smoothness": Dimension("MS", 1, 0.7060, 0.9975),
    "dynamic_degree": Dimension("DD", 0.5, 0, 1),
    "aesthetic_quality": Dimension("AQ", 1, 0, 1),
    "imaging_quality": Dimension("IQ", 1, 0, 1),
}
I2V = {
    "i2v_subject": Dimension("I2V-S", 1, 0.1462, 1),
    "i2v_background": Dimension("I2V-B", 1, 0.2615, 1),
    "camera_motion": Dimension("CM", 0.1, 0, 1),
}
DIMENSIONS = QUALITY | I2V
MEANS = ("total", "I2V", "quality")
# Table 1 of arXiv 2507.16116, in percent: the means, then the dimensions in the order above.
PAPER = {
    "Wan-I2V, paper": (86.86, 92.90, 80.82, 94.86, 97.07, 97.90, 51.38, 64.75, 70.44, 96.95, 96.44, 34.76),
    "Pusa, paper": (87.32, 94.84, 79.80, 92.27, 96.02, 98.49, 52.60, 63.15, 68.27, 97.64, 99.24, 29.46),
}


def means(scores: Mapping[str, float]) -> tuple[float, float, float]:
    """Total, I2V and quality score in [0, 1] of raw scores in [0, 1] by dimension; nan where a dimension is missing."""
    i2v, quality = mean(scores, I2V), mean(scores, QUALITY)
    return (i2v + quality) / 2, i2v, quality


def mean(scores: Mapping[str, Score], dimensions: Mapping[str, Dimension]) -> Score:
    """The weighted mean of dimensions, each brought to [0, 1]; of numbers, or of tensors alike."""
    shares = [d.weight * (scores.get(name, math.nan) - d.low) / (d.high - d.low) for name, d in dimensions.items()]
    return sum(shares) / sum(d.weight for d in dimensions.values())


def read(paths: Iterable[str]) -> dict[str, float]:
    """The raw score of each dimension in files that VBench wrote, {dimension: [score, scores of the videos], ...}.

    ValueError for other files, for a score outside [0, 1], and for a dimension that two files have.
    """
    scores: dict[str, float] = {}
    for path in paths:
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            found = {name: values[0] for name, values in content.items() if name in DIMENSIONS}
        except (OSError, ValueError, TypeError, AttributeError, LookupError) as error:
            raise ValueError(f"got {path} ({error!r}), expected an _eval_results.json of VBench") from None
        cli.expect(found, f"{path} without a dimension of VBench-I2V", f"some of {', '.join(DIMENSIONS)}")
        for name, score in found.items():
            right = cli.fits(score, float) and 0 <= score <= 1
            cli.expect(right, f"{name} {score} in {path}", "a score in [0, 1]")
            cli.expect(name not in scores, f"{name} again in {path}", "one score of each dimension; choose among them")
        scores |= found
    return scores


def table(scores: Mapping[str, float]) -> str:
    """The paper's table in Markdown, in percent, with a row for these raw scores; "-" where a dimension is missing."""
    ours = (*means(scores), *(scores.get(name, math.nan) for name in DIMENSIONS))
    rows = PAPER | {"ours": tuple(100 * score for score in ours)}
    head = ["", *MEANS, *(dimension.column for dimension in DIMENSIONS.values())]
    cells = [[name, *("-" if math.isnan(v) else f"{v:.2f}" for v in row)] for name, row in rows.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *cells])
