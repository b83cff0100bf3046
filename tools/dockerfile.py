"""The steps of deploy/Dockerfile in a root that debootstrap has made, as `docker build` and `docker run` take them.

    tools/dockerfile.py ROOT CONTEXT [DOCKERFILE]    as root, in namespaces of its own: `tools/fresh --container`

What it knows of Dockerfiles is what deploy/Dockerfile has; of another step it says so and ends. Then its command runs,
on an object store of moto's, until its health check is well, and is ended by its signal.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

WELL_S, END_S = 600, 60
STORE = "http://127.0.0.1:9123"
BUCKET = "import boto3; boto3.client('s3').create_bucket(Bucket='example-bucket')"


def steps(text: str) -> Iterator[tuple[str, str]]:
    """(RUN, what follows it), ...; a line that ends with a backslash goes on in the next."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        word, _, rest = line.strip().partition(" ")
        yield word, rest.strip()


class Image:
    def __init__(self, root: Path, context: Path):
        self.root, self.context = root, context
        self.user, self.folder = "root", "/"
        self.said: dict[str, str] = {}  # CMD, HEALTHCHECK, STOPSIGNAL

    def take(self, word: str, rest: str) -> None:
        print(f"{word} {rest}", flush=True)
        if word == "USER":
            self.user = rest
        elif word == "WORKDIR":
            self.folder = rest
            (self.root / rest.lstrip("/")).mkdir(parents=True, exist_ok=True)  # root's, whoever USER is
        elif word == "RUN":
            subprocess.run(self.inside(["bash", "-ec", rest]), check=True)
        elif word == "COPY":
            self.copy(rest)
        elif word in ("CMD", "HEALTHCHECK", "STOPSIGNAL"):
            self.said[word] = rest
        elif word not in ("FROM", "VOLUME"):
            sys.exit(f"{word}: a step that is not known here")

    def copy(self, rest: str) -> None:
        owner, words = "root", rest.split()
        if words[0].startswith("--chown="):
            owner = words.pop(0).removeprefix("--chown=")
        *sources, target = words
        to = self.root / self.folder.lstrip("/") / target
        for source in sources:
            path = self.context / source
            for each in path.iterdir() if path.is_dir() else [path]:
                if each.name != ".git":
                    subprocess.run(["cp", "--archive", "--no-target-directory", each, to / each.name], check=True)
                    there = Path(self.folder, target, each.name)
                    subprocess.run(["chroot", self.root, "chown", "--recursive", f"{owner}:", there], check=True)

    def inside(self, command: list[str], **variables: str) -> list[str | Path]:
        home = "/root" if self.user == "root" else f"/srv/{self.user}"
        kept = {name: value for name, value in os.environ.items() if re.fullmatch("(?i)(https?|no|all)_proxy", name)}
        given = {"HOME": home, "LANG": "C.UTF-8", "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"} | kept
        words = [f"{name}={value}" for name, value in (given | variables).items()]
        change = ["chroot", f"--userspec={self.user}", str(self.root)]
        return [*change, "env", "--ignore-environment", f"--chdir={self.folder}", *words, *command]

    def run(self) -> None:
        """Its command, until it is well and ended."""
        aws = {"AWS_ENDPOINT_URL": STORE, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
        aws |= {"AWS_REGION": "us-east-2", "AWS_DEFAULT_REGION": "us-east-1"}
        host, port = STORE.removeprefix("http://").split(":")
        store = subprocess.Popen(self.inside([".venv/bin/python", "-m", "moto.server", "-H", host, "-p", port]))
        try:
            for _ in range(60):
                time.sleep(1)
                if subprocess.run(self.inside([".venv/bin/python", "-c", BUCKET], **aws)).returncode == 0:
                    break
            began = time.monotonic()
            process = subprocess.Popen(self.inside(json.loads(self.said["CMD"]), **aws))
            check = json.loads(self.said["HEALTHCHECK"].partition("CMD ")[2])
            while subprocess.run(self.inside(check), stderr=subprocess.DEVNULL).returncode:
                if process.poll() is not None or time.monotonic() - began > WELL_S:
                    process.kill()
                    sys.exit("it does not become well")
                time.sleep(2)
            print(f"well after {time.monotonic() - began:.0f} s", flush=True)
            process.send_signal(getattr(signal, self.said["STOPSIGNAL"]))
            if process.wait(END_S) != 0:
                sys.exit(f"it ended with status {process.returncode}")
        finally:
            store.terminate()


def main(root: str, context: str, dockerfile: str = "deploy/Dockerfile") -> None:
    image = Image(Path(root), Path(context))
    for word, rest in steps(Path(context, dockerfile).read_text()):
        image.take(word, rest)
    if "CMD" in image.said:
        image.run()


if __name__ == "__main__":
    main(*sys.argv[1:])
