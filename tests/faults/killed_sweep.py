"""A sweep that kills itself with SIGKILL where it comes to an event for the n-th time: ROOT NOW EVENT N.

Events are Python's audit events on a place under the reports: os.listdir, os.remove, os.rmdir.
"""

import os
import signal
import sys
import threading
from datetime import datetime

from etl.runs import retention
from etl.storage import Root


def main(url: str, now: str, event: str, number: str) -> None:
    left, lock = int(number), threading.Lock()

    def count(happened: str, args: tuple) -> None:
        nonlocal left
        if happened == event and args and str(args[0]).startswith(f"{url}/reports/"):
            with lock:
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    while retention.sweep(Root.at(url), now=datetime.fromisoformat(now))["later"]:
        pass


if __name__ == "__main__":
    main(*sys.argv[1:])
