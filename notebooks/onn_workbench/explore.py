"""The widgets of the interactive notebook: choose, predict, run and watch."""

import base64
import html
import re
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ipywidgets as w

from onn_core.adapters.lora import select_layers
from onn_core.config import TrainConfig
from onn_core.errors import OnnError
from onn_core.record import RunRecord
from onn_workbench.background import ENDED, BackgroundRun
from onn_workbench.figure import Figure
from onn_workbench.live import figure
from onn_workbench.outline import Outline
from onn_workbench.tracking import find_records

FIELDS = (  # setting, widget, label, tooltip
    ("data", "Text", "Data", "chatterbot, or a .jsonl or .txt file"),
    ("lora_rank", "BoundedIntText", "LoRA rank", "r of the adapter"),
    ("batch_size", "BoundedIntText", "Batch size", "Samples of an optimizer step"),
    ("max_length", "BoundedIntText", "Tokens, at most", "Longer samples are cut"),
    ("max_steps", "BoundedIntText", "Steps", "Optimizer steps"),
    ("eval_every", "BoundedIntText", "Evaluate every", "Steps between evaluations; 0 is never"),
    ("learning_rate", "FloatText", "Learning rate", "Of AdamW; falls linearly to 0"),
    ("memory_budget", "Text", "Memory budget", "Such as 4GB; empty holds one layer"),
)
BUTTONS = (  # method, text, icon
    ("start", "Start", "play"),
    ("pause", "Pause", "pause"),
    ("stop", "Stop", "stop"),
    ("save", "Save adapter", "save"),
)
WIDE = {"style": {"description_width": "110px"}, "layout": {"width": "340px"}}


