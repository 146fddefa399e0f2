"""Play: a page on which every frame's noise level can be seen, changed and run.

python -m play                                                          the embedded model, on this machine only
python -m play --model Wan-AI/Wan2.1-T2V-1.3B --lora mine.safetensors   whatever sample.py takes
python -m play --host 0.0.0.0 --port 7860                               for other machines, too
"""

import os
from dataclasses import dataclass

import sample
from support import cli


@dataclass(frozen=True)
class PlayConfig:
    model: str = cli.option("checkpoints/tiny", "folder or Hugging Face repository of a Wan text-to-video model")
    lora: tuple[str, ...] | None = cli.option(None, "LoRAs, as sample.py takes them", nargs="+", action="extend")
    size: str | None = cli.option(None, "pixels as WxH (default: the model's)")
    frames: int | None = cli.option(None, "pixel frames N = 4k+1 (default: the model's)")
    device: str | None = cli.option(None, "device (default: a GPU if there is one)")
    dtype: str = cli.option("auto", "type of the transformer", choices=("auto", "float32", "bfloat16"))
    offload: bool = cli.option(False, "keep the weights in the CPU's memory, on the device one block at a time")
    host: str | None = cli.option(None, "address to listen on (default: this machine alone; 0.0.0.0 is all)")
    port: int | None = cli.option(None, "port to listen on (default: the first free one from 7860)")
    browser: bool = cli.option(False, "open the page in a browser")


def main() -> None:
    config = cli.parse(PlayConfig, __doc__)
    try:
        import gradio
    except ImportError:
        raise ValueError("the page needs Gradio: pip install -r requirements-play.txt, or make play") from None
    from play.page import CSS, FOLDER, Page

    names = ("model", "lora", "size", "frames", "device", "dtype", "offload")
    start = sample.SampleConfig(**{name: getattr(config, name) for name in names})
    os.environ["GRADIO_TEMP_DIR"] = str(FOLDER.resolve())  # what is dropped stays, for the command that names it
    plain = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # fetches no font
    server = {"server_name": config.host, "server_port": config.port, "inbrowser": config.browser}
    Page(start).blocks.launch(**server, theme=plain, css=CSS, footer_links=[])


if __name__ == "__main__":
    cli.run(main)
