"""A Dask cluster of one worker that knows nothing of this project; prints its address, ends with its standard input."""

import sys

for name in ("pipeline", "etl"):
    sys.modules[name] = None  # an import of it fails


def main() -> None:
    from distributed import LocalCluster

    with LocalCluster(
        n_workers=1,
        threads_per_worker=1,
        processes=False,
        protocol="tcp://",
        host="127.0.0.1",
        dashboard_address="127.0.0.1:0",
    ) as cluster:
        print(cluster.scheduler_address, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
