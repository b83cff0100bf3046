"""Days of the stream, whose epochs repeat the same rows under new keys, and a model trained on what there is so far."""

import itertools
import tempfile
from collections.abc import Iterator

import polars as pl

from etl.storage import Root
from pipeline import model, source

EPOCH_H, EVERY_H = 2.4, 6  # as params/ has them
SCALES = (0.02, 0.1)  # the second is the default
LEAST = {0.1: 0.0008}  # of the entropy, that a champion's divergence is at most


def epochs(n: int, seed: int) -> str:
    """`n` hours of each scale, of few hours the smaller alone.

    The gap is never below minus three standard errors, the champion's divergence never above that of the first epoch's,
    no champion is replaced by one that has a larger one; at the default scale it is at most 0.08 % of the entropy."""
    return "; ".join(_of(scale, n, seed) for scale in (SCALES if n >= 24 else SCALES[:1]))


def _of(scale: float, hours: int, seed: int) -> str:
    stream = source.Stream(scale, 2, "2026-03-01T11:00:00+00:00")
    halves = [frames["lineitem"] for _, frames in sorted(source.make_ticks(stream, range(2)).items())]
    told = list[tuple[float, float, bool]]()
    with tempfile.TemporaryDirectory() as folder:
        root = Root.at(folder)
        for count in (2, *(round(2 * hour / EPOCH_H) for hour in range(EVERY_H, hours + 1, EVERY_H))):  # of halves
            parts = model.parted(_pieces(halves, count), sum(half.height for half in halves) * (count + 1) // 2)
            booster = model.train(parts.training, parts.validation, threads=model.idle_cores())
            metrics = model.judge(booster, parts.held_out)
            assert model.leak(metrics) is None, (scale, count, model.leak(metrics))
            champion = model.champion(root)
            verdict = model.is_better(booster, champion, parts.held_out)
            before = model.judge(champion.booster, parts.held_out)["divergence"] if champion else metrics["divergence"]
            assert not verdict.better or metrics["divergence"] <= before, (scale, count, verdict.reason)
            model.publish(root, booster, metrics, parts.held_out, f"train-{count}", verdict.alias)
            held = metrics["divergence"] if verdict.better else before
            told.append((metrics["divergence"], held, verdict.better))
            assert held <= told[0][1] * (1 + 1e-9), (scale, count, told)
            share = held / metrics["expected_log_loss"]
            assert share <= LEAST.get(scale, 1), (scale, count, share)
    trained, held, _ = zip(*told, strict=True)
    return (
        f"scale {scale}: {len(told)} trainings, divergence of the first epoch's {trained[0]:.6f}, of later ones"
        f" {min(trained[1:]):.6f} to {max(trained[1:]):.6f}, of the champion at the end {held[-1]:.6f},"
        f" {100 * share:.3f} % of the entropy,"
        f" {sum(better for *_, better in told) - 1} replaced, gap {metrics['gap']:.6f} of {metrics['gap_error']:.6f},"
        f" {metrics['trees']} trees"
    )


def _pieces(halves: list[pl.DataFrame], count: int) -> Iterator[pl.DataFrame]:
    """So many halves of epochs, one after the other."""
    for half in itertools.islice(itertools.cycle(halves), count):
        yield from half.iter_slices(150_000)
