"""JupyterLab in a real browser: the widget of lesson 2.5 is moved, and the picture changes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LESSON = ROOT / "chapters" / "part_2_training_a_tiny_llm" / "2_5_sampling.ipynb"
SCREENSHOT = ROOT / "runs" / "browser-test-failure.png"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
SETTINGS = {
    # By default JupyterLab draws only the cells in view; the test wants to see them all.
    "@jupyterlab/notebook-extension/tracker.jupyterlab-settings": {"windowingMode": "none"},
    "@jupyterlab/apputils-extension/notification.jupyterlab-settings": {
        "checkForUpdates": False,
        "fetchNews": "false",
    },
}

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no browser here: install Chromium to run this test"),
]


@contextlib.contextmanager
def jupyter_lab(folder: Path):
    """JupyterLab on `folder`; gives the address with its token."""
    settings = folder / "settings"
    for name, value in SETTINGS.items():
        file = settings / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(value), encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(8)
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}"]
    command += ["--allow-root", "--expose-app-in-browser", f"--IdentityProvider.token={token}"]
    command += [f"--ServerApp.root_dir={folder / 'work'}"]
    env = dict(os.environ, JUPYTERLAB_SETTINGS_DIR=str(settings), JUPYTER_RUNTIME_DIR=str(folder / "runtime"))
    env["JUPYTER_CONFIG_DIR"] = str(folder / "config")
    with open(folder / "lab.log", "w") as log:
        server = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)
    try:
        for _ in range(300):
            assert server.poll() is None, (folder / "lab.log").read_text()[-2000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api?token={token}", timeout=2)
                break
            except OSError:
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}", token
    finally:
        server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(15)
        server.kill()


def move_the_slider(page, address: str, token: str) -> None:
    url = f"{address}/lab/tree/{LESSON.name}?token={token}&reset"
    page.goto(url, timeout=90_000, wait_until="domcontentloaded")
    page.wait_for_function("window.jupyterapp !== undefined", timeout=90_000)
    page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=90_000)
    # Before its kernel is up, a notebook answers "run all" by asking for a kernel.
    kernel = "window.jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel"
    page.wait_for_function(f"{kernel}?.status === 'idle'", timeout=120_000)
    # In braces, so that nothing is returned and nothing waited for: running all cells takes a while.
    page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells'); }")
    slider = page.locator(".widget-slider", has_text=re.compile("^temperature")).first
    slider.wait_for(state="visible", timeout=180_000)
    area = page.locator(".jp-OutputArea", has=slider).first
    image = area.locator("img").first
    image.wait_for(state="attached", timeout=90_000)
    before = image.get_attribute("src")
    readout = slider.locator(".widget-readout")
    text_before = readout.inner_text()
    handle = slider.locator(".noUi-handle").first
    handle.scroll_into_view_if_needed()
    handle.focus()
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    deadline = time.time() + 60
    while time.time() < deadline:
        after = area.locator("img").first.get_attribute("src") if area.locator("img").count() else None
        if after and after != before:
            break
        time.sleep(0.2)
    assert readout.inner_text() != text_before, "the slider did not move"
    assert after and after != before, "the slider moved, but the picture is the same"


def test_the_sampling_widget_changes_the_picture(tmp_path):
    from playwright.sync_api import sync_playwright

    (tmp_path / "work").mkdir()
    shutil.copy(LESSON, tmp_path / "work")
    with jupyter_lab(tmp_path) as (address, token), sync_playwright() as playwright:
        for attempt in (1, 2):  # browsers are moody: one more try, then it counts
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
            page = browser.new_page(viewport={"width": 1280, "height": 1000})
            try:
                move_the_slider(page, address, token)
                return
            except Exception as error:
                SCREENSHOT.parent.mkdir(exist_ok=True)
                with contextlib.suppress(Exception):
                    page.screenshot(path=str(SCREENSHOT))
                if attempt == 2:
                    raise AssertionError(f"{error}\nThe browser's last view: {SCREENSHOT}") from error
            finally:
                browser.close()
