"""A lake in an object store whose answers are lost on the way: it has done what it was asked; nobody hears of it."""

import contextlib
import os
import random
import tempfile
from collections import Counter
from pathlib import Path

from faults.lake_world import NotHeld, World, stage
from s3_faults import faulty_s3
from support import s3, s3_variables

from etl.storage import Root
from pipeline import Lake

SHARE = 0.2  # of the answers to PUT and DELETE
BUSY = 0.1  # of all requests, which the store does not take up


def lost_replies(n: int, seed: int) -> str:
    """n batches and compactions, a tenth of all requests refused, a fifth of the answers to writes lost: no line is."""
    pick = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="lake-") as folder, bucket() as (proxy, root):
        world, again = World(Path(folder), seed), 0
        world.root, proxy.dice = root, pick
        for number in range(n):
            proxy.says_which_condition = number % 3 > 0
            world.land(2, small_tables=True)
            proxy.lost_share, proxy.busy_share = SHARE, BUSY
            again += _run("preprocess", world)
            again += _run("compact", world)
            proxy.lost_share = proxy.busy_share = 0
            stage("preprocess", world.root)
            world.verify()
            _require_files(world.root)
        told = Counter(status for *_, status in proxy.seen)
        commits = sum(Lake(Root.at(root)).published().versions.values())
        return (
            f"{commits} commits, {told[503]} of {len(proxy.seen)} requests refused, {told[None]} answers lost: "
            f"{world.next_tick} ticks exact, {again} runs ended by it"
        )


@contextlib.contextmanager
def bucket():
    """A proxy before an S3 server of its own, and the URL of a root there."""
    import boto3
    import s3fs

    before = dict(os.environ)
    with s3() as server, faulty_s3(server) as proxy:
        try:
            os.environ |= s3_variables(server)
            boto3.client("s3").create_bucket(Bucket="lost-replies")
            os.environ |= s3_variables(proxy.url)
            s3fs.S3FileSystem.clear_instance_cache()  # one knows its endpoint for good
            yield proxy, "s3://lost-replies/etl"
        finally:
            os.environ.clear()
            os.environ |= before
            s3fs.S3FileSystem.clear_instance_cache()


def _run(name: str, world: World) -> bool:
    """Run a stage; whether so many answers were lost that it gave up, which it may."""
    try:
        stage(name, world.root)
    except OSError:
        return True
    return False


def _require_files(root: str) -> None:
    """Every file that the newest version of a table names is there."""
    place = Root.at(root)
    for table in Lake(place).columns:
        named = {url.rpartition("/")[2] for url in Lake(place).table(table).file_uris()}
        if gone := named - set(place.names(f"lake/{table}")):
            raise NotHeld(f"{table}: {len(gone)} files that its log names are gone")
