"""A headless Chromium for the tests marked browser."""

import contextlib
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-dev-shm-usage", "--window-size=1400,1400"),
)


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """A selenium driver with an empty profile; the test is skipped where there is none."""
    selenium = pytest.importorskip("selenium", reason="selenium is not installed")
    from selenium.webdriver.chrome.service import Service

    binary = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not binary or not driver:
        pytest.skip("chromium and chromedriver are not installed")
    options = selenium.webdriver.ChromeOptions()
    options.binary_location = binary
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        browser = selenium.webdriver.Chrome(options=options, service=Service(driver))
        try:
            yield browser
        finally:
            browser.quit()


def wait_for(find: Callable[[], Any], what: str, seconds: float = 300) -> Any:
    """The first true answer of `find`; fails with `what` when time is over.

    A widget that is drawn anew while `find` looks at it is looked for again.
    """
    from selenium.common.exceptions import StaleElementReferenceException

    until = time.monotonic() + seconds
    while time.monotonic() < until:
        with contextlib.suppress(StaleElementReferenceException):
            if found := find():
                return found
        time.sleep(0.2)
    pytest.fail(f"{what} did not appear in {seconds} s")


def text(browser: Any) -> str:
    """What a reader sees of the page."""
    return browser.execute_script("return document.body ? document.body.innerText : ''")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
