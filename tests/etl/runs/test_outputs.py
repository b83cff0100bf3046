"""What a cell shows: as a terminal would show it, and no more than a report can hold."""

import json

import pytest
from nbformat.v4 import new_output
from test_engine import as_run, run, saved

from etl.runs import outputs
from etl.runs.outputs import RICH, TAIL, TEXT, TOTAL
from etl.storage import Root


def shown(tmp_path, *cells):
    """(outputs of the last cell, names of the files beside the report, the root, the record)"""
    record = run(tmp_path, "rows: int = 1", *cells)
    assert record.state == "ok", record.reason
    root = Root.at(tmp_path)
    beside = [name for name in root.names(record.report) if name.startswith("cell-")]
    return as_run(saved(record)[0])[-1].outputs, beside, root, record


def test_a_progress_bar_leaves_its_last_state(tmp_path):
    bar = "import sys\nfor n in range(3000):\n    print(f'\\r{n + 1} of 3000 ' + '#' * 100, end='', file=sys.stderr)"
    outs, beside, *_ = shown(tmp_path, bar + "\nprint('done')")
    texts = {out.name: out.text for out in outs}
    assert texts["stderr"].startswith("3000 of 3000 #") and len(texts["stderr"]) < 200
    assert texts["stdout"] == "done\n" and beside == []


def test_text_is_what_a_terminal_shows():
    assert add([], "step 12\b3 of 20\n\bnext") == "step 13 of 20\nnext"
    assert add([], "10 %\r20 %\rdone\r\nthen\n") == "done\r\nthen\n"
    assert add([new_output("stream", name="stdout", text="a\n10 %\r")], "20 %") == "a\n20 %"


def add(outs, text):
    outputs.add_stream(outs, "stdout", text)
    return outs[-1].text


def test_a_long_line_takes_no_longer_a_character_than_a_short_one():
    """Time by the square of the length would be hours here."""
    assert len(add([], "1\r" + "x" * 3_000_000)) == 3_000_000
    assert add([], "x" * 1_000_000 + "\b" * 999_999) == "x"


def test_text_stays_beside_what_was_displayed_between(tmp_path):
    outs, *_ = shown(tmp_path, "from IPython.display import display\nprint(1)\nprint(2)\ndisplay(3)\nprint(4)")
    assert [out.get("text") or out.data["text/plain"] for out in outs] == ["1\n2\n", "3", "4\n"]


def test_what_is_too_long_keeps_head_and_tail_and_a_file_with_all_of_it(tmp_path):
    code = "for n in range(60_000):\n    print(f'line {n:05d}')"
    [out], beside, root, record = shown(tmp_path, code)
    whole = "".join(f"line {n:05d}\n" for n in range(60_000))
    assert beside == ["cell-03-output.txt"] and root.read(f"{record.report}/{beside[0]}").decode() == whole
    assert out.text[:TEXT] == whole[:TEXT] and out.text[-TAIL:] == whole[-TAIL:]
    left_out = len(whole) - TEXT - TAIL
    assert f"\n… {left_out:,} characters left out here; all of it is in cell-03-output.txt …\n" in out.text
    assert len(out.text) < TEXT + TAIL + 100


def test_one_huge_string_arrives_in_pieces_and_whole(tmp_path):
    [out], beside, root, record = shown(tmp_path, "print('a' * 3_000_000 + 'b' * 2_000_000)")
    text = root.read(f"{record.report}/{beside[0]}")
    assert (text.count(b"a"), text.count(b"b"), len(text)) == (3_000_000, 2_000_000, 5_000_001)


def test_a_forked_child_is_heard_without_a_port(tmp_path):
    code = (
        "import multiprocessing, sys, psutil\n"
        "child = multiprocessing.get_context('fork').Process(target=print, args=('from the child',))\n"
        "child.start()\nchild.join()\nimport time; time.sleep(0.5)\n"
        "print([c for c in psutil.Process().net_connections('inet') if c.status == 'LISTEN'])"
    )
    [out], *_ = shown(tmp_path, code)
    assert out.text == "from the child\n[]\n"


def test_large_pictures_and_tables_are_files_beside_the_report(tmp_path):
    code = f"""
import os
from IPython.display import HTML, Image, display
picture = b"\\x89PNG\\r\\n\\x1a\\n" + os.urandom({RICH})
display(Image(data=picture, format="png"))
display(HTML("<p>" + "x" * {TEXT} + "</p>"))
display(Image(data=picture[:9000], format="png"))
"""
    outs, beside, root, record = shown(tmp_path, code)
    assert beside == ["cell-03-1.png", "cell-03-2.html"]
    assert len(root.read(f"{record.report}/cell-03-1.png")) == RICH + 8
    assert [sorted(out.data) for out in outs] == [["text/plain"], ["text/plain"], ["image/png", "text/plain"]]
    assert "in cell-03-1.png" in outs[0].data["text/plain"] and "in cell-03-2.html" in outs[1].data["text/plain"]
    assert len(root.read(f"{record.report}/report.ipynb")) < 60_000


MANY = {  # how many, the code of each, what its last ones are
    "small": (800, "display(n)", ["797", "798", "799"]),
    "large": (12, "display(Image(data=picture, format='png'))", ["<IPython.core.display.Image object>"] * 3),
}


@pytest.mark.parametrize("size", MANY)
def test_of_many_outputs_the_first_and_the_last_are_shown_and_a_file_has_all(tmp_path, size):
    count, code, last = MANY[size]
    outs, [beside], root, record = shown(
        *(tmp_path, "import os\nfrom IPython.display import Image, display"),
        "picture = b'\\x89PNG\\r\\n\\x1a\\n' + os.urandom(600_000)\nfrom etl.notebook import check, record\n"
        "live = display(Image(data=picture, format='png'), display_id=True)\n"
        "for n in range(20):\n    live.update(Image(data=picture, format='png'))\n"
        f"for n in range({count}):\n    {code}\nrecord(rows=n)\ncheck('counted', True)",
    )
    assert beside == "cell-04-outputs.jsonl"
    kept = [json.loads(line) for line in root.read(f"{record.report}/{beside}").splitlines()]
    assert [out["data"]["text/plain"] for out in kept][-3:] == last and len(kept) == count + 1
    note = next(i for i, out in enumerate(outs) if "left out here" in out.data["text/plain"])
    assert note >= 5  # what was shown in the place of another takes no room of its own
    displays = sum(not outputs.OWN & out.data.keys() for out in outs) - 1
    assert f"… {len(kept) - displays} outputs left out here; all of them are in {beside} …" in str(outs[note].data)
    assert [out.data["text/plain"] for out in outs[note + 1 :]] == last
    assert outs[1].data.keys() == outs[-1].data.keys() and outs[1].data == kept[1]["data"]
    assert (record.metrics, len(record.checks)) == ({"rows": count - 1}, 1)
    assert root.size(f"{record.report}/report.ipynb") < TOTAL + 5 * RICH


def test_an_endless_message_of_an_error_is_cut(tmp_path):
    record = run(tmp_path, "rows: int = 1", "raise ValueError('x' * 3_000_000)")
    assert (
        record.state == "failed"
        and record.reason.startswith("ValueError: xxx")
        and len(record.reason) <= 2000
        and record.reason[-1] == "…"
    )
    root = Root.at(tmp_path)
    assert root.size(f"{record.report}/report.ipynb") < 500_000 and root.size(f"{record.report}/run.json") < 200_000
