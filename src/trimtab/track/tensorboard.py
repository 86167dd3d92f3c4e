"""TensorBoard: files of events, without torch or TensorFlow."""

import re
import time
from pathlib import Path
from typing import Any, ClassVar

from trimtab.core import yaml12
from trimtab.track._base import Opening, Session, Tracker
from trimtab.track._names import Line


class TensorBoard(Tracker):
    """TensorBoard: files that `tensorboard --logdir` shows."""

    package: ClassVar[str] = "tensorboard"

    def place(self, folder: Path) -> str:
        return f"files in {folder}; `tensorboard --logdir {folder.parents[2]}` shows them"

    def open(self, opening: Opening) -> "Events":
        return Events(opening, self.project)


class Events(Session):
    """The run's events, written anew from its beginning: metrics.jsonl has them all."""

    def __init__(self, opening: Opening, project: str) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        folder = opening.folder / _file_name(project) / _file_name(opening.name)
        before = list(folder.glob("events.out.*"))
        self.writer = EventFileWriter(str(folder), flush_secs=10)
        self.added, self.folder = 1, folder  # the version of its format
        self._text("recipe", f"```yaml\n{yaml12.dump(opening.config)}```", 0)
        self.flush()
        for path in before:
            path.unlink(missing_ok=True)

    def log(self, line: Line) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._add(Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in line.values.items()]), line.step)
        if line.rows:
            self._text("eval/samples", line.as_markdown(), line.step)

    def flush(self) -> None:
        self.writer.flush()

    def close(self, done: bool) -> None:
        """Raises OSError if events are missing: the writer's own thread meets a full disk silently."""
        self.writer.close()
        (path,) = self.folder.glob("events.out.*")
        if (found := _records(path.read_bytes())) < self.added:
            raise OSError(f"{path}: only {found} of {self.added} events were written. Is the disk full?")

    def _text(self, tag: str, text: str, step: int) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
        from tensorboard.compat.proto.types_pb2 import DT_STRING

        metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
        shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
        tensor = TensorProto(dtype=DT_STRING, string_val=[text.encode()], tensor_shape=shape)
        self._add(Summary(value=[Summary.Value(tag=f"{tag}/text_summary", metadata=metadata, tensor=tensor)]), step)

    def _add(self, summary: Any, step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self.added += 1
        self.writer.add_event(Event(wall_time=time.time(), step=step, summary=summary))


def _file_name(name: str) -> str:
    """A name as that of a folder, which stays where it belongs on every system."""
    return re.sub(r'[<>:"/\\|?*\x00-\x1f]', "_", name).rstrip(". ") or "_"


def _records(content: bytes) -> int:
    """How many whole records a file of events has: a length of 8 bytes, its checksum of 4, the data, and theirs of 4."""
    place = count = 0
    while place + 12 <= len(content):
        place += 16 + int.from_bytes(content[place : place + 8], "little")
        count += place <= len(content)
    return count
