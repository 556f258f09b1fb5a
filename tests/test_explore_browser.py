"""notebooks/explore.ipynb in JupyterLab, as somebody with a keyboard uses it."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from browser import chromium, free_port, text, wait_for
from test_explore import loads_in_memory

ROOT = Path(__file__).parents[1]
pytestmark = [
    pytest.mark.browser,
]


@contextlib.contextmanager
def jupyter_lab(folder):
    """The address of JupyterLab on `folder`, without a token and on this machine only."""
    port, home = free_port(), str(folder / "jupyter")
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root"]
    command += ["--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}"]
    command += ["--ServerApp.port_retries=0", "--IdentityProvider.token="]
    command += [f"--ServerApp.root_dir={folder}", "--LabApp.news_url=None"]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    own = {"JUPYTER_CONFIG_DIR": home, "JUPYTER_RUNTIME_DIR": home, "PYTHONPATH": path}
    address = f"http://127.0.0.1:{port}"

    def answers():
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/api") as reply:
            return reply.status == 200

    with subprocess.Popen(command, env=os.environ | own, stderr=subprocess.DEVNULL) as server:
        try:
            wait_for(answers, "JupyterLab")
            yield address
        finally:
            server.terminate()


class Notebook:
    """The page, used by its keyboard; only the menu is clicked."""

    def __init__(self, page):
        self.page = page

    def all(self, selector):
        return self.page.find_elements("css selector", selector)

    def menu(self, name, command):
        """Choose from the menu; the status bar says nothing of the kernel before there is focus."""
        next(item for item in self.all(".lm-MenuBar-item") if item.text == name).click()
        entry = f".lm-Menu-item[data-command='{command}']"
        wait_for(lambda: self.all(entry), "the menu")[0].click()

    def run_all(self):
        """Run all cells, as soon as the kernel waits for them."""
        wait_for(lambda: self.all(".jp-Notebook .jp-Cell"), "the notebook")
        ready = ".jp-Notebook-ExecutionIndicator[data-status='idle']"
        wait_for(lambda: self.all(ready), "the kernel")
        wait_for(self.has_kernel, "the kernel's session")  # else JupyterLab asks for a kernel
        self.menu("Run", "runmenu:run-all")

    def has_kernel(self):
        with urllib.request.urlopen(
            f"{self.page.current_url.split('/lab')[0]}/api/sessions"
        ) as reply:
            return any(one["kernel"]["execution_state"] == "idle" for one in json.load(reply))

    def status(self):
        own = ".jupyter-widgets [role=status], .jupyter-widgets [role=alert]"
        told = f"[...document.querySelectorAll('{own}')]"
        return self.page.execute_script(f"return {told}.map(x => x.innerText).join(' ')")

    def until_status(self, words):
        wait_for(lambda: words in self.status(), f"{words!r}")
        return self.status()

    def button(self, label):
        buttons = self.all("button.jupyter-button")
        return next((b for b in buttons if b.is_displayed() and b.text.strip() == label), None)

    def press(self, label):
        """Space on the button with this label."""
        enabled = wait_for(lambda: (b := self.button(label)) and b.is_enabled() and b, label)
        enabled.send_keys(self.keys().SPACE)

    def check_first(self):
        """Space on the first check box that is shown, if there is one; the table may be redrawn."""
        boxes = self.all("input[type=checkbox]")
        box = next((b for b in boxes if b.is_displayed()), None)
        if box is not None:
            box.send_keys(self.keys().SPACE)
        return box

    def open(self, title):
        """Show a panel."""
        tabs = self.all(".jupyter-widgets .lm-TabBar-tab")
        tab = next(tab for tab in tabs if tab.text.strip() == title)
        self.page.execute_script("arguments[0].scrollIntoView({block: 'center'})", tab)
        tab.click()  # nothing else lies over it there

    def enter(self, label, value):
        """Type into the field with this label, and leave it with Tab."""
        keys = self.keys()
        name = next(e for e in self.all("label.widget-label") if e.text == label)
        field = self.page.find_element("id", name.get_attribute("for"))
        field.send_keys(keys.CONTROL, "a")
        field.send_keys(value, keys.TAB)

    def keys(self):
        from selenium.webdriver.common.keys import Keys

        return Keys


@pytest.fixture(scope="module")
def lab(smollm2_dir, tmp_path_factory):
    """The notebook after all its cells have run, and its folder."""
    folder = tmp_path_factory.mktemp("lab")
    (folder / "notebooks").mkdir()
    shutil.copy(ROOT / "notebooks" / "explore.ipynb", folder / "notebooks")
    with chromium() as page, jupyter_lab(folder) as address:
        page.get(f"{address}/lab/tree/notebooks/explore.ipynb?reset")
        notebook = Notebook(page)
        notebook.run_all()
        notebook.until_status("finished: step 2 of 2")
        yield notebook, folder


def screenshot(notebook, name):
    if folder := os.environ.get("ONN_SCREENSHOTS"):
        notebook.page.save_screenshot(f"{folder}/{name}.png")


def steps_of(folder, run):
    path = folder / "runs" / "explore" / run / "record.json"
    return len(json.loads(path.read_text())["steps"]) if path.exists() else 0


def test_a_reader_chooses_layers_and_is_told_what_is_wrong(lab):
    notebook, _ = lab
    page = notebook.page
    wait_for(lambda: notebook.all("img[alt*='run 1: loss']"), "the figure")
    assert "651,264" in text(page)
    assert not any(
        code.is_displayed() for code in notebook.all(".jp-CodeCell .jp-InputArea-editor")
    )
    assert notebook.button("29").get_attribute("aria-pressed") == "true"
    notebook.press("29")  # takes the adapter of the last layer away
    wait_for(lambda: "569,856" in text(page), "another count of trainable parameters")
    wait_for(lambda: notebook.button("29").get_attribute("aria-pressed") == "false", "aria-pressed")
    notebook.enter("LoRA rank", "abc")
    notebook.until_status("lora_rank must be a whole number of at least 1, not 'abc'")
    assert "569,856" not in text(page)
    notebook.enter("LoRA rank", "8")
    notebook.enter("Trained layers", "last:1")
    wait_for(lambda: "81,408" in text(page), "the count for one layer")
    assert "whole number" not in text(page)
    screenshot(notebook, "choose")


def test_the_rows_are_shown_with_what_is_learned(lab):
    notebook, _ = lab
    notebook.open("Data")
    notebook.press("Show rows")
    notebook.until_status("897 rows")
    learned = [x.text for x in notebook.all("span[style*='183, 228, 199'], span[style*='b7e4c7']")]
    assert any("<|im_end|>" in x for x in learned)
    screenshot(notebook, "data")


def test_a_run_goes_on_while_settings_change_and_cells_run_again(lab, smollm2_dir):
    notebook, folder = lab
    notebook.enter("Steps", "1000")
    notebook.press("Start")
    notebook.enter("Tokens, at most", "48")  # in its first second
    notebook.until_status("running: step 1 of 1000")
    notebook.enter("Tokens, at most", "56")
    notebook.until_status("running: step 2 of 1000")
    notebook.run_all()  # a new explorer
    wait_for(lambda: "not measured during a run" in text(notebook.page), "the new explorer")
    notebook.until_status("running: step")
    notebook.press("Pause")
    notebook.until_status("paused: step")
    notebook.open("Ask")
    notebook.enter("New tokens", "8")
    notebook.press("Ask")
    notebook.until_status("answers to")
    wait_for(lambda: "with the adapter" in text(notebook.page), "the adapter's answer", 60)
    screenshot(notebook, "ask")
    notebook.press("Save adapter")
    notebook.until_status(f"adapter saved to {folder.resolve()}/runs/explore/adapter")
    assert loads_in_memory(smollm2_dir, folder / "runs" / "explore" / "adapter")
    notebook.press("Go on")
    notebook.until_status("running: step")
    notebook.menu("Kernel", "kernelmenu:interrupt")  # no cell runs
    notebook.until_status("stopped: step")
    assert loads_in_memory(smollm2_dir, folder / "runs" / "explore" / "2" / "adapter")


def test_runs_are_drawn_together_continued_and_merged(lab):
    notebook, folder = lab
    notebook.open("Runs")
    wait_for(lambda: "explore/2" in text(notebook.page), "the table")
    done = steps_of(folder, "2")
    wait_for(notebook.check_first, "a box to check")
    wait_for(lambda: notebook.all("img[alt*='explore/1: loss']"), "the first run")
    screenshot(notebook, "runs")
    notebook.press("Continue")
    notebook.until_status(f"running: step {done + 1} of 1000")
    notebook.press("Stop")
    notebook.until_status("stopped: step")
    assert steps_of(folder, "2") > done
    notebook.open("Export")
    notebook.press("Merge")
    notebook.until_status(f"merged into {folder.resolve()}/runs/explore/merged")
    assert (folder / "runs" / "explore" / "merged" / "config.json").exists()
    screenshot(notebook, "export")


def test_a_sweep_is_started_interrupted_and_in_the_table(lab, smollm2_dir):
    notebook, folder = lab
    notebook.enter("Trained layers", "last:1")
    notebook.enter("Steps", "1000")
    notebook.open("Sweep")
    notebook.enter("Vary", "rank: [4, 8]")
    notebook.press("Start sweep")
    notebook.until_status("rank is no setting of a run")
    notebook.enter("Vary", "learning_rate: [1e-3, 4e-3]")
    notebook.press("Start sweep")
    notebook.until_status(": learning_rate=0.001, learning_rate=0.004")
    notebook.until_status("running: 2 runs, the first: step 1 of 1000")
    wait_for(lambda: notebook.all("img[alt*='run learning_rate=0.004: loss']"), "both runs")
    screenshot(notebook, "sweep")
    notebook.menu("Kernel", "kernelmenu:interrupt")  # no cell runs
    notebook.until_status("stopped: 2 runs")
    notebook.open("Runs")
    (sweep,) = (folder / "runs" / "explore").glob("*/learning_rate=0.004")
    name = f"explore/{sweep.parent.name}/{sweep.name}"
    wait_for(lambda: name in text(notebook.page), "the table")
    screenshot(notebook, "sweep_runs")
    for adapter in sweep.parent.glob("*/adapter"):
        assert loads_in_memory(smollm2_dir, adapter)
