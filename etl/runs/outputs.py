"""What a cell shows, on its way from the kernel into the report: coalesced, redacted, capped, journaled."""

import base64
import collections
import functools
import json
import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from etl.notebook import CHECK_MIME, RECORD_MIME
from etl.runs import widgets

if TYPE_CHECKING:
    from etl.runs.journal import SideFile

log = logging.getLogger(__name__)
TEXT = 256 * 1024  # characters of streams that a cell may show; beyond that its beginning and its end
TAIL = 64 * 1024  # characters of that end
RICH = 1_000_000  # bytes of one picture
COUNT = 500  # outputs that a cell may show, and
TOTAL = 4 * RICH  # characters of all of them that are not text; beyond either, the last ones
LAST = 3  # of those
OWN = {RECORD_MIME, CHECK_MIME}  # always shown: the run's record is made of them


class Outputs:
    """The outputs of the cell that is running. If `is_capped`, what does not fit goes into files of the journal."""

    def __init__(self, redactor: Any, journal: Any, is_capped: bool = True):
        self._redactor, self._journal, self._is_capped = redactor, journal, is_capped
        self.start(-1)

    def start(self, index: int) -> None:
        self._index, self._last, self._tail, self._cut, self._left_out = index, "stdout", "", 0, 0
        # (owner, stream) -> its end, which may be the beginning of a secret
        self._held: dict[tuple[str, str], str] = {}
        self._forget_owners()
        self._lengths: dict[int, int] = {}  # number of an output -> its characters
        self._side: SideFile | None = None
        self._rest: SideFile | None = None
        self._last_left_out: collections.deque[Any] = collections.deque(maxlen=LAST)

    def _forget_owners(self) -> None:
        self._owners: dict[int, str] = {}  # number of an output -> the Output widget that has caught it
        self._free: dict[str, list[int]] = {}  # Output widget -> numbers of those that it has cleared

    def stream(self, outs: list[Any], name: str, text: str, owner: str = "") -> None:
        """More text of `stdout` or `stderr`. What may be the beginning of a secret waits for the rest.

        `owner`: the id of the Output widget that has caught it, "" when none has.
        """
        text, self._held[owner, name] = self._redactor.split(self._held.get((owner, name), "") + text)
        self._show(outs, name, text, owner)

    def put(self, outs: list[Any], out: Any, owner: str = "") -> int:
        """Another output, in the room that its owner has cleared or at the end; its number in `outs`."""
        at = self._room(outs, out, owner)
        self.changed(self._index, at, outs)
        return at

    def _room(self, outs: list[Any], out: Any, owner: str) -> int:
        at = self._free[owner].pop(0) if self._free.get(owner) else len(outs)
        outs[at : at + 1] = [out]
        if owner:
            self._owners[at] = owner
        return at

    def clear_caught(self, outs: list[Any], owner: str) -> list[int]:
        """An Output widget has cleared what it caught in this cell; the numbers of those outputs."""
        from nbformat.v4 import new_output

        cleared = [at for at, its in self._owners.items() if its == owner and at < len(outs)]
        for at in cleared:
            del self._owners[at]
            outs[at] = new_output("stream", name="stdout", text="")
            self.changed(self._index, at, outs)
        self._free[owner] = sorted([*self._free.get(owner, []), *cleared])
        self._held = {key: text for key, text in self._held.items() if key[0] != owner}
        return cleared

    def _add_stream(self, outs: list[Any], name: str, text: str, owner: str) -> int:
        """As `add_stream`, to what has the same owner."""
        from nbformat.v4 import new_output

        for at in range(len(outs) - 1, -1, -1):
            its = self._owners.get(at, "")
            if its != owner and owner:
                continue
            if its != owner or outs[at].output_type != "stream":
                break
            if outs[at].name == name and at not in self._free.get(owner, []):
                add_to(outs[at], text)
                return at
        return self._room(outs, new_output("stream", name=name, text=_as_shown(text)), owner)

    def _show(self, outs: list[Any], name: str, text: str, owner: str = "") -> None:
        self._last = name
        if self._side is None:
            room = TEXT - sum(len(out.text) for out in outs if out.output_type == "stream")
            if self._is_capped and len(text) > room:
                self._side = self._journal.side_file(side_name(self._index))
                for out in outs:
                    self._side.write(out.text if out.output_type == "stream" else "")
            head, text = (text[:room], text[room:]) if self._side else (text, "")
            if head:
                self._journal.output(self._index, self._add_stream(outs, name, head, owner), outs, head)
            if self._side:
                self._side.write(head)
        if text and self._side:
            self._side.write(text)
            self._tail, self._cut = (self._tail + text)[-TAIL:], self._cut + len(text)

    def show(self, outs: list[Any], out: Any) -> None:
        """An output of the runner's own."""
        outs.append(out)
        self.changed(self._index, len(outs) - 1, outs)

    def changed(self, index: int, at: int, outs: list[Any]) -> None:
        """`outs[at]` of the cell at `index` is new, or shows something new."""
        if self._is_capped:
            self._cap(outs[at], f"{index + 1:02d}-{at + 1}")
        if index == self._index:
            self._lengths[at] = sum(map(_length, outs[at].get("data", {}).values()))
        self._journal.output(index, at, outs)

    def has_no_room(self, outs: list[Any], msg: dict[str, Any], owner: str = "") -> bool:
        """Whether what is in `msg` is more than the cell may show."""
        if not self._is_capped or msg["msg_type"] == "error" or OWN & msg["content"].get("data", {}).keys():
            return False
        return (len(outs) >= COUNT and not self._free.get(owner)) or sum(self._lengths.values()) > TOTAL

    def leave_out(self, outs: list[Any], out: Any) -> None:
        """Put an output into the file that holds all of them, one a line, and show it only if it is one of the last."""
        if self._rest is None:
            self._rest = self._journal.side_file(rest_name(self._index))
            for shown in outs:
                self._rest.write(json.dumps(shown) + "\n")
        self._rest.write(json.dumps(out) + "\n")
        self._last_left_out.append(out)
        self._left_out += 1

    def _show_last_left_out(self, outs: list[Any], rest: "SideFile") -> None:
        from nbformat.v4 import new_output

        total, name, count = rest.close(), rest_name(self._index), self._left_out - len(self._last_left_out)
        where = f"all of them are in {name}" if total else "the rest could not be kept"
        self._rest = None
        if count > 0:
            self.show(
                outs, new_output("display_data", data={"text/plain": f"… {count:,} outputs left out here; {where} …"})
            )
        for out in self._last_left_out:
            self.show(outs, out)

    def cleared(self, index: int) -> None:
        """The cell has cleared what it showed; the file that holds all of it goes on."""
        self._tail, self._cut, self._lengths, self._left_out = "", 0, {}, 0
        self._last_left_out.clear()
        self._forget_owners()
        self._journal.cleared(index)

    def finish(self, outs: list[Any]) -> None:
        """The cell has ended: show what was held back, and the end of what did not fit."""
        for (owner, name), text in self._held.items():
            self._show(outs, name, self._redactor.text(text), owner)
        self._held = {}
        while outs and any(len(outs) - 1 in free for free in self._free.values()):  # cleared, and not used again
            outs.pop()
        if self._rest:
            self._show_last_left_out(outs, self._rest)
        if not self._side:
            return
        total, name = self._side.close(), side_name(self._index)
        left_out = self._cut - len(self._tail)
        if left_out:
            where = f"all of it is in {name}" if total else "the rest could not be kept"
            self._tail = f"\n… {left_out:,} characters left out here; {where} …\n{self._tail}"
        else:
            self._side.remove()
        self._side = None
        if self._tail:
            self._journal.output(self._index, add_stream(outs, self._last, self._tail), outs, self._tail)

    def _cap(self, out: Any, number: str) -> None:
        """Replace what is too large in a rich output or an error by a note; the whole goes into a file."""
        if out.output_type == "error":
            text = "\n".join(out.traceback)
            if len(text) > TEXT:
                kept = self._journal.side_file(name := f"cell-{number}-error.txt")
                kept.write(text)
                kept.close()
                note = f"\n… {len(text) - TAIL:,} characters left out here; all of it is in {name} …\n"
                out.traceback = [text[: TAIL // 2] + note + text[-TAIL // 2 :]]
            out.evalue = out.evalue if len(out.evalue) <= TAIL else out.evalue[:TAIL] + " …"
        notes = []
        for mime, value in list(out.get("data", {}).items()):
            text = value if isinstance(value, str) else json.dumps(value)
            if len(text) <= (RICH if mime.startswith("image/") else TEXT) or mime in (RECORD_MIME, CHECK_MIME):
                continue
            binary = mime.startswith("image/") and not mime.endswith("xml")
            suffix = "txt" if mime == "text/plain" else re.sub(r"\W.*", "", mime.split("/")[1])
            kept = self._journal.side_file(f"cell-{number}.{suffix}", binary=binary)
            kept.write(base64.b64decode(text) if binary else text)
            kept.close()
            notes.append(f"{mime}, {len(text):,} bytes: in cell-{number}.{suffix}")
            del out.data[mime]
        if notes:
            out.data["text/plain"] = "\n".join([out.data.get("text/plain", ""), *notes]).lstrip("\n")


def text_tail(cell: Any, index: int, folder: Path) -> str:
    """Give a cell that never ended the end of what it printed, if that is in a side file; the last lines of it all."""
    side = folder / side_name(index)
    if side.exists():
        with side.open("rb") as file:
            file.seek(max(0, side.stat().st_size - TAIL))
            tail = file.read().decode(errors="replace")
        add_stream(cell.outputs, "stdout", f"\n… the end of what it printed; all of it is in {side.name} …\n{tail}")
    text = "".join(out.text for out in cell.outputs if out.output_type == "stream")
    return "\n".join(text.splitlines()[-3:])


def side_name(index: int) -> str:
    """The file with the whole text that the cell at `index` of the notebook printed."""
    return f"cell-{index + 1:02d}-output.txt"


def rest_name(index: int) -> str:
    """The file with all outputs of the cell at `index`, as JSON lines, when they are too many to be shown."""
    return f"cell-{index + 1:02d}-outputs.jsonl"


def _length(value: Any) -> int:
    return len(value if isinstance(value, str) else json.dumps(value))


def add_stream(outs: list[Any], name: str, text: str) -> int:
    """Add `text` to the stream that was last written to, as a terminal would show it; its index in `outs`."""
    from nbformat.v4 import new_output

    for at in range(len(outs) - 1, -1, -1):
        if outs[at].output_type != "stream":
            break
        if outs[at].name == name:
            add_to(outs[at], text)
            return at
    outs.append(new_output("stream", name=name, text=_as_shown(text)))
    return len(outs) - 1


def add_to(stream: Any, text: str) -> None:
    """More text of an output that is a stream."""
    line = stream.text.rfind("\n") + 1
    stream.text = stream.text[:line] + _as_shown(stream.text[line:] + text)


def _as_shown(text: str) -> str:
    """A progress bar writes over itself: only its last state counts. Takes time by the length of the text."""
    if "\b" in text:
        kept: list[str] = []
        for letter in text:
            if letter != "\b":
                kept.append(letter)
            elif kept and kept[-1] != "\n":
                kept.pop()
        text = "".join(kept)
    if "\r" in text:  # what stands before the last one, unless that is the line's end or more may come
        text = "\n".join(line[line.rfind("\r", 0, -1) + 1 :] for line in text.split("\n"))
    return text


def apply(outs: list[Any], event: dict[str, Any]) -> None:
    """What an `output` event of the journal does to a cell's outputs."""
    from nbformat import from_dict

    at, out = event["at"], from_dict(event["output"])
    if out.output_type == "stream" and at < len(outs) and outs[at].get("name") == out.name:
        add_to(outs[at], out.text)
    elif at < len(outs):
        outs[at] = out
    else:
        outs.append(out)


@functools.cache
def client_class() -> type:
    """nbclient's NotebookClient, whose outputs go through an `Outputs` called `shown`."""
    from nbclient import NotebookClient
    from nbclient.output_widget import OutputWidget
    from nbformat import NotebookNode
    from nbformat.v4 import output_from_msg

    class Catcher(OutputWidget):
        """An Output widget: what it catches is shown in the cell that is running, and goes when it is cleared."""

        executor: "Client"

        def clear_output(self, outs: list[Any], msg: dict[str, Any], cell_index: int) -> None:
            self.clear_before_next_output = bool(msg["content"].get("wait"))
            if not self.clear_before_next_output:
                self.executor.clear_caught(outs, cell_index, self.comm_id)

        def set_state(self, state: dict[str, Any]) -> None:
            if "msg_id" not in state:
                return
            for hooks in self.executor.output_hook_stack.values():  # others may have come since, and stay
                hooks[:] = [hook for hook in hooks if hook is not self]
            if state["msg_id"]:
                self.executor.output_hook_stack[state["msg_id"]].append(self)

    class Client(NotebookClient):
        shown: Outputs
        redactor: Any

        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            self.views: list[tuple[int, int, Any, Any]] = []  # cell, number of the output, the output, its view
            self.widget_registry = {"@jupyter-widgets/output": {"OutputModel": Catcher}}

        def process_message(self, msg: dict[str, Any], cell: Any, cell_index: int) -> Any:
            kind = msg["msg_type"]
            if kind != "stream":
                msg["content"] = self.redactor.message(kind, msg["content"])
            out = super().process_message(msg, cell, cell_index)
            if kind == "update_display_data":
                display_id = (msg["content"].get("transient") or {}).get("display_id") or ""
                for index, places in self._display_id_map.get(display_id, {}).items():
                    for at in places:
                        self.shown.changed(index, at, self.nb.cells[index].outputs)
            return out

        def output(self, outs: list[Any], msg: dict[str, Any], display_id: str | None, cell_index: int) -> Any:
            hooks = self.output_hook_stack[msg["parent_header"].get("msg_id")]
            shows, owner = (hooks[-1], hooks[-1].comm_id) if hooks else (self, "")
            if shows.clear_before_next_output:
                shows.clear_before_next_output = False
                self.clear_output(outs, {**msg, "content": {}}, cell_index)
            if msg["msg_type"] == "stream":
                self.shown.stream(outs, msg["content"]["name"], msg["content"]["text"], owner)
                return None
            try:
                out = output_from_msg(msg)
            except ValueError:  # of a kind that is none of an output
                return None
            if self.shown.has_no_room(outs, msg, owner):
                self.shown.leave_out(outs, out)
                return None
            at = self.shown.put(outs, out, owner)
            if display_id:
                self._display_id_map.setdefault(display_id, {}).setdefault(cell_index, []).append(at)
            view = out.get("data", {}).get(widgets.VIEW)
            if isinstance(view, dict) and len(self.views) < COUNT:
                self.views.append((cell_index, at, out, view))
            return out

        def clear_output(self, outs: list[Any], msg: dict[str, Any], cell_index: int) -> None:
            super().clear_output(outs, msg, cell_index)
            if not outs:
                self.shown.cleared(cell_index)

        def clear_caught(self, outs: list[Any], cell_index: int, owner: str) -> None:
            cleared = self.shown.clear_caught(outs, owner)
            for cells in self._display_id_map.values():
                if cell_index in cells:
                    cells[cell_index] = [at for at in cells[cell_index] if at not in cleared]

        def handle_comm_msg(self, outs: list[Any], msg: dict[str, Any], cell_index: int) -> None:
            super().handle_comm_msg(outs, msg, cell_index)
            if msg["msg_type"] == "comm_close":
                id = msg["content"]["comm_id"]
                self.widget_state.pop(id, None)
                self.widget_buffers.pop(id, None)
                if isinstance(closed := self.comm_objects.pop(id, None), Catcher):
                    closed.set_state({"msg_id": ""})
                    self.clear_caught(outs, cell_index, id)

        def show_widgets(self) -> None:
            """Have the notebook show its widgets as they are by now, also where no script runs."""
            for index, at, out, view in self.views:
                outs = self.nb.cells[index].outputs
                told = widgets.shown(str(view.get("model_id")), self.widget_state)
                if at < len(outs) and outs[at] is out and told and (data := {widgets.VIEW: view, **told}) != out.data:
                    out.data = NotebookNode(data)
                    self.shown.changed(index, at, outs)
            buffers = {id: self.redactor.tree(list(paths.values())) for id, paths in self.widget_buffers.items()}
            if kept := widgets.metadata(self.widget_state, buffers):
                self.nb.metadata["widgets"] = kept

    return Client
