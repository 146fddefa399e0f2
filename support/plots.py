"""Tables of noise levels, as text and as pictures."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from support import cli


def tau_table(path: Path | str, taus: Tensor, given: Sequence[tuple[str, Sequence[int]]] = (), title: str = "") -> None:
    """Write τ (K+1,F) as a PNG heat map, steps down and frames across; given: (what, its latent frames) of each
    condition, marked under its frames.
    """
    with cli.replacing(path) as temporary:
        _draw(taus, given, title).save(temporary)


def _draw(taus: Tensor, given: Sequence[tuple[str, Sequence[int]]] = (), title: str = "") -> Image.Image:
    """τ (K+1,F) as a heat map, steps down and frames across, with the conditions marked under their frames."""
    K1, F = taus.shape
    width, height = max(18, min(60, 900 // F)), max(8, min(30, 480 // K1))
    left, top, right, bottom = 64, 62, 110, 76
    small, large = ImageFont.load_default(13), ImageFont.load_default(20)
    across = left + max(F * width + right, round(large.getlength(title)) + 16)
    image = Image.new("RGB", (across, top + K1 * height + bottom), "white")
    draw = ImageDraw.Draw(image)
    x = [left + i * width for i in range(F + 1)]
    y = [top + k * height for k in range(K1 + 1)]

    def write(position: tuple[float, float], text: str, anchor: str, colour: str = "#555555", font=small) -> None:
        draw.text(position, text, colour, font, anchor)

    write((left, 14), title, "la", "#222222", large)
    write((left, top - 6), "noise level of each latent frame, step by step", "ld")
    for k, row in enumerate(taus.tolist()):
        for i, tau in enumerate(row):
            draw.rectangle((x[i], y[k], x[i + 1] - 2, y[k + 1] - 2), _colour(tau))
            if width >= 36 and height >= 16:
                middle = ((x[i] + x[i + 1]) / 2 - 1, (y[k] + y[k + 1]) / 2 - 1)
                write(middle, f"{tau:.2f}" if tau else "0", "mm", "white" if tau > 0.4 else "#333333")
    stride = -(-16 // height)  # labels where there is room for them
    for k in range(0, K1, stride):
        write((left - 8, (y[k] + y[k + 1]) / 2 - 1), str(k), "rm")
    for i in range(0, F, 1 if width >= 20 else 2):
        write(((x[i] + x[i + 1]) / 2 - 1, y[-1] + 6), str(i), "ma")
    write((8, y[0] + height / 2), "step", "lm")
    write((8, y[-1] + 6), "frame", "la")
    write((8, y[-1] + 30), "given" if given else "", "la")
    for source, positions in given:
        first, last = x[positions[0]], x[positions[-1] + 1] - 2
        draw.rectangle((first, y[-1] + 27, last, y[-1] + 47), "#1b998b")
        if last - first >= 34:
            write(((first + last) / 2, y[-1] + 37), source, "mm", "white")
    for row in range(y[0], y[-1] - 1):  # the colour bar, 1 on top
        draw.line((x[-1] + 24, row, x[-1] + 40, row), _colour(1 - (row - y[0]) / (y[-1] - 2 - y[0])))
    write((x[-1] + 48, y[0]), "1 noise", "la")
    write((x[-1] + 48, y[-1] - 2), "0 data", "ld")
    return image


def _colour(tau: float) -> tuple[int, ...]:
    """From cream (data) through coral to indigo (noise)."""
    cream, coral, indigo = (255, 244, 222), (232, 106, 92), (44, 30, 84)
    low, high, share = (cream, coral, 2 * tau) if tau < 0.5 else (coral, indigo, 2 * tau - 1)
    return tuple(round(a + (b - a) * share) for a, b in zip(low, high, strict=True))


def table(taus: Tensor) -> str:
    """τ (K+1,F) as text, steps down and frames across; a frame that is exactly clean shows a bare 0."""
    rows = [f"{k:>4} |" + "".join(f"{t:5.2f}" if t else "    0" for t in row) for k, row in enumerate(taus.tolist())]
    return "\n".join(["step |" + "".join(f"{i:>5}" for i in range(taus.shape[1])), *rows])
