"""notebooks/explore.ipynb in JupyterLab, as somebody with a keyboard uses it."""

import contextlib
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

    def run_all(self):
        wait_for(lambda: "Python 3 (ipykernel) | Idle" in text(self.page), "the kernel")
        next(item for item in self.all(".lm-MenuBar-item") if item.text == "Run").click()
        entry = ".lm-Menu-item[data-command='runmenu:run-all']"
        wait_for(lambda: self.all(entry), "the menu")[0].click()

    def status(self):
        told = "[...document.querySelectorAll('[role=status], [role=alert]')]"
        return self.page.execute_script(f"return {told}.map(x => x.innerText).join(' ')")

    def until_status(self, words):
        wait_for(lambda: words in self.status(), f"{words!r}")
        return self.status()

    def press(self, label):
        """Space on the button with this label."""
        keys = self.keys()
        button = next(b for b in self.all("button.jupyter-button") if b.text.strip() == label)
        assert button.is_enabled(), label
        button.send_keys(keys.SPACE)

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


def test_a_reader_starts_watches_pauses_stops_and_saves(smollm2_dir, tmp_path):
    (tmp_path / "notebooks").mkdir()
    shutil.copy(ROOT / "notebooks" / "explore.ipynb", tmp_path / "notebooks")
    with chromium() as page, jupyter_lab(tmp_path) as address:
        page.get(f"{address}/lab/tree/notebooks/explore.ipynb?reset")
        notebook = Notebook(page)
        notebook.run_all()
        notebook.until_status("finished: step 2 of 2")
        wait_for(lambda: notebook.all("img[alt*='run 1: loss']"), "the figure")
        assert "651,264" in text(page)
        notebook.press("29")  # takes the adapter of the last layer away
        wait_for(lambda: "569,856" in text(page), "another count of trainable parameters")
        notebook.enter("Trained layers", "last:1")
        wait_for(lambda: "81,408" in text(page), "the count for one layer")
        notebook.enter("Steps", "1000")

        notebook.press("Start")
        notebook.until_status("running: step 1 of 1000")
        wait_for(lambda: notebook.all("img[alt*='run 2: loss']"), "a point of the run")
        notebook.press("Pause")
        paused = notebook.until_status("paused: step")
        notebook.press("Save adapter")
        notebook.until_status("adapter saved to ../runs/explore/adapter")
        assert loads_in_memory(smollm2_dir, tmp_path / "runs" / "explore" / "adapter")
        notebook.press("Go on")
        notebook.until_status("running: step")
        notebook.press("Stop")
        stopped = notebook.until_status("stopped: step")
        assert int(stopped.split()[2]) >= int(paused.split()[2])
        assert loads_in_memory(smollm2_dir, tmp_path / "runs" / "explore" / "2" / "adapter")
        notebook.enter("Compare with", "explore/1")
        wait_for(lambda: notebook.all("img[alt*='explore/1: loss']"), "the first run beside it")
        if folder := os.environ.get("ONN_SCREENSHOTS"):
            page.save_screenshot(f"{folder}/explore.png")
