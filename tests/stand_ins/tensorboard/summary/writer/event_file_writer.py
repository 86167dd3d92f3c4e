"""A stand-in for TensorBoard's writer of event files."""

import os
import time

from stand_in import keep, note


class EventFileWriter:
    def __init__(self, logdir, max_queue_size=10, flush_secs=120, filename_suffix=""):
        self.path = f"{logdir}/events.out.tfevents.{time.time()}.{os.getpid()}"
        keep(logdir, os.path.basename(self.path), "")
        self._record()
        _, project, name = logdir.rsplit("/", 2)
        note("tensorboard", "init", project=project, name=name, dir=logdir)

    def _record(self, data=b"event"):
        with open(self.path, "ab") as file:
            file.write(len(data).to_bytes(8, "little") + b"sum1" + data + b"sum2")

    def add_event(self, event):
        if os.environ.get("STAND_IN") != "loses":
            self._record()
        values, tables = {}, {}
        for value in event.summary.value:
            if hasattr(value, "simple_value"):
                values[value.tag] = value.simple_value
                continue
            text = value.tensor.string_val[0].decode()
            assert value.metadata.plugin_data.plugin_name == "text"
            if value.tag == "recipe/text_summary":
                note("tensorboard", "recipe", text=text)
                return
            head, _, *rows = ([cell.strip() for cell in row.strip("| ").split(" | ")] for row in text.splitlines())
            tables[value.tag.removesuffix("/text_summary")] = [head, rows]
        note("tensorboard", "log", values=values, tables=tables, step=event.step)

    def flush(self):
        pass

    def close(self):
        note("tensorboard", "finish", done=True)
