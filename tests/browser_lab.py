"""A person at a notebook: JupyterLab on the loopback, and Debian's Chromium driven by Playwright.

Every request of the page that leaves the machine is refused and kept, and so is every address
that the server or a kernel asks for. Screenshots are kept in runs/browser, which git ignores.
"""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
SHOTS = ROOT / "runs" / "browser"
NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
LOCAL = ("127.0.0.1", "localhost", "::1")
PATIENCE = 600
"""Seconds for anything that a server or a page does, on a busy machine."""
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
WATCH = """
import os, sys

def watch(event, args):
    if event == "socket.connect" and isinstance(args[1], tuple):
        host = args[1][0]
    elif event == "socket.getaddrinfo":
        host = args[0]
    else:
        return
    host = host.decode() if isinstance(host, bytes) else str(host)
    if host not in ("None", "", "127.0.0.1", "localhost", "::1", "0.0.0.0"):
        with open(os.environ["LWF_OUTSIDE"], "a") as file:
            print(host, event, file=file)

sys.addaudithook(watch)
"""
"""Put before everything else in the server and in its kernels: notes each address outside."""


def chromium() -> str:
    """The browser's path; where there is none, the tests are skipped, and in CI they fail."""
    named = os.environ.get("CHROMIUM", "")
    found = next(filter(None, map(shutil.which, [named] if named else NAMES)), None)
    if found:
        return found
    reason = "no Chromium: sudo apt-get install chromium, or set CHROMIUM to one"
    if os.environ.get("CI"):
        pytest.fail(f"{reason} (`bash colab_setup.sh test` says why it could not)", pytrace=False)
    pytest.skip(reason)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def listens(port: int) -> bool:
    """Whether somebody answers there; a socket may also reach itself, by the port that it got."""
    with socket.socket() as probe:
        reached = probe.connect_ex(("127.0.0.1", port)) == 0
        return reached and probe.getsockname() != probe.getpeername()


class Lab:
    """A server over one folder, with settings of its own and nobody else's."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.token, self.port = folder, secrets.token_hex(8), 0
        self.notebooks, private = folder / "work", folder / "private"
        self.outside_file, self.log = private / "outside.txt", private / "server.log"
        for path in (self.notebooks, private / "watch", private / "config", private / "data"):
            path.mkdir(parents=True)
        (private / "watch" / "sitecustomize.py").write_text(WATCH, encoding="utf-8")
        self.environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(private / "watch"), str(ROOT / "tests")]),
            "LWF_OUTSIDE": str(self.outside_file),
            "JUPYTER_CONFIG_DIR": str(private / "config"),
            "JUPYTER_DATA_DIR": str(private / "data"),
            "JUPYTER_RUNTIME_DIR": str(private / "runtime"),
            "IPYTHONDIR": str(private / "ipython"),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }
        self._settings("apputils-extension/notification", fetchNews="false")
        self._settings("notebook-extension/tracker", windowingMode="none")  # all cells in the page
        self.process: Any = None

    def _settings(self, name: str, **values: Any) -> None:
        """Settings of a part of JupyterLab."""
        folder = self.folder / "private" / "config" / "lab" / "user-settings" / "@jupyterlab"
        path = folder / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values), encoding="utf-8")

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def outside(self) -> list[str]:
        """The addresses outside this machine that the server or a kernel asked for."""
        return self.outside_file.read_text().splitlines() if self.outside_file.exists() else []

    def start(self) -> None:
        """JupyterLab."""
        words = (
            *("--ServerApp.ip=127.0.0.1", "--ServerApp.port_retries=0", "--allow-root"),
            *(f"--IdentityProvider.token={self.token}", "--LabApp.extension_manager=readonly"),
            *(f"--ServerApp.root_dir={self.notebooks}", "--LabApp.expose_app_in_browser=True"),
            "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
        )
        self._run("jupyterlab", lambda port: (*words, f"--ServerApp.port={port}"))

    def start_voila(self, notebook: str) -> None:
        """Voila with one notebook; its page has no token, since nobody else runs on the port."""
        at = ("--Voila.ip=127.0.0.1", "--Voila.port_retries=0", notebook)
        self._run("voila", lambda port: (f"--port={port}", *at))

    def _run(self, module: str, words: Callable[[int], tuple[str, ...]]) -> None:
        """Starts a server and waits until it answers; where another took the port before it did,
        once more with another port."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            self.port = free_port()
            with self.log.open("wb") as log:
                self.process = subprocess.Popen(
                    [sys.executable, "-m", module, "--no-browser", *words(self.port)],
                    cwd=self.notebooks,
                    env=self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )
            while time.monotonic() < deadline and self.process.poll() is None:
                if listens(self.port) and self.process.poll() is None:
                    return
                time.sleep(0.2)
            if "already in use" not in self.log.read_text():
                break
        raise RuntimeError(f"the server did not come up:\n{self.log.read_text()[-3000:]}")

    def stop(self) -> None:
        """Ends it and, with it, its kernels."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def put(self, name: str, notebook: Any) -> str:
        """Writes a notebook into the server's folder; returns the name."""
        nbformat.write(notebook, self.notebooks / name)
        return name


