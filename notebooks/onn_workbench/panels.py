"""What an explorer shows below the run: data, runs, answers, tokens, files, a sweep."""

import dataclasses
import html
import itertools
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ipywidgets as w
from IPython.display import HTML

import onn_core
from onn_core.data.corpus import prepare, tokenize_once
from onn_core.errors import ConfigError, OnnError
from onn_core.evaluate import token_losses
from onn_workbench import preview, runs, sweep, tables

THIS = "this run"
BY_COMMAND = "by_command"  # the folder of a run that is started elsewhere; others are numbered
# A text is told when it is left: told at each key, it would be late for a button behind it.
WIDE = {"style": {"description_width": "110px"}, "continuous_update": False}
WIDE["layout"] = {"width": "700px"}
CELL = "flex:none;box-sizing:border-box;padding:5px 6px;line-height:18px;overflow-wrap:anywhere"
WIDTHS = dict(zip(runs.COLUMNS, (150, 76, 45, 112, 55, 60, 58, 66, 70, 420), strict=True))
N_SHOWN = 6  # rows of the data
N_STATIC = 20  # runs of the table for readers without widgets
# the button of a line of the table
GO_ON = {"width": "96px", "height": "28px", "flex": "none", "padding": "0"}
LINE = {"flex": "none", "width": "max-content", "overflow": "visible"}
COPY = "getSelection().selectAllChildren(this.nextElementSibling);"
COPY += "if (document.execCommand('copy')) this.innerText = 'copied'"


def alert(text: str) -> str:
    return f'<div role="alert" style="color:#b00020">{html.escape(text)}</div>'


def guarded(act: Callable[[], Any], shown: w.HTML) -> None:
    """Show what a user can fix, instead of a traceback that no widget shows."""
    try:
        act()
    except (OnnError, OSError) as error:
        shown.value = alert(str(error))


class Panel:
    """Controls, and below them the result: `out`, which readers without widgets see, too."""

    def __init__(self, explorer: Any, title: str, said: str, *controls: w.Widget):
        self.explorer, self.title = explorer, title
        self.out, self.said = w.HTML(), w.HTML(said)
        row = w.HBox(controls, layout={"flex_flow": "row wrap", "align_items": "flex-end"})
        self.view = w.VBox([self.said, row, self.out])
        self.thread: threading.Thread | None = None

    def button(self, text: str, act: Callable[[], Any], icon: str = "") -> w.Button:
        """A button that does `act` in a thread, so that the others can be used meanwhile."""
        button = w.Button(description=text, icon=icon, layout={"width": "auto", "height": "30px"})
        button.on_click(lambda _: self.begin(act))
        return button

    def begin(self, act: Callable[[], Any]) -> None:
        if self.thread is None or not self.thread.is_alive():
            self.out.value = '<div role="status">working …</div>'
            self.thread = threading.Thread(target=guarded, args=(act, self.out), daemon=True)
            self.thread.start()

    def show(self) -> HTML:
        """Do it now; what it shows, for the notebook."""
        guarded(self.act, self.out)
        return HTML(self.out.value)

    def with_model(self, label: str, act: Callable[..., None]) -> None:
        """`act(model, tokenizer, config, held_out)` on the run, between two steps, or a past one.

        held_out: a function that gives its held-out examples.
        """
        if label != THIS:
            past = self.explorer.past[label]
            config = past.config()
            budget = {"memory_budget": config.memory_budget, "device": config.device}
            model = onn_core.from_pretrained(config.model_dir, dtype=config.dtype, **budget)
            model = onn_core.load_adapter(model, past.folder / "adapter")
            tokenizer = preview.tokenizer_of(config)
            act(model, tokenizer, config, lambda: prepare(config, tokenizer).held_out)
            return
        run = self.explorer.begun()

        def between(trainer: Any) -> None:
            held_out = trainer.held_out
            given = trainer.model, trainer.tokenizer, run.config, lambda: held_out
            guarded(lambda: act(*given), self.out)
            if not run.alive:
                trainer.base.close()

        self.out.value = ""
        if not run.between_steps(between) and not self.out.value:
            self.out.value = '<div role="status">after this step …</div>'


