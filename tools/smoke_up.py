"""`make up`, bounded: until everything answers and a run of generate and one of preprocess are ok; then Ctrl-C.

It needs nothing that has to be installed. Exit status 1, and the last lines of its output, when something did not come.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

LIMIT_S = 900  # packages are installed meanwhile
END_S = 60
PAGES = {
    "API": "http://127.0.0.1:8000/health",
    "dashboard": "http://127.0.0.1:8501/",
    "Prefect": "http://127.0.0.1:4200/api/ready",
    "a run of generate that is ok": "http://127.0.0.1:8000/runs?stage=generate&state=ok",
    "a run of preprocess that is ok": "http://127.0.0.1:8000/runs?stage=preprocess&state=ok",
}


def answers(url: str) -> bool:
    """Whether it is 200 and, where it is a list of runs, has one."""
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=10) as response:
        body = response.read()
        return bool(json.loads(body)) if "/runs" in url else True
    return False


def main() -> int:
    began, missing = time.monotonic(), dict(PAGES)
    with tempfile.NamedTemporaryFile(suffix=".log") as log:
        up = subprocess.Popen(["make", "up"], stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            while missing and up.poll() is None and time.monotonic() - began < LIMIT_S:
                for what in [what for what, url in missing.items() if answers(url)]:
                    print(f"{time.monotonic() - began:5.0f} s  {what}", flush=True)
                    del missing[what]
                time.sleep(1)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(up.pid, signal.SIGINT)  # as Ctrl-C does: to make and what it runs
        up.wait(END_S)
        said = Path(log.name).read_text(errors="replace")
    if missing or "nothing is left running" not in said:
        print(f"make up: {', '.join(missing) or 'its end'} did not come\n{said[-4000:]}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
