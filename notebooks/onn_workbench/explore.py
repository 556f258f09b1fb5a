"""The widgets of the interactive notebook: choose, predict, run and watch."""

import asyncio
import base64
import contextlib
import html
import re
import shutil
import signal
import statistics
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ipywidgets as w

from onn_core import data
from onn_core.adapters.lora import select_layers
from onn_core.config import TrainConfig, parse_bytes
from onn_core.errors import ConfigError, OnnError
from onn_core.memory.process import memory_bytes
from onn_core.record import RunRecord, describe_environment
from onn_core.weights.reader import host_memory_bytes
from onn_workbench import live, panels, runs
from onn_workbench.background import ENDED, BackgroundRun
from onn_workbench.figure import Figure
from onn_workbench.outline import Outline
from onn_workbench.tables import two_digits

FIELDS = (  # setting, label, tooltip
    ("data", "Data", "chatterbot, or the path of a file or a folder"),
    ("lora_rank", "LoRA rank", "r of the adapter"),
    ("batch_size", "Batch size", "Samples of an optimizer step"),
    ("max_length", "Tokens, at most", "Longer samples are cut"),
    ("max_steps", "Steps", "Optimizer steps"),
    ("eval_every", "Evaluate every", "Steps between evaluations; 0 is never"),
    ("learning_rate", "Learning rate", "Of AdamW; falls linearly to 0"),
    ("memory_budget", "Memory budget", "Such as 4GB; empty holds one layer"),
)
BUTTONS = (  # method, text, icon
    ("start", "Start", "play"),
    ("pause", "Pause", "pause"),
    ("stop", "Stop", "stop"),
    ("save", "Save adapter", "save"),
)
PICKS = (("all", "all"), ("none", ""), ("ends", "ends:4"), ("last", "last:8"))  # of layers
WIDE = {"style": {"description_width": "110px"}, "layout": {"width": "340px"}}
COLOURS = {"ready": "#555", "running": "#00568a", "finished": "#1b7837", "failed": "#b00020"}
INTERRUPT_S = 0.5  # until the handler of an interrupt is looked at again
# ipywidgets says by a class alone that a toggle is pressed; an image that cannot load runs this.
ARIA = """<img alt="" style="display:none" src="data:," onerror="
const press = () => document.querySelectorAll('.onn-layers .jupyter-button').forEach(b => {
  const on = String(b.classList.contains('mod-active'));
  if (b.getAttribute('aria-pressed') !== on) b.setAttribute('aria-pressed', on); });
new MutationObserver(press).observe(document.body,
  {subtree: true, childList: true, attributes: true, attributeFilter: ['class']}); press();">"""