class Data(Panel):
    """Rows as the chat template renders them, with what is learned, cut and dropped."""

    def __init__(self, explorer: Any):
        self.kind = w.Dropdown(options=["all", "cut", "dropped"], description="Rows")
        more = "Rows as the model is given them. " + preview.LEGEND
        button = self.button("Show rows", self.act, "eye")
        super().__init__(explorer, "Data", more, self.kind, button)

    def act(self) -> None:
        config = self.explorer.config
        self.explorer.require_data(config)
        tokenizer = preview.tokenizer_of(config)
        found, _ = tokenize_once(config, tokenizer)  # the run then finds it in the cache
        text = (
            f"<b>{found.rows:,}</b> rows of {html.escape(config.data)}: "
            f"<b>{found.truncated:,}</b> cut at {config.max_length} "
            f"tokens, <b>{found.dropped:,}</b> dropped; {len(found.examples):,} samples. "
            f"{found.length_95} tokens would hold 95 % whole."
        )
        chosen = (r for r in preview.rows(config, tokenizer) if self.kind.value in ("all", r.kind))
        shown = [row.html() for row in itertools.islice(chosen, N_SHOWN)]
        if not shown:
            shown = [f"None of the first {preview.N_LOOKED_AT} rows is {self.kind.value}."]
        self.out.value = f'<div role="status">{text}</div>{"".join(shown)}'


class Runs(Panel):
    """The table of past runs: sorted by a column, drawn together, continued."""

    def __init__(self, explorer: Any):
        self.order, self.reverse = "run", False
        self.checks: dict[str, w.Checkbox] = {}
        super().__init__(explorer, "Runs", "Mark runs to draw them together; a title sorts.")
        self.table = w.VBox(layout={"overflow": "auto", "max_height": "420px"})
        self.view.children = [self.said, self.out, self.table]

    def refresh(self) -> None:
        """Look for the runs again; marks stay."""
        explorer = self.explorer
        explorer.past = {past.label: past for past in runs.find_runs(explorer.records)}
        self.rows = runs.table(list(explorer.past.values()), explorer.limit_s)
        self.fill()

    def fill(self) -> None:
        there = [row for row in self.rows if row[self.order] is not None]
        if self.order != "run":  # these have their order already
            there.sort(key=lambda row: row[self.order])
        unknown = [row for row in self.rows if row[self.order] is None]
        self.shown = there[:: -1 if self.reverse else 1] + unknown
        lines = [self._titles()]
        for row in self.shown:
            past = self.explorer.past[row["run"]]
            if past.label not in self.checks:
                tip = f"Draw {past.label}"
                box = w.Checkbox(
                    indent=False, tooltip=tip, layout={"width": "24px", "flex": "none"}
                )
                box.observe(lambda _: self.explorer.draw(), "value")
                self.checks[past.label] = box
            go_on = w.Label(layout=dict(GO_ON))
            if past.can_continue:
                go_on = w.Button(description="Continue", icon="play", layout=dict(GO_ON))
                go_on.tooltip = f"Continue {past.label} from its newest checkpoint"
                go_on.on_click(lambda _, past=past: self.explorer.go_on_with(past))
            parts = [self.checks[past.label], go_on, w.HTML(self._line(row))]
            lines.append(w.HBox(parts, layout=dict(LINE)))
        self.table.children = lines

    def _titles(self) -> w.HBox:
        titles = []
        for name in runs.COLUMNS:
            arrow = (" ▾" if self.reverse else " ▴") if name == self.order else ""
            layout = {"width": f"{WIDTHS[name]}px", "margin": "0", "flex": "none", "padding": "0"}
            titles.append(w.Button(description=name + arrow, layout=layout))
            titles[-1].tooltip = f"Sort by {name}"
            titles[-1].on_click(lambda _, name=name: self.sort(name))
        return w.HBox(
            [w.Label(layout={"width": "128px", "flex": "none"}), *titles], layout=dict(LINE)
        )

    def sort(self, name: str) -> None:
        self.reverse = not self.reverse if name == self.order else False
        self.order = name
        self.fill()

    def _line(self, row: dict[str, Any]) -> str:
        cells = []
        for name, form in runs.COLUMNS.items():
            value = row[name]
            text = "–" if value is None else html.escape(form.format(value))
            side = "left" if isinstance(value, str) else "right"
            style = f"{CELL};width:{WIDTHS[name]}px;text-align:{side}"
            cells.append(f'<span style="{style}">{text}</span>')
        return f'<div style="display:flex">{"".join(cells)}</div>'

    @property
    def marked(self) -> list[str]:
        return [label for label, box in self.checks.items() if box.value]

    def html(self) -> str:
        """The table for readers without widgets."""
        columns = runs.COLUMNS.items()
        texts = [
            {name: "" if row[name] is None else form.format(row[name]) for name, form in columns}
            for row in self.shown[:N_STATIC]
        ]
        return tables.to_html(tables.frame(texts, "run")) if texts else ""


