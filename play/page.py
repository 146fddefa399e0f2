"""The page: what is on it, and what happens when it is touched. What it makes is made by `runs.py`."""

import io
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from PIL import Image
from torch import Tensor

import sample
import tasks
from play.runs import FOLDER, Choices, Moment, Studio, kept, png, warnings
from support import cli, media, plots, records
from toy import world

HERE = Path(__file__).parent
# What each step shows, and what it sets: task, LoRA (1) or none (0), how far frames lag behind, and context noise.
GUIDE = {
    "1 · All frames alike": ("One noise level for the whole video: every row of the table has one colour. The base "
                             "model was trained so, and the prompt alone decides what comes.", "t2v", 1, 0.0, None),
    "2 · Clamp the first frame": ("The first frame is given: its m is 0, its column stays clean. But the base model "
                                  "never saw unequal levels, and what follows ignores the picture. (Context noise, "
                                  "which would hide them from it, is off.)", "i2v", 0, 0.0, 0.0),
    "3 · The same with the LoRA": ("Same picture, same noise. The LoRA was trained with frames at unequal levels: now "
                                   "the video goes on from the picture.", "i2v", 1, 0.0, 0.0),
    "4 · A schedule of your own": ("Frames begin one after another: see the staircase. Now change any m or d in the "
                                   "table, or drop a picture on a frame, and press Run.", "i2v", 1, 0.6, None),
}  # fmt: skip
EXAMPLE = "00009.mp4"  # the clip of the guided steps
KINDS = {  # the choices that make a caption of the toy world
    "size": world.SIZES, "colour": world.COLOURS, "shape": world.SHAPES, "direction": world.DIRECTIONS,
    "speed": world.SPEEDS, "background": world.BACKGROUNDS,
}  # fmt: skip
ROWS = ("this run", "the run before", "LoRA off, same noise")
CSS = "#strip { overflow-x: auto !important } #strip img { min-width: 640px; max-width: none }"  # scrolls on a phone
Values = dict[Any, Any]  # what each component holds