class Explorer:
    """Widgets that choose a run, predict it, run it in a thread and show it live.

    models: name -> folder. settings: those of TrainConfig that the widgets begin with, with
    `output_dir`, in which every run gets a folder of its own. records: where past runs are. A run
    of this process that goes on in `output_dir` is watched from here.
    """

    def __init__(self, models: dict[str, str], records: Sequence[str] = (), **settings: Any):
        self.settings = {"progress": False, "eval_every": 1, "eval_samples": 8} | settings
        self.records = [str(settings["output_dir"]), *records]
        self.run = self._before = BackgroundRun.going_under(settings["output_dir"])
        self.adopted = self.run is not None
        self.past: dict[str, runs.PastRun] = {}
        self.drawn: Figure | None = None
        self._outlines: dict[str, Outline] = {}
        self._quiet, self._draw_after, self._drawing = False, 0.0, threading.Lock()
        try:
            self._loop = asyncio.get_running_loop()  # of the kernel
        except RuntimeError:  # a script, whose interrupt ends it
            self._loop = None
        self.models = dict(models)
        self.model = self._field("Combobox", "Model", "A name, or a folder", options=tuple(models))
        self.fields = {}
        for name, text, tip in FIELDS:
            self.fields[name] = self._field("Text", text, tip)
            value = self.settings.get(name, TrainConfig.__dataclass_fields__[name].default)
            self.fields[name].value = "" if value is None else str(value)
        choices = ("all", "ends:4", "last:8")
        self.layers = self._field("Combobox", "Trained layers", "Or click them", options=choices)
        self.picture = w.GridBox(layout={"grid_template_columns": "repeat(auto-fill, 42px)"})
        self.picture.layout.width = "690px"
        self.picture.add_class("onn-layers")
        picks = [w.Button(description=name, layout={"width": "60px"}) for name, _ in PICKS]
        for button, (name, value) in zip(picks, PICKS, strict=True):
            button.tooltip = f"Adapters in {value or name}"
            button.on_click(lambda _, value=value: setattr(self.layers, "value", value))
        self.badge, self.prediction, self.status, self.figure = (w.HTML() for _ in range(4))
        self.buttons = {}
        for name, text, icon in BUTTONS:
            self.buttons[name] = w.Button(description=text, icon=icon, layout={"width": "130px"})
            self.buttons[name].on_click(
                lambda _, name=name: panels.guarded(getattr(self, name), self.status)
            )
        self.buttons["start"].button_style = "primary"
        self.save_to = self._field("Text", "Save to", "Folder of the saved adapter")
        self.save_to.value = str(Path(settings["output_dir"]) / "adapter")
        self.data, self.runs = panels.Data(self), panels.Runs(self)
        self.ask, self.tokens = panels.Ask(self), panels.Tokens(self)
        self.export, self.sweep = panels.Export(self), panels.Sweep(self)
        self.panels = (self.data, self.runs, self.ask, self.tokens, self.export, self.sweep)
        tabs = w.Tab([panel.view for panel in self.panels])
        tabs.titles = [panel.title for panel in self.panels]
        fields = w.GridBox(
            [self.model, *self.fields.values(), self.layers],
            layout={"grid_template_columns": "350px 350px"},
        )
        act = w.HBox([*self.buttons.values(), self.badge], layout={"flex_flow": "row wrap"})
        picks = w.HBox([w.Label("Layers, embedding to head"), *picks, w.HTML(ARIA)])
        parts = [fields, picks, self.picture, self.prediction, act, self.status, self.figure]
        self.view = w.VBox([*parts, self.save_to, tabs])
        for widget in (self.model, *self.fields.values(), self.layers):
            widget.observe(lambda _: self._predict(), "value")
        self._quiet = True
        self.layers.value = str(settings.get("sparse_layers", "all"))
        self._quiet = False
        self.model.value = next(iter(models))
        self.refresh()
        if self.run is not None:
            self.run.on_change = self._changed
            self.draw()
        self._show_state()

    @staticmethod
    def _field(kind: str, text: str, tip: str, **rest: Any) -> w.Widget:
        """An input that tells its value when it is left, not at each key."""
        made = getattr(w, kind)(description=text, tooltip=tip, **rest | WIDE)
        made.continuous_update = False
        return made

    # --- what is chosen ---------------------------------------------------------------------

    @property
    def config(self) -> TrainConfig:
        """The settings that are chosen; OnnError if one is not possible."""
        chosen: dict[str, Any] = {name: field.value.strip() for name, field in self.fields.items()}
        for name, text in chosen.items():
            kind = float if name == "learning_rate" else int
            if name not in ("data", "memory_budget"):
                with contextlib.suppress(ValueError):  # TrainConfig says what is expected
                    chosen[name] = kind(text)
        if re.fullmatch(r"[\d.]+", chosen["memory_budget"]):
            raise ConfigError(
                f"memory_budget {chosen['memory_budget']} has no unit: write 4GB, or 500M."
            )
        chosen["memory_budget"] = chosen["memory_budget"] or None
        layers = self.layers.value.strip()
        numbers = re.fullmatch(r"\d*(\s*,\s*\d+)*", layers)
        chosen["sparse_layers"] = (
            [int(n) for n in re.findall(r"\d+", layers)] if numbers else layers
        )
        chosen["model_dir"] = self.models.get(self.model.value, self.model.value)
        return TrainConfig(**self.settings | chosen)

    @property
    def outline(self) -> Outline:
        """Of the chosen model; opened and timed once."""
        folder = self.config.model_dir
        if folder not in self._outlines:
            self._outlines[folder] = Outline(folder)
        return self._outlines[folder]

    @staticmethod
    def require_data(config: TrainConfig) -> None:
        """OnnError unless the first row of the data can be read."""
        if config.data != "chatterbot" and not Path(config.data).expanduser().exists():
            raise ConfigError(
                f"data {Path(config.data).expanduser().absolute()} is not there: give the path of "
                "a file or a folder, or chatterbot."
            )
        next(iter(data.read_rows(config.data)), None)

    def _predict(self) -> None:
        """Show what the choice means, on the picture of the model and in figures; or why not."""
        if self._quiet:
            return
        if "alert" in self.status.value:  # of a start that could not be
            self._show_state()
        try:
            self._draw_picture(self.outline, self.config)
            alive = self.run is not None and self.run.alive  # it would disturb what is measured
            config = self.config
            self.require_data(config)
            self.predicted = found = self.outline.predict(config, measured=not alive)
            self.trained_layers = select_layers(config.sparse_layers, self.outline.n_layers)
            self.prediction.value = self._describe(self.outline, config, found)
            self.export.describe(config)
        except (OnnError, OSError) as error:
            self.prediction.value = panels.alert(str(error))

    def _describe(self, outline: Outline, config: TrainConfig, found: dict[str, Any]) -> str:
        sure = found["measured"]
        run_s = config.max_steps * found["step_s"] + found["eval_s"]
        how = "from a visit of a real layer" if sure else "at least: not measured during a run"
        return (
            f"<b>{html.escape(outline.title)}</b>. Trainable: <b>{found['trainable']:,}</b>. "
            f"About <b>{two_digits(found['step_s'])} s</b> a step of full-length samples ({how}; "
            f"limited by {found['limited_by']}), <b>{duration(run_s)}</b> in all."
            + memory_bar(found["peak_bytes"], config.memory_budget)
        )

    def _draw_picture(self, outline: Outline, config: TrainConfig) -> None:
        """The layers, each a button that adds or removes its adapter."""
        if len(self.picture.children) != outline.n_layers:
            layout = {"width": "38px", "height": "32px", "margin": "1px", "padding": "0"}
            toggles = []
            for number in range(outline.n_layers):
                toggles.append(w.ToggleButton(description=str(number), layout=layout))
                toggles[-1].tooltip = f"Layer {number}: trained or not"
                toggles[-1].observe(self._clicked, "value")
            self.picture.children = toggles
        chosen = config.sparse_layers
        trained = set(select_layers(chosen, outline.n_layers) if chosen else ())
        self._quiet = True
        for number, toggle in enumerate(self.picture.children):
            toggle.value = number in trained
            toggle.button_style = "info" if toggle.value else ""
        self._quiet = False

    def _clicked(self, change: Any) -> None:
        if self._quiet:
            return
        self.layers.value = ", ".join(t.description for t in self.picture.children if t.value)

    def limit_s(self, record: RunRecord) -> float | None:
        """Seconds of a step that this machine cannot go below; None for runs of another."""
        for folder, outline in self._outlines.items():
            same = record.environment.get("processor") == describe_environment()["processor"]
            if same and record.model.get("name") == Path(folder).name and record.steps:
                step = record.steps[-1]
                trained = record.model["trained_layers"]
                return outline.limit_s(trained, step.bytes_read, step.tokens)
        return None

    def _say(self, text: str) -> None:
        self.status.value = f'<div role="status">{html.escape(text)}</div>'

    # --- the run ----------------------------------------------------------------------------

    def new_folder(self) -> Path:
        """The next numbered folder of a run; it is not made yet."""
        root = Path(self.settings["output_dir"])
        numbers = [int(path.name) for path in root.glob("[0-9]*") if path.name.isdigit()]
        return root / f"{1 + max([0, *numbers])}"

    def start(self) -> None:
        """Begin a run in its own folder; returns at once."""
        settings = self.config.to_dict() | {"output_dir": str(self.new_folder())}
        self.begin([TrainConfig(**settings)])

    def begin(self, configs: Sequence[TrainConfig], resume: bool = False) -> None:
        """Begin a run, or several in one pass; OnnError if one goes on, or cannot be run."""
        if self.run is not None and self.run.alive:
            raise OnnError("a run goes on: stop it first.")
        if not resume:
            for config in configs:
                self.require_data(config)
                self.outline.predict(config)
            for config in configs:
                runs.save_settings(config)
        self._before, self.adopted = self.run, False
        self.run = BackgroundRun(configs, self._changed, resume)
        self.run.start()
        self._stop_on_interrupt()

    def go_on_with(self, past: runs.PastRun) -> None:
        """Continue a stopped run from its newest checkpoint."""
        panels.guarded(lambda: self.begin([past.config()], resume=True), self.status)

    def first_run(self) -> Figure | None:
        """A run from start to end, or what there is of one that goes on; its figure."""
        if not self.adopted:
            self.start()
            self.wait()
        while self.drawn is None and self.run.alive:  # one that goes on has a step soon
            time.sleep(0.1)
        return self.drawn

    def begun(self) -> BackgroundRun:
        """The present run, which has a model and a record; OnnError if it is none, or several."""
        if self.run is not None and len(self.run.configs) > 1:
            raise OnnError("these are several runs: once they have ended, choose one of them.")
        if self.run is None or self.run.record is None:
            raise OnnError("no run has begun here: start one, or choose a past one.")
        return self.run

    def pause(self) -> None:
        """Stand still after the current step, or go on."""
        if self.run is not None:
            self.run.go_on() if self.run.state in ("pausing", "paused") else self.run.pause()

    def stop(self) -> None:
        """End the run at the next layer; its adapter and record are saved."""
        if self.run is not None:
            self.run.stop()

    def save(self) -> None:
        """Save the adapter, between two steps."""
        if self.run is not None:
            folder = Path(self.save_to.value).resolve()
            done = self.run.save_adapter(folder)
            self._say(f"adapter saved to {folder}" if done else "saved after this step")

    @property
    def files(self) -> list[str]:
        """What the last run left in its folder."""
        folder = Path(self.run.config.output_dir)
        return sorted(path.name for path in folder.iterdir() if path.name[0] != ".")

    def wait(self) -> None:
        """Until the run has ended; an interrupt stops the run, and a sentence says so."""
        if self.run is not None:
            try:
                self.run.wait()
            except KeyboardInterrupt:
                print("The run was interrupted; what its last whole step left is saved.")

    def _stop_on_interrupt(self) -> None:
        """While no cell runs, an interrupt of the kernel stops the run.

        ipykernel has a handler of its own while a cell runs and sets the old one back after it.
        """
        run, loop = self.run, self._loop

        def look() -> None:
            if not run.alive:
                return
            if signal.getsignal(signal.SIGINT) not in (signal.default_int_handler, stop):
                signal.signal(signal.SIGINT, stop)
            loop.call_later(INTERRUPT_S, look)

        def stop(number: int, frame: Any) -> None:
            run.stop()

        if loop is not None:  # a sweep begins in another thread than the loop's
            loop.call_soon_threadsafe(loop.call_later, INTERRUPT_S, look)

    def _changed(self, run: BackgroundRun) -> None:
        """After a step or a change of state, in the run's thread."""
        if run.state == "failed" and run.record is None:
            self._forget(run)
        self._show_state(run)
        if run.state != "running" or time.perf_counter() >= self._draw_after:
            started = time.perf_counter()
            self.draw()
            self._draw_after = 6 * time.perf_counter() - 5 * started  # a sixth of the time at most
        if run.state in ENDED:
            self.refresh()

    def _forget(self, run: BackgroundRun) -> None:
        """A run that did not begin: its folder goes, and the run before is the present one."""
        self.run = self._before
        for config in run.configs:
            folder = Path(config.output_dir)
            if not run.resume and {x.name for x in folder.glob("*")} <= {runs.SETTINGS}:
                shutil.rmtree(folder, ignore_errors=True)
                if folder.parent != Path(self.settings["output_dir"]):  # of a sweep
                    with contextlib.suppress(OSError):  # another run of it is there
                        folder.parent.rmdir()

    def _show_state(self, of: BackgroundRun | None = None) -> None:
        """The state in the badge, the buttons that fit it, and how far the run is."""
        run = of or self.run
        record, state = run and run.record, run.state if run else "ready"
        colour = COLOURS.get(state, "#8a5a00")
        style = f"background:{colour};color:white;border-radius:10px;padding:3px 12px;margin:6px"
        self.badge.value = f'<span style="{style}">{state}</span>'
        alive, waits = state not in ("ready", *ENDED), state in ("pausing", "paused")
        self.buttons["start"].disabled = alive
        for name in ("pause", "stop"):
            self.buttons[name].disabled = not alive or state == "stopping"
        kept = self.run
        self.buttons["save"].disabled = not (kept and kept.trainer and kept.record)
        self.buttons["pause"].description = "Go on" if waits else "Pause"
        self.buttons["pause"].icon = "play" if waits else "pause"
        if state == "failed":
            self.status.value = panels.alert(run.error)
        elif record is None or not record.steps:
            self._say("opening the model and the text" if alive else state)
        else:
            self._say(self._progress(run, record))
            self.status.value += panels.alert(run.error) if run.error else ""

    @staticmethod
    def _progress(run: BackgroundRun, record: RunRecord) -> str:
        last, n_runs = record.steps[-1], len(run.configs)
        step_s = statistics.median(step.step_s for step in record.steps[-9:])
        n_left = (record.config["max_steps"] or last.step) - last.step
        before = f"{n_runs} runs, the first: " if n_runs > 1 else ""
        text = (
            f"{run.state}: {before}step {last.step} of {last.step + n_left}, loss {last.loss:.3f}, "
            f"{two_digits(last.step_s)} s a step, "
            f"{record.peak_memory_bytes / 2**20:,.0f} MiB at most, "
            f"{last.bytes_read / last.step_s / 1e9:.2g} GB/s, "
            f"{100 * last.wait_s / last.step_s:.0f} % of the time waiting"
        )
        if run.state not in ENDED:
            text += f", {memory_bytes() / 2**20:,.0f} MiB of the process now"
            text += f", about {duration(n_left * step_s)} left"
        return text

    def refresh(self) -> None:
        """Look for past runs again."""
        self.runs.refresh()
        for panel in (self.ask, self.tokens, self.export):
            panel.refresh()

    # --- the picture ------------------------------------------------------------------------

    def draw(self) -> None:
        """The present run, or runs of a sweep, and the marked past ones in one figure."""
        run, shown = self.run, {}
        for name, record in list(run.records.items()) if run is not None else ():
            if record.steps:
                shown[f"run {name}"] = record
        for label in self.runs.marked:
            past = self.past.get(label)
            if past is not None and past.record.steps and not self._is_present(past):
                shown[label] = past.record
        if shown:
            text = ", ".join(f"{label}: loss {r.steps[-1].loss:.3f}" for label, r in shown.items())
            with self._drawing:  # matplotlib's log labels are not made by two threads at once
                self.drawn = live.figure(shown, run.events if run is not None else [])
                picture = base64.b64encode(self.drawn.png()).decode()
            source = f'src="data:image/png;base64,{picture}"'
            self.figure.value = f'<img {source} alt="{html.escape(text)}" style="max-width:100%">'

    def _is_present(self, past: runs.PastRun) -> bool:
        """Whether it is of the present run, which is drawn already."""
        configs = self.run.configs if self.run is not None else ()
        return past.folder.resolve() in (Path(c.output_dir).resolve() for c in configs)

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        """The widgets, and for readers without them what they show now."""
        shown = [self.prediction, self.status, self.figure, *(panel.out for panel in self.panels)]
        parts = [part.value for part in shown] + [self.runs.html()]
        bundle = self.view._repr_mimebundle_(**kwargs)
        return bundle | {"text/html": "\n".join(f"<p>{part}</p>" for part in parts if part)}


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def memory_bar(peak_bytes: int, memory_budget: str | None) -> str:
    """What a run takes, against the budget and what the machine has free."""
    free = host_memory_bytes()
    budget = parse_bytes(memory_budget)
    text = f"{peak_bytes / 2**20:,.0f} MiB of memory, without Python's"
    text += f", budget {budget / 2**20:,.0f} MiB" if budget else ""
    text += f", {free / 2**20:,.0f} MiB free on this machine"
    limits = f'max="{free}" high="{0.9 * free:.0f}" optimum="0" value="{peak_bytes}"'
    return f'<div><meter style="width:680px" aria-label="{text}" {limits}></meter></div>{text}'