class OfARun(Panel):
    """A panel about the present run or a past one that has an adapter."""

    def __init__(self, explorer: Any, title: str, said: str, *controls: w.Widget):
        self.of = w.Dropdown(options=[THIS], description="Of", layout={"width": "260px"})
        super().__init__(explorer, title, said, self.of, *controls)

    def refresh(self) -> None:
        options = [THIS, *(x.label for x in self.explorer.past.values() if x.has_adapter)]
        if options != list(self.of.options):
            chosen = self.of.value
            self.of.options = options
            self.of.value = chosen if chosen in options else THIS


class Ask(OfARun):
    """The answers of the base and of the adapter."""

    def __init__(self, explorer: Any):
        self.prompt = w.Textarea(description="Prompt", rows=2, **WIDE)
        self.prompt.value = "What is AI?"
        self.n_tokens = w.Text(value="24", description="New tokens", **WIDE)
        self.n_tokens.layout.width = "180px"
        button = self.button("Ask", self.act, "comment")
        said = "A paused run answers at once, one that goes on after its step."
        super().__init__(explorer, "Ask", said, self.prompt, self.n_tokens, button)

    def act(self) -> None:
        prompt, n_tokens = self.prompt.value.strip(), self.n_tokens.value.strip()
        if not prompt or not n_tokens.isdigit() or not int(n_tokens):
            raise ConfigError("write a prompt, and how many new tokens there may be, such as 24.")

        def ask(model: Any, tokenizer: Any, *_: Any) -> None:
            (found,) = onn_core.answers(model, tokenizer, [prompt], max_new_tokens=int(n_tokens))
            cells = ""
            for name, text in (("base", found.base_answer), ("with the adapter", found.answer)):
                ids = tokenizer(text, add_special_tokens=False)["input_ids"]
                was_cut = len(ids) >= int(n_tokens)
                text = html.escape(text) + ("…" if was_cut else "")
                cells += f'<div style="flex:1;min-width:260px"><b>{name}</b>'
                cells += f'<div style="{preview.BOX}">{text}</div></div>'
            title = f'<div role="status">answers to “{html.escape(prompt)}”</div>'
            self.out.value = f'{title}<div style="display:flex;gap:16px">{cells}</div>'

        self.with_model(self.of.value, ask)