class Explorer:
    """Widgets that choose a run, predict it, run it in a thread and show it live.

    models: name -> folder. settings: those of TrainConfig that the widgets begin with, with
    `output_dir`, in which every run gets a folder of its own. records: where past runs are.
    """

    def __init__(self, models: dict[str, str], records: Sequence[str] = (), **settings: Any):
        self.settings = {"progress": False, "eval_every": 1, "eval_samples": 8} | settings
        self.records = [*records, str(settings["output_dir"])]
        self.run: BackgroundRun | None = None
        self._outlines: dict[str, Outline] = {}
        self._quiet, self._draw_after, self._drawing = False, 0.0, threading.Lock()
        self.models, self.past_paths = dict(models), {}
        self.model = self._field("Combobox", "Model", "A name, or a folder", options=tuple(models))
        self.fields = {}
        for name, kind, text, tip in FIELDS:
            self.fields[name] = self._field(kind, text, tip)
            default = TrainConfig.__dataclass_fields__[name].default
            if (value := self.settings.get(name, default)) is not None:
                self.fields[name].value = value
        choices = ("all", "ends:4", "last:8")
        self.layers = self._field("Combobox", "Trained layers", "Or click them", options=choices)
        self.picture = w.HBox(layout={"flex_flow": "row wrap", "align_items": "center"})
        self.prediction, self.status, self.figure = w.HTML(), w.HTML(), w.HTML()
        self.past = w.Combobox(description="Compare with", placeholder="a past run", **WIDE)
        self.past.continuous_update = False
        self.past.observe(lambda _: self._draw(), "value")
        self.buttons = {}
        for name, text, icon in BUTTONS:
            self.buttons[name] = w.Button(description=text, icon=icon, layout={"width": "130px"})
            self.buttons[name].on_click(lambda _, name=name: self._guarded(getattr(self, name)))
        self.buttons["start"].button_style = "primary"
        self.save_to = w.Text(description="Save to", tooltip="Folder of the saved adapter", **WIDE)
        self.save_to.value = str(Path(settings["output_dir"]) / "adapter")
        fields = w.GridBox(
            [self.model, *self.fields.values(), self.layers],
            layout={"grid_template_columns": "350px 350px"},
        )
        act = w.HBox([*self.buttons.values()], layout={"flex_flow": "row wrap"})
        rest = w.HBox([self.past, self.save_to], layout={"flex_flow": "row wrap"})
        parts = [fields, self.picture, self.prediction, act, self.status, rest, self.figure]
        self.view = w.VBox(parts)
        for widget in (self.model, *self.fields.values(), self.layers):
            widget.observe(lambda _: self._guarded(self._predict), "value")
        self.layers.value = str(settings.get("sparse_layers", "all"))
        self.model.value = next(iter(models))
        self._refresh_past()
        self._show_state()

    @staticmethod
    def _field(kind: str, text: str, tip: str, **rest: Any) -> w.Widget:
        """An input that tells its value when it is left, not at each key."""
        if kind == "BoundedIntText":
            rest |= {"min": 0 if text == "Evaluate every" else 1, "max": 10**6}
        made = getattr(w, kind)(description=text, tooltip=tip, **rest | WIDE)
        made.continuous_update = False
        return made

    # --- what is chosen ---------------------------------------------------------------------

    @property
    def config(self) -> TrainConfig:
        """The settings that are chosen; OnnError if one is not possible."""
        chosen = {name: field.value for name, field in self.fields.items()}
        chosen["memory_budget"] = chosen["memory_budget"].strip() or None
        numbers = re.findall(r"\d+", self.layers.value)
        named = re.fullmatch(r"\s*(all|(ends|last):\d+)\s*", self.layers.value)
        chosen["sparse_layers"] = self.layers.value.strip() if named else [int(n) for n in numbers]
        chosen["model_dir"] = self.models.get(self.model.value, self.model.value)
        return TrainConfig(**self.settings | chosen)

    @property
    def outline(self) -> Outline:
        """Of the chosen model; opened and timed once."""
        folder = self.config.model_dir
        if folder not in self._outlines:
            self._outlines[folder] = Outline(folder)
        return self._outlines[folder]

    def _predict(self) -> None:
        """Show what the choice means, on the picture of the model and in figures."""
        outline, config = self.outline, self.config
        self._draw_picture(outline, config)
        self.trained_layers = select_layers(config.sparse_layers, outline.n_layers)
        found = self.predicted = outline.predict(config)
        self.prediction.value = (
            f"<b>{html.escape(outline.title)}</b>. Trainable: <b>{found['trainable']:,}</b>. "
            f"Predicted: about <b>{found['peak_bytes'] / 2**20:,.0f} MiB</b> of memory beside "
            f"Python, and at least about <b>{found['step_s']:.2g} s</b> for a step of full-length "
            f"samples (limited by {found['limited_by']})."
        )
        if self.run is None:
            self._say("ready")

    def _draw_picture(self, outline: Outline, config: TrainConfig) -> None:
        """The layers from embedding to head, each a button that adds or removes its adapter."""
        if len(self.picture.children) != outline.n_layers + 2:
            layout = {"width": "38px", "height": "44px", "margin": "1px", "padding": "0"}
            toggles = []
            for number in range(outline.n_layers):
                toggles.append(w.ToggleButton(description=str(number), layout=layout))
                toggles[-1].tooltip = f"Layer {number}: trained or not"
                toggles[-1].observe(self._clicked, "value")
            ends = [w.HTML("<b>embedding</b>&nbsp;▸&nbsp;"), w.HTML("&nbsp;▸&nbsp;<b>head</b>")]
            self.picture.children = [ends[0], *toggles, ends[1]]
        trained = set(select_layers(config.sparse_layers, outline.n_layers))
        self._quiet = True
        for number, toggle in enumerate(self.picture.children[1:-1]):
            toggle.value = number in trained
            toggle.button_style = "info" if toggle.value else ""
        self._quiet = False

    def _clicked(self, change: Any) -> None:
        if self._quiet:
            return
        toggles = self.picture.children[1:-1]
        self.layers.value = ", ".join(t.description for t in toggles if t.value)

    def _guarded(self, act: Any) -> None:
        """Show what a user can fix, instead of a traceback that no widget shows."""
        try:
            act()
        except (OnnError, OSError) as error:
            self._say(str(error), alert=True)

    def _say(self, text: str, alert: bool = False) -> None:
        style = "color:#b00020" if alert else ""
        role = "alert" if alert else "status"
        self.status.value = f'<div role="{role}" style="{style}">{html.escape(text)}</div>'

    # --- the run ----------------------------------------------------------------------------

    def start(self) -> None:
        """Begin a run in its own folder; returns at once."""
        if self.run is not None and self.run.alive:
            return
        root = Path(self.settings["output_dir"])
        numbers = [int(path.name) for path in root.glob("[0-9]*") if path.name.isdigit()]
        settings = self.config.to_dict() | {"output_dir": str(root / f"{1 + max([0, *numbers])}")}
        self.run = BackgroundRun(TrainConfig(**settings), self._changed)
        self.run.start()

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
            done = self.run.save_adapter(self.save_to.value)
            self._say(f"adapter saved to {self.save_to.value}" if done else "saved after this step")

    @property
    def files(self) -> list[str]:
        """What the last run left in its folder."""
        folder = Path(self.run.config.output_dir)
        return sorted(path.name for path in folder.iterdir() if path.name[0] != ".")

    def wait(self) -> None:
        """Until the run has ended; an interrupt stops the run."""
        if self.run is not None:
            self.run.wait()

    def _changed(self, run: BackgroundRun) -> None:
        """After a step or a change of state, in the run's thread."""
        self._show_state()
        if run.state != "running" or time.perf_counter() >= self._draw_after:
            started = time.perf_counter()
            self._draw()
            self._draw_after = 6 * time.perf_counter() - 5 * started  # a sixth of the time at most
        if run.state in ("finished", "stopped"):
            self._refresh_past()

    def _show_state(self) -> None:
        run, record = self.run, self.run and self.run.record
        state = run.state if run else "ready"
        alive, waits = state not in ("ready", *ENDED), state in ("pausing", "paused")
        self.buttons["start"].disabled = alive
        for name in ("pause", "stop"):
            self.buttons[name].disabled = not alive or state == "stopping"
        self.buttons["save"].disabled = record is None
        self.buttons["pause"].description = "Go on" if waits else "Pause"
        self.buttons["pause"].icon = "play" if waits else "pause"
        if state == "failed":
            self._say(run.error, alert=True)
        elif record is None or not record.steps:
            self._say("opening the model and the text" if alive else state)
        else:
            last = record.steps[-1]
            self._say(
                f"{state}: step {last.step} of {run.config.max_steps}, loss {last.loss:.3f}, "
                f"{last.step_s:.2g} s a step, {record.peak_memory_bytes / 2**20:,.0f} MiB"
            )

    def _refresh_past(self) -> None:
        for path in (path for folder in self.records for path in find_records(folder)):
            label = "/".join(path.with_suffix("").parts[-3:]).removesuffix("/record")
            self.past_paths[label] = str(path)
        self.past.options = tuple(self.past_paths)

    # --- the picture ------------------------------------------------------------------------

    def _draw(self) -> None:
        run = self.run
        shown = {}
        if run is not None and run.record is not None and run.record.steps:
            shown[f"run {Path(run.config.output_dir).name}"] = run.record
        if self.past.value in self.past_paths:
            try:
                past = RunRecord.load(self.past_paths[self.past.value])
                shown |= {self.past.value: past} if past.steps else {}
            except OnnError as error:
                self._say(str(error), alert=True)
        if shown:
            self.drawn = figure(shown, run.events if run is not None else [])
            text = ", ".join(f"{label}: loss {r.steps[-1].loss:.3f}" for label, r in shown.items())
            with self._drawing:  # matplotlib's log labels are not made by two threads at once
                data = base64.b64encode(self.drawn.png()).decode()
            source = f'src="data:image/png;base64,{data}"'
            self.figure.value = f'<img {source} alt="{html.escape(text)}" style="max-width:100%">'

    def show(self) -> Figure:
        """The figure, for the notebook."""
        return self.drawn

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        """The widgets, and for readers without them what they show now."""
        parts = [self.prediction.value, self.status.value, self.figure.value]
        bundle = self.view._repr_mimebundle_(**kwargs)
        return bundle | {"text/html": "\n".join(f"<p>{part}</p>" for part in parts if part)}