class Page:
    def __init__(self, start: sample.SampleConfig):
        self.studio, self.stopped = Studio(start), set()  # the tabs in which Stop was pressed
        self.gallery = [path.as_posix() for path in sorted(records.EXAMPLES.glob("*.mp4"))]
        with gr.Blocks(title="Every frame has its own noise level", analytics_enabled=False) as self.blocks:
            self.last = gr.State()  # the files of the run before, of this page alone
            self.things = gr.State(())  # what was drawn
            gr.Markdown("# Every frame has a noise level of its own\nSteps go down, frames across, from indigo (noise) "
                        "to cream (data). A frame that is given stays light, a free one starts dark.")  # fmt: skip
            with gr.Row():
                with gr.Column(scale=1, min_width=220):
                    self.guides = [(gr.Button(name), gr.Markdown(step[0]))[0] for name, step in GUIDE.items()]
                with gr.Column(scale=4, min_width=330):
                    self._schedule()
                    self._conditions()
                    self._settings()
                    self._results()
            self.inputs = {
                self.task, self.board, self.steps, self.shift, self.free, self.clip, self.clip_2, self.between,
                self.prompt,
                self.guidance, self.history, self.context, self.seed, *self.strengths, self.both, self.last,
            }  # fmt: skip
            self._connect()

    def _schedule(self) -> None:
        start, plan = self.studio.start, tasks.plan("t2v", self.studio.F)
        nothing = [""] * self.studio.F
        self.task = gr.Radio(list(tasks.TASKS), value="t2v", label="Task", elem_id="task")
        value = {
            "m": plan.m.tolist(), "d": plan.d.tolist(), "thumbnails": nothing, "files": nothing, "free": False,
            "taus": tasks.tau_schedule(plan.m, start.steps, start.shift).tolist(),
        }  # fmt: skip
        self.board = gr.HTML(
            value, html_template="<div class='board'></div>", css_template=(HERE / "board.css").read_text(),
            js_on_load=(HERE / "board.js").read_text(), elem_id="board", colours=plots.DATA_TO_NOISE, brush=0.5,
        )  # fmt: skip
        self.note = gr.Markdown(elem_id="note")
        with gr.Row():
            self.steps = gr.Slider(1, 50, start.steps, step=1, label="steps", min_width=160, elem_id="steps")
            self.shift = gr.Slider(0.1, 15, start.shift, label="shift", min_width=160, elem_id="shift")
            self.stagger = gr.Slider(0, 0.9, 0, step=0.1, label="stagger", min_width=160, elem_id="stagger")
        with gr.Accordion("Any table: paint it or paste it", open=False, elem_id="any"):
            self.free = gr.Checkbox(label="walk any table", elem_id="free")
            self.brush = gr.Slider(0, 1, 0.5, step=0.05, label="level that the pointer paints", elem_id="brush")
            self.pasted = gr.Textbox(label="paste: a line for each step, a number for each frame", lines=3,
                                     elem_id="pasted")  # fmt: skip

    def _conditions(self) -> None:
        example = next((clip for clip in self.gallery if clip.endswith(EXAMPLE)), "")
        with gr.Row():
            self.clip = gr.Dropdown([("no clip", ""), *self.gallery], value=example, label="clip", elem_id="clip")
            self.clip_2 = gr.Dropdown(self.gallery, label="second clip", elem_id="clip-2",
                                      value=self.gallery[1] if example else None)  # fmt: skip
            self.between = gr.Textbox(Choices.between, label="retake: from, to in seconds", elem_id="between",
                                      min_width=120)  # fmt: skip
            self.own = gr.UploadButton("a clip of your own", file_types=["video"], elem_id="own")
        self.prompt = gr.Textbox(records.caption(example) if example else "", label="prompt", elem_id="prompt")
        self.unknown = gr.Markdown(elem_id="unknown")
        knows = not self.on_prompt(" ".join(word for kind in KINDS.values() for word in kind))
        with gr.Accordion("Words it knows, and a first frame drawn by hand", open=False, visible=knows, elem_id="draw"):
            with gr.Row():
                self.words = [gr.Dropdown(list(kind), label=name, min_width=90) for name, kind in KINDS.items()]
            gr.Markdown("Press the picture to put such a shape there; it is given as the first frame.")
            self.canvas = gr.Image(canvas(()), interactive=False, height=256, width=256, buttons=[], elem_id="canvas",
                                   show_label=False)  # fmt: skip
            self.clear = gr.Button("clear", size="sm")

    def _settings(self) -> None:
        start, wide = self.studio.start, {"step": 0.1, "min_width": 160}
        with gr.Row():
            self.seed = gr.Number(start.seed, label="seed", precision=0, min_width=90, elem_id="seed")
            self.guidance = gr.Slider(0, 10, start.guidance, label="guidance", elem_id="guidance", **wide)
            self.history = gr.Slider(0, 10, start.history_guidance, label="history guidance", elem_id="history", **wide)
            self.context = gr.Slider(0, 1, start.context_noise, label="context noise", elem_id="context", step=0.05,
                                     min_width=160)  # fmt: skip
            self.strengths = [
                gr.Slider(0, 3, strength, label=f"{Path(path).stem} {expert} strength", elem_id=f"strength-{i}", **wide)
                for i, (expert, path, strength) in enumerate(self.studio.loras)
            ]
        with gr.Row():
            self.go = gr.Button("Run", variant="primary", elem_id="run")
            self.stop = gr.Button("Stop", elem_id="stop")
            self.both = gr.Checkbox(label="with the LoRA off, too", visible=bool(self.strengths), elem_id="both")

    def _results(self) -> None:
        self.status = gr.Markdown(elem_id="status")
        self.strip = gr.Image(interactive=False, visible=False, elem_id="strip", buttons=[], show_label=False)
        with gr.Row():
            self.videos = [gr.Video(label=name, autoplay=True, loop=True, buttons=[], min_width=100, height=240,
                                    visible=False, elem_id=f"video-{i}") for i, name in enumerate(ROWS)]  # fmt: skip
        self.line = gr.Textbox(label="the same video by command", buttons=["copy"], interactive=False, elem_id="line")
        with gr.Accordion("the JSON of this run", open=False, elem_id="open-json"):
            self.json = gr.Code(language="json", elem_id="json", interactive=False)

    def _connect(self) -> None:
        quiet = {"show_progress": "hidden", "concurrency_limit": None}
        typed = quiet | {"trigger_mode": "always_last"}  # what comes while another is answered is not lost
        shown, preset = [self.board, self.note], [self.task, self.stagger, self.free, self.board, self.note]
        for chosen in (self.task, self.clip, self.clip_2):
            chosen.input(self.on_task, self.inputs, preset, **typed)
        self.between.change(self.on_between, self.inputs, preset, **typed)
        self.board.input(self.on_board, self.inputs, preset, **typed)
        for changed in (self.steps, self.shift, self.free):
            changed.input(self.on_change, self.inputs, shown, **typed)
        self.stagger.input(self.on_stagger, self.inputs | {self.stagger}, shown, **typed)
        self.brush.input(lambda brush: gr.HTML(brush=brush), self.brush, self.board, **typed)
        self.pasted.change(self.on_paste, self.inputs | {self.pasted}, [self.free, *shown], **typed)
        self.clip.input(lambda clip: records.caption(clip) if clip else gr.skip(), self.clip, self.prompt, **quiet)
        self.own.upload(self.on_clip, self.own, [self.clip, self.note], **quiet)
        self.prompt.change(self.on_prompt, self.prompt, self.unknown, **typed)
        drawing_board = self.inputs | {self.things, *self.words}
        drawn = [self.things, self.canvas, self.prompt, *preset]
        for word in self.words:
            word.input(lambda things, *words: gr.skip() if things else world.Scene(words[5], (thing(words),)).caption,
                       [self.things, *self.words], self.prompt, **quiet)  # fmt: skip
        self.canvas.select(self.on_draw, drawing_board, drawn, **typed)
        self.clear.click(self.on_clear, drawing_board, drawn, **quiet)
        results = [self.status, self.strip, *self.videos, self.line, self.json, self.last]
        self.go.click(self.on_run, self.inputs, results, **quiet)
        for button, step in zip(self.guides, GUIDE.values(), strict=True):
            guided = button.click(lambda values, step=step: self.on_guide(values, *step[1:]), self.inputs,
                                  [*preset, *self.strengths, self.context], **quiet)  # fmt: skip
            guided.then(self.on_run, self.inputs, results, **quiet)
        for button in (self.go, *self.guides):  # on a small screen the results are far below
            button.click(None, js="() => setTimeout(() => document.querySelector('#run').scrollIntoView(), 300)")
        self.stop.click(self.on_stop, None, None, **quiet)

    def _choices(self, values: Values) -> Choices:
        """What the page holds. ValueError for what is no choice."""
        board = values[self.board]
        return Choices(
            task=values[self.task], prompt=values[self.prompt],
            clips=(own(values[self.clip]), own(values[self.clip_2])),
            pictures={i: own(path) for i, path in enumerate(board["files"]) if path},
            m=tuple(board["m"]), d=tuple(board["d"]), steps=int(values[self.steps]), shift=float(values[self.shift]),
            guidance=float(values[self.guidance]), history=float(values[self.history]),
            context=float(values[self.context]),
            seed=int(values[self.seed] or 0),
            strengths=tuple(float(values[slider]) for slider in self.strengths), between=values[self.between],
            painted=torch.tensor(board["taus"]) if values[self.free] else None,
        )  # fmt: skip

    def _as_usual(self, choices: Choices) -> Choices:
        """The same with the table of its task."""
        plan = self.studio.plan(choices)
        return replace(choices, m=tuple(plan.m.tolist()), d=tuple(plan.d.tolist()), painted=None)

    def _shown(self, make: Callable[[], Choices], said: str = "") -> tuple[Any, str, Choices | None]:
        """The board of what is chosen, and what there is to say; a mistake is said, and the board stays."""
        try:
            choices = make()
            taus, thumbnails = choices.table, {}
            try:
                thumbnails = self.studio.thumbnails(choices)
            except ValueError as error:
                said = said or str(error)
            frames = range(self.studio.F)
            board = {
                "m": choices.m, "d": choices.d, "taus": taus.tolist(), "free": choices.painted is not None,
                "thumbnails": [thumbnails.get(i, "") for i in frames],
                "files": [choices.pictures.get(i, "") for i in frames],
            }  # fmt: skip
            return board, "  \n".join([said, *warnings(taus, thumbnails)]), choices
        except ValueError as error:
            return gr.skip(), str(error), None

    def _preset(self, make: Callable[[], Choices], said: str = "") -> tuple:
        """Task, stagger, whether any table may be walked, board and note."""
        board, note, choices = self._shown(make, said)
        if choices is None:
            return gr.skip(), gr.skip(), gr.skip(), board, note
        n = choices.m.count(1)  # how many frames lag behind each other
        stagger = round(max(choices.d) * n / max(1, n - 1), 2)
        return choices.task, stagger, choices.painted is not None, board, note

    def on_task(self, values: Values) -> tuple:
        # Not the task: by now another may be chosen.
        return gr.skip(), *self._preset(lambda: self._as_usual(self._choices(values)))[1:]

    def on_between(self, values: Values) -> tuple:
        return self.on_task(values) if values[self.task] == "retake" else (gr.skip(),) * 5

    def on_board(self, values: Values) -> tuple:
        """A number was typed, a level painted, or a picture dropped, which may make it another task."""
        board, said = values[self.board], ""
        if not board.get("dropped"):
            return (gr.skip(), gr.skip(), gr.skip(), *self._shown(lambda: self._choices(values))[:2])
        for i, path in enumerate(board["files"]):
            try:
                path and media.read_image(own(path))
            except ValueError as error:
                board["files"][i], said = "", str(error)
        return self._preset(lambda: self._as_usual(self._for_pictures(self._choices(values))), said)

    def _for_pictures(self, choices: Choices) -> Choices:
        """A task that has a place for every picture: the chosen one, or else the simplest."""
        if choices.pictures.keys() <= set(self.studio.pictured(choices.task, choices.pictures)):
            return choices
        simple = {(0,): "i2v", (0, self.studio.F - 1): "start-end"}
        return replace(choices, task=simple.get(tuple(sorted(choices.pictures)), "keyframes"))

    def on_change(self, values: Values) -> tuple:
        return self._shown(lambda: self._choices(values))[:2]

    def on_stagger(self, values: Values) -> tuple:
        return self._shown(lambda: self._lagging(self._choices(values), values[self.stagger]))[:2]

    def _lagging(self, choices: Choices, stagger: float) -> Choices:
        """The same, with each free frame later than the one before, as in a stream."""
        free = [i for i, m in enumerate(choices.m) if m == 1]
        lag = dict(zip(free, tasks.plan("stream", len(free) or 1, stagger=stagger).d.tolist(), strict=False))
        return replace(choices, d=tuple(lag.get(i, 0.0) for i in range(self.studio.F)), painted=None)

    def on_paste(self, values: Values) -> tuple:
        def read() -> Choices:
            return replace(self._choices(values), painted=records.read_table(values[self.pasted], self.studio.F))

        board, note, choices = self._shown(read)
        return gr.skip() if choices is None else True, board, note

    def on_clip(self, path: str) -> tuple:
        try:
            media.probe(path, self.studio.start.fps)
            return gr.Dropdown([("no clip", ""), *self.gallery, own(path)], value=own(path)), ""
        except ValueError as error:
            return gr.skip(), str(error)

    def on_prompt(self, prompt: str) -> str:
        unknown = self.studio.opened.tokenizer().unknown([prompt])
        return f"Words that this model does not know: {', '.join(unknown)}." if unknown else ""

    def on_draw(self, values: Values, event: gr.SelectData) -> tuple:
        new = thing([values[word] for word in self.words], *(index / 4 for index in event.index))
        others = [other for other in values[self.things] if other.colour != new.colour]
        return self._drawn(values, tuple(sorted([*others[-1:], new], key=lambda one: one.x)))  # it knows two at most

    def on_clear(self, values: Values) -> tuple:
        return self._drawn(values, ())

    def _drawn(self, values: Values, things: tuple[world.Thing, ...]) -> tuple:
        scene = world.Scene(values[self.words[5]], things)
        values[self.board]["files"][0] = kept(png(world.render(scene, 1)[:, 0]), ".png") if things else ""
        shown = self._preset(lambda: self._as_usual(self._for_pictures(self._choices(values))))
        return things, canvas(things, scene.background), scene.caption if things else gr.skip(), *shown

    def on_guide(self, values: Values, task: str, strength: float, stagger: float, context: float | None) -> tuple:
        """Set what a guided step shows; a picture that lies on the first frame stays."""

        def guided() -> Choices:
            choices = self._choices(values)
            pictures = {i: path for i, path in choices.pictures.items() if i == 0}
            return self._lagging(self._as_usual(replace(choices, task=task, pictures=pictures)), stagger)

        strengths = (strength * usual for _, _, usual in self.studio.loras)
        return *self._preset(guided), *strengths, self.studio.start.context_noise if context is None else context

    def on_stop(self, request: gr.Request) -> None:
        self.stopped.add(request.session_hash)

    def on_run(self, values: Values, request: gr.Request) -> Iterator[Values]:
        """Make the video, and without the LoRA another; show every step, and at the end how to make them again."""
        self.stopped.discard(request.session_hash)
        try:
            config, last = self.studio.settings(self._choices(values)), values[self.last]
            off = [replace(config, lora=(), no_lora=True)] if values[self.both] and config.lora else []
            rows = {1: (media.read_video(last["video"]), last["given"])} if last else {}  # of the filmstrip
            yield {self.line: self.studio.command(config), self.videos[0]: gr.Video(visible=False),
                   self.videos[1]: gr.Video(last and last["video"], visible=bool(last)),
                   self.videos[2]: gr.Video(visible=False)}  # fmt: skip
            with closing(self.studio.run(config, *off)) as moments:
                row = 0
                for moment in moments:
                    if request.session_hash in self.stopped:
                        yield {self.status: "Stopped."}
                        return
                    yield {self.status: moment.words}
                    if moment.video is not None:
                        rows[row] = moment.video, moment.given
                        yield {self.strip: gr.Image(_filmstrip(rows), visible=True)}
                    if moment.files:
                        yield self._finished(row, moment)
                        row = 2
        except (ValueError, OSError, RuntimeError, MemoryError) as error:
            yield {self.status: f"**{' '.join(str(error).split())}**"}

    def _finished(self, row: int, moment: Moment) -> Values:
        """Show the video of a run that is done; the first one is the one to repeat, and the next run's last."""
        video, settings = (moment.files[name].as_posix() for name in ("video", "settings"))
        shown = {self.videos[row]: gr.Video(video, visible=True)}
        if row == 0:
            record = Path(settings).read_text(encoding="utf-8")
            shown |= {self.last: {"video": video, "given": moment.given}, self.json: gr.Code(record, label=settings)}
        return shown


