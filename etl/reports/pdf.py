"""A report as a PDF, printed by the Chromium that this machine has, without its scripts and without a network."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge")
PRINT_S = 120  # that it may take


class NotPrinted(Exception):
    """There is no PDF; the message says why."""


def write(page: bytes, target: Path) -> None:
    """Print an HTML page into a file, which appears whole. Raises NotPrinted, OSError."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise NotPrinted(f"a PDF is printed by Chromium, and none is installed: looked for {', '.join(BROWSERS)}")
    with tempfile.TemporaryDirectory(prefix="report-") as name:
        folder = Path(name)
        (folder / "report.html").write_bytes(page)
        options = ["--headless", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
        options += ["--no-pdf-header-footer", f"--user-data-dir={folder}/profile"]
        options += ["--no-sandbox"] if os.geteuid() == 0 else []  # root's has no sandbox; no script runs in a report
        command = [browser, *options, f"--print-to-pdf={folder}/report.pdf", (folder / "report.html").as_uri()]
        try:
            done = subprocess.run(command, capture_output=True, timeout=PRINT_S, env=os.environ | {"HOME": name})
        except (OSError, subprocess.SubprocessError) as error:
            raise NotPrinted(f"{browser} did not print: {error}") from None
        printed = folder / "report.pdf"
        if not printed.exists():
            last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
            raise NotPrinted(f"{browser} did not print, and ended with status {done.returncode}: {last:.300}")
        part = target.with_name(f".{target.name}.{os.getpid()}.part")
        try:
            shutil.copyfile(printed, part)
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)
