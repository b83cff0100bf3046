"""A report as a PDF, printed by the Chromium that this machine has, without its scripts and without a network."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from etl.reports.packing import packed

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge")
PRINT_S = 120  # that it may take


class NotPrinted(Exception):
    """There is no PDF; the message says why."""


class NoBrowser(NotPrinted):
    """Nothing that prints is installed."""


def browser() -> str | None:
    """The path of one that prints; None where there is none."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def printed(page: bytes) -> bytes:
    """An HTML page as a PDF. Raises NotPrinted, OSError."""
    command = browser()
    if command is None:
        raise NoBrowser(f"a PDF is printed by Chromium, and none is installed: looked for {', '.join(BROWSERS)}")
    with tempfile.TemporaryDirectory(prefix="report-") as name:
        folder = Path(name)
        (folder / "report.html").write_bytes(page)
        options = ["--headless", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
        options += ["--no-pdf-header-footer", f"--user-data-dir={folder}/profile"]
        options += ["--no-sandbox"] if os.geteuid() == 0 else []  # root's has no sandbox; no script runs in a report
        options += [f"--print-to-pdf={folder}/report.pdf", (folder / "report.html").as_uri()]
        try:
            done = subprocess.run(
                [command, *options], capture_output=True, timeout=PRINT_S, env=os.environ | {"HOME": name}
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise NotPrinted(f"{command} did not print: {error}") from None
        made = folder / "report.pdf"
        if not made.exists():
            last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
            raise NotPrinted(f"{command} did not print, and ended with status {done.returncode}: {last:.300}")
        return packed(made.read_bytes())