class Tokens(OfARun):
    """The loss of each token of held-out samples, before and after."""

    def __init__(self, explorer: Any):
        said = (
            "Held-out samples: green where the adapter lowered a token's loss, red where it rose."
        )
        super().__init__(explorer, "Tokens", said, self.button("Show tokens", self.act, "font"))

    def act(self) -> None:
        def show(model: Any, tokenizer: Any, config: Any, held_out: Callable[[], Any]) -> None:
            examples = held_out()[: config.eval_samples]
            size = config.eval_batch_size or config.batch_size
            losses = token_losses(model, tokenizer, examples, batch_size=size)
            text = f"{len(examples)} held-out samples: loss (nats per token), before and after"
            shown = preview.losses_html(examples, losses, tokenizer)
            self.out.value = f'<div role="status">{text}</div>{shown}'

        self.with_model(self.of.value, show)


class Export(OfARun):
    """Merge the adapter into its model; the settings as Python and as YAML."""

    def __init__(self, explorer: Any):
        self.into = w.Text(description="Merge into", tooltip="A new folder", **WIDE)
        self.into.value = str(Path(explorer.settings["output_dir"]) / "merged")
        self.texts = w.HTML()
        button = self.button("Merge", self.act, "compress")
        super().__init__(explorer, "Export", "", self.into, button)
        self.view.children = [*self.view.children, self.texts]

    def act(self) -> None:
        label = self.of.value
        if label == THIS:
            run = self.explorer.begun()
            if run.alive:
                raise OnnError("stop the run first, or choose a past one: its adapter is merged.")
            config = run.config
        else:
            config = self.explorer.past[label].config()
        adapter = Path(config.output_dir) / "adapter"
        made = onn_core.merge(config.model_dir, adapter, self.into.value.strip())
        size = sum(path.stat().st_size for path in made.iterdir())
        text = f"merged into {made.resolve()}: {size / 1e9:.2f} GB. transformers loads it as it is."
        self.out.value = f'<div role="status">{html.escape(text)}</div>'

    def describe(self, config: Any) -> None:
        """What a merge needs, and the chosen settings as text."""
        into = Path(self.into.value).absolute()
        free = shutil.disk_usage(next(x for x in (into, *into.parents) if x.exists())).free / 1e9
        need = self.explorer.outline.dense_bytes / 1e9
        self.said.value = f"The merged model takes {need:.2f} GB; the disk has {free:,.0f} GB free."
        output_dir = str(Path(config.output_dir) / BY_COMMAND)  # no run of the explorer is there
        config = dataclasses.replace(config, output_dir=output_dir, progress=True)
        config = runs.with_whole_paths(config)
        parts = ["<div>What is chosen above, to run it without this notebook:</div>"]
        for name, text in (("Python", runs.to_python(config)), ("YAML", runs.to_yaml(config))):
            button = f'<button onclick="{COPY}">copy as {name}</button>'
            pre = f'<pre style="{preview.BOX}">{html.escape(text)}</pre>'
            parts.append(f"<div>{button}{pre}</div>")
        command = "<code>.venv/bin/python -m onn_core train run.yaml</code>"
        parts.append(f"<div>Save the YAML as run.yaml; {command} trains with it.</div>")
        self.texts.value = "".join(parts)


class Sweep(Panel):
    """Many runs in one pass over the weights: every combination of what is varied."""

    def __init__(self, explorer: Any):
        self.grid = w.Text(description="Vary", placeholder="lora_rank: [4, 8]", **WIDE)
        self.grid.value = "lora_rank: [4, 8]"
        said = "Settings with lists of values, as YAML; several: {lora_rank: [4, 8], seed: [0, 1]}"
        button = self.button("Start sweep", self.act, "play")
        super().__init__(explorer, "Sweep", said, self.grid, button)

    def act(self) -> None:
        folder = str(self.explorer.new_folder())
        settings = self.explorer.config.to_dict() | {"output_dir": folder}
        chosen = sweep.configs(self.grid.value, **settings)
        self.explorer.begin(list(chosen.values()))
        text = f"{len(chosen)} runs in {folder}: {', '.join(chosen)}"
        self.out.value = f'<div role="status">{html.escape(text)}</div>'