def _filmstrip(rows: dict[int, tuple[Tensor, list[bool]]]) -> Image.Image:
    """A contact sheet of the runs there are, in the order of `ROWS`, each a video and which frames of it were given."""
    order = sorted(rows)
    return media.filmstrip([(ROWS[i], rows[i][0]) for i in order], [rows[i][1] for i in order])


def own(path: str | None) -> str:
    """The way from here to a file of the gallery or of the page, which must not reach for others; "" for none."""
    path = path or ""
    allowed = any(Path(path).resolve().is_relative_to(folder.resolve()) for folder in (FOLDER, records.EXAMPLES))
    cli.expect(not path or allowed, f"{path}", "a file that was given to this page")
    return Path(os.path.relpath(path)).as_posix() if path else ""


def thing(words: list[str], x: float = world.SIDE / 2, y: float = world.SIDE / 2) -> world.Thing:
    """A shape of the toy world with its centre there, as far as the walls allow."""
    size, colour, shape, direction, speed = words[:5]
    reach = 1.25 * world.SIZES[size]
    place = (min(max(at, reach), world.SIDE - reach) for at in (x, y))
    return world.Thing(shape, colour, size, speed, direction, *place)


def canvas(things: tuple[world.Thing, ...], background: str = "black") -> Image.Image:
    """What was drawn, four times as large."""
    picture = Image.open(io.BytesIO(png(world.render(world.Scene(background, things), 1)[:, 0])))
    return picture.resize((4 * world.SIDE, 4 * world.SIDE), Image.Resampling.NEAREST)
