"""record, check and stop in a kernel that somebody works with, and in plain Python."""

import datetime
import os
from decimal import Decimal

import pytest
from jupyter_client.manager import KernelManager

from etl import notebook
from etl.notebook import CHECK_MIME, RECORD_MIME, CheckFailed, Stop, check, record, stop
from etl.storage import PROJECT


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """A kernel as JupyterLab drives one: cell after cell, whatever became of the last."""
    file = tmp_path_factory.mktemp("k") / "kernel.json"
    manager = KernelManager(transport="ipc", connection_file=str(file))
    manager.start_kernel(env={**os.environ, "PYTHONPATH": str(PROJECT)})
    client = manager.client()
    client.start_channels()
    client.wait_for_ready(timeout=60)

    def run_cell(code):
        """The kernel's reply, and the outputs that people see."""
        outputs = []
        reply = client.execute_interactive(code, output_hook=lambda m: outputs.append(m), timeout=60)
        shown = [m["content"] for m in outputs if m["msg_type"] in ("display_data", "error", "stream")]
        return reply["content"], shown

    assert run_cell("from etl.notebook import check, record, stop")[0]["status"] == "ok"
    yield run_cell
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def test_a_failed_check_stops_run_all_after_the_whole_cell(kernel):
    reply, shown = kernel("check('some', True, '3 > 2')\ncheck('few', 3 < 2, '3 < 2')\nreached = True")
    assert (reply["status"], reply["ename"]) == ("error", "CheckFailed")
    assert reply["traceback"] == ["CheckFailed: 1 check failed: few (3 < 2)"]
    table, error = shown
    assert [c["ok"] for c in table["data"][CHECK_MIME]["checks"]] == [True, False]
    assert table["data"]["text/html"].count("<tr") == 2
    assert error["traceback"] == reply["traceback"]
    assert kernel("assert reached")[0]["status"] == "ok"


def test_a_check_of_any_name_fails(kernel):
    reply, _ = kernel("check(5, False)")
    assert (reply["status"], reply["evalue"]) == ("error", "1 check failed: 5")


def test_checks_that_hold_show_one_table_and_the_next_cell_none(kernel):
    reply, shown = kernel("import asyncio\nawait asyncio.sleep(0)\ncheck('a', 1)\ncheck('<b>', 1)")
    assert reply["status"] == "ok" and len(shown) == 1
    assert "&lt;b&gt;" in shown[0]["data"]["text/html"]
    assert kernel("1 + 1")[1] == []


def test_an_error_after_a_check_stays_the_error_of_the_cell(kernel):
    reply, shown = kernel("check('few', False)\n1 / 0")
    assert reply["ename"] == "ZeroDivisionError"
    assert [CHECK_MIME in out.get("data", {}) for out in shown].count(True) == 1


def test_stop_is_a_quiet_line(kernel):
    reply, shown = kernel("stop('no new files')\nreached_after_stop = True")
    assert (reply["ename"], reply["traceback"]) == ("Stop", ["Stopped: no new files"])
    assert kernel("assert 'reached_after_stop' not in globals()")[0]["status"] == "ok"


def test_record_shows_a_table_and_carries_json(kernel):
    kernel("from numpy import array, bool_, int64, nan")
    many = "few=array([1, 2]), all=bool_(True)"
    [shown] = kernel(f"record(versions_read={{'orders': int64(3)}}, rows=int64(1234567), share=nan, {many})")[1]
    assert shown["data"][RECORD_MIME] == {
        "metrics": {"rows": 1234567, "share": None, "few": [1, 2], "all": True},
        "versions_read": {"orders": 3},
        "versions_written": {},
    }
    assert "1,234,567" in shown["data"]["text/html"] and "orders@3" in shown["data"]["text/html"]


def test_outside_ipython_a_check_raises_at_once():
    check("holds", True)
    with pytest.raises(CheckFailed, match=r"^few: 3 < 2$"):
        check("few", False, "3 < 2")
    assert notebook._checked == []


def test_outside_ipython_record_prints_and_stop_raises(capsys):
    record(rows=12, price=Decimal("1.50"), day=datetime.date(2026, 11, 3), tables=("a", "b"))
    assert capsys.readouterr().out == "rows  12\nprice  1.5\nday  2026-11-03\ntables  ['a', 'b']\n"
    with pytest.raises(Stop, match="nothing"):
        stop("nothing")