class Browser:
    """One page, and all that happened on it."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.outside: list[str] = []
        self.dialogs: list[str] = []
        page.context.route("**/*", self._route)
        self.watch()

    def watch(self) -> None:
        """Keeps what the page, also a new one, does."""
        self.page.on("dialog", self._dialog)
        self.page.on("websocket", lambda socket: self._asked(socket.url))

    def _dialog(self, dialog: Any) -> None:
        self.dialogs.append(dialog.message)
        dialog.dismiss()

    def _asked(self, url: str) -> bool:
        """Whether it stays here; what does not is kept."""
        parts = urlsplit(url)
        here = parts.scheme in ("data", "blob", "about", "file") or parts.hostname in LOCAL
        if not here:
            self.outside.append(url)
        return here

    def _route(self, route: Any) -> None:
        if self._asked(route.request.url):
            route.continue_()
        else:
            route.abort()

    def shot(self, name: str, whole: Any = None) -> Path:
        """A screenshot of the window, or of one element in full height."""
        SHOTS.mkdir(parents=True, exist_ok=True)
        path = SHOTS / f"{name}.png"
        (whole or self.page).screenshot(path=path)
        print(f"screenshot: {path}")
        return path

    # ------------------------------------------------------------------- a notebook

    def open(self, lab: Lab, name: str) -> None:
        """A notebook in JupyterLab, its kernel connected."""
        self.page.goto(f"{lab.address}/lab/tree/{name}?token={lab.token}&reset")
        self.page.wait_for_selector(".jp-Notebook .jp-Cell")
        self.page.wait_for_function(IDLE, polling=300)

    def theme(self, name: str) -> None:
        """Another theme, e.g. "JupyterLab Dark"."""
        self.page.evaluate(
            "name => window.jupyterapp.commands.execute('apputils:change-theme', {theme: name})",
            name,
        )
        self.page.wait_for_timeout(800)

    def run_all(self) -> None:
        """Run > Run All Cells, as a person does, and the wait for the last one."""
        self.page.click(".lm-MenuBar-itemLabel:text-is('Run')")
        self.page.click(".lm-Menu-itemLabel:text-is('Run All Cells')")
        self.page.wait_for_function(ALL_DONE, timeout=2 * PATIENCE * 1000, polling=500)
        assert self.errors == []

    def show_cell(self, number: int, height: int = 900) -> Any:
        """Scrolls to a cell, in a window of a height."""
        self.page.set_viewport_size({"width": 1280, "height": height})
        cell = self.page.locator(".jp-Notebook .jp-Cell").nth(number)
        cell.evaluate("one => one.scrollIntoView({block: 'start'})")
        self.page.wait_for_timeout(300)
        return cell

    @property
    def errors(self) -> list[str]:
        """Tracebacks on the page."""
        return self.page.locator(
            "[data-mime-type='application/vnd.jupyter.error']"
        ).all_inner_texts()


NOTEBOOK = "window.jupyterapp.shell.currentWidget.content"
IDLE = """
window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'
"""
ALL_DONE = """() => {
  const notebook = window.jupyterapp.shell.currentWidget.content;
  const code = notebook.widgets.filter(one => one.model.type === 'code'
                                              && one.model.sharedModel.getSource().trim());
  const fell = document.querySelector("[data-mime-type='application/vnd.jupyter.error']");
  return IDLE && (fell || code.every(one => one.model.executionCount));
}""".replace("IDLE", IDLE.strip())
"""Whether every code cell has its number, or one fell, and the kernel rests."""


@contextmanager
def browser(dark: bool = False) -> Iterator[Browser]:
    """Chromium with one page."""
    path = chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        program = driver.chromium.launch(executable_path=path, args=FLAGS, timeout=PATIENCE * 1000)
        try:
            context = program.new_context(
                viewport={"width": 1280, "height": 900},
                color_scheme="dark" if dark else "light",
                accept_downloads=False,
            )
            context.set_default_timeout(PATIENCE * 1000)
            yield Browser(context.new_page())
        finally:
            program.close()


def with_parameters(path: Path, values: Mapping[str, Any]) -> Any:
    """A notebook whose parameters cell ends in other values."""
    notebook = nbformat.read(path, 4)
    cell = next(c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    cell.source += "".join(f"\n{name} = {value!r}" for name, value in values.items())
    return notebook


def notebook_of(*cells: str) -> Any:
    """A notebook of code cells."""
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    made.metadata["kernelspec"] = {"display_name": "Python 3", "name": "python3"}
    return made


def rows(count: int) -> str:
    """Alpaca rows as JSONL."""
    made = (
        {"instruction": f"Say what number {i} is.", "input": "", "output": f"It is number {i}."}
        for i in range(count)
    )
    return "".join(json.dumps(row) + "\n" for row in made)
