"""Which models Trimtab supports, and how exactly: every class that Transformers registers, tiny and random. Makes docs/models.md.

    python benchmarks/models                            # all of them: about 15 minutes on 2 cores
    python benchmarks/models --only qwen3,vl:gemma3 --verbose
    python benchmarks/models --measures fit,merge
    python benchmarks/models --out runs/models.jsonl --resume

Each model is asked about as `measures.py` says, in a worker process. Every result is a line of JSON in --out. A whole run goes to
docs/measured/models.json, from which `make docs` makes docs/models.md; with --keep, the results of --only take the place of theirs
there. The exit code is 1 if a model that Trimtab accepts is computed wrongly, or if Trimtab crashes.
"""

import argparse
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
sys.path.insert(0, str(HERE.parents[1] / "src"))  # for a checkout that is not installed

Result = dict[str, Any]
KEPT = HERE.parents[1] / "docs" / "measured" / "models.json"
LONGEST_S = 300
"""Of one model."""
READY = "ready"


def worker(measures: list[str]) -> None:
    """Examine each case whose name comes in, and answer with a line of JSON."""
    from models.configurations import cases
    from models.examine import calm, examine

    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a model prints is not an answer
    calm()
    known = cases()
    print(READY, file=answers)
    for line in sys.stdin:
        print(json.dumps(examine(known[line.strip()], measures)), file=answers)


class Worker:
    """A process that examines one case after another, replaced by a new one if it dies or takes too long."""

    def __init__(self, measures: list[str]) -> None:
        self.measures = measures
        self.process: subprocess.Popen[str] | None = None

    def ask(self, name: str) -> Result:
        if self.process is None:
            self._start()
        assert self.process is not None
        assert self.process.stdin is not None
        self.process.stdin.write(f"{name}\n")
        self.process.stdin.flush()
        line, late = self._line(LONGEST_S)
        if line:
            return json.loads(line)
        self.stop()
        return {"case": name, "status": "crash", "reason": f"no end after {LONGEST_S} s" if late else "the process died"}

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def _start(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen(
            [sys.executable, str(HERE), "worker", *self.measures], env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        line, _ = self._line(LONGEST_S)
        if line.strip() != READY:
            raise RuntimeError("a worker does not start: python benchmarks/models worker says why")

    def _line(self, seconds: float) -> tuple[str, bool]:
        """The next line; "" if there is none, and whether that is because the time is over."""
        assert self.process is not None
        timer = threading.Timer(seconds, self.process.kill)
        timer.start()
        try:
            assert self.process.stdout is not None
            line = self.process.stdout.readline()
        finally:
            late = not timer.is_alive()
            timer.cancel()
        return line, late and not line


def sweep(names: list[str], jobs: int, measures: list[str]) -> Iterator[Result]:
    """The results of these cases as they come, from so many processes at a time. Without measures, all are taken."""
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    found: queue.SimpleQueue[Result | BaseException] = queue.SimpleQueue()
    for name in names:
        waiting.put(name)

    def work() -> None:
        one = Worker(measures)
        try:
            while not waiting.empty():
                found.put(one.ask(waiting.get_nowait()))
        except queue.Empty:
            pass
        except BaseException as error:
            found.put(error)
        finally:
            one.stop()

    for _ in range(jobs):
        threading.Thread(target=work, daemon=True).start()
    for _ in names:
        result = found.get()
        if isinstance(result, BaseException):
            raise result
        yield result


def read(path: Path) -> dict[str, Result]:
    """The last result of each case in a file of them."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {result["case"]: result for result in map(json.loads, lines)}


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add: Callable[..., Any] = parser.add_argument
    add("--only", metavar="A,B", help="these models; --list lists them")
    add("--measures", metavar="A,B", help="these measures alone, of those in measures.py")
    add("--jobs", metavar="N", type=int, default=len(os.sched_getaffinity(0)), help="how many at a time (default: %(default)s)")
    add("--out", metavar="FILE", type=Path, default=Path("models.jsonl"), help="a line of JSON for each (default: %(default)s)")
    add("--resume", action="store_true", help="leave out those that --out has already")
    add("--keep", action="store_true", help="put the results of --only among those in docs/measured/models.json")
    add("--list", action="store_true", help="list the models")
    add("--verbose", action="store_true", help="print all that was measured")
    return parser


def main() -> int:
    if sys.argv[1:2] == ["worker"]:
        worker(sys.argv[2:])
        return 0
    from models.configurations import cases
    from models.measures import MEASURES
    from models.table import keep

    asked = parser().parse_args()
    known = cases()
    names = asked.only.split(",") if asked.only else list(known)
    if unknown := [name for name in names if name not in known]:
        parser().error(f"no such model: {', '.join(unknown)}")
    measures = asked.measures.split(",") if asked.measures else []
    if unknown := [name for name in measures if name not in MEASURES]:
        parser().error(f"no such measure: {', '.join(unknown)}. There are {', '.join(MEASURES)}")
    if asked.keep and measures:
        parser().error("--keep takes whole results, and --measures leaves parts of them out")
    if asked.list:
        print("\n".join(f"{name:36} {known[name].model}" for name in names))
        return 0
    results = read(asked.out) if asked.resume else {}
    left, started = [name for name in names if name not in results], time.monotonic()
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    with asked.out.open("a" if asked.resume else "w", encoding="utf-8") as out:
        for result in sweep(left, asked.jobs, measures):
            results[result["case"]] = result
            print(json.dumps(result, ensure_ascii=False), file=out, flush=True)
            print(f"{result['case']:36} {result['status']:14} {result.get('reason', '')[:160]}", flush=True)
            if asked.verbose:
                print(json.dumps(result, indent=1, ensure_ascii=False), flush=True)
    counts = Counter(results[name]["status"] for name in names)
    print(
        f"\n{len(names)} models in {time.monotonic() - started:.0f} s: {', '.join(f'{n} {s}' for s, n in counts.most_common())}"
    )
    if asked.keep or not (asked.only or asked.measures):
        kept: dict[str, Result] = json.loads(KEPT.read_text())["models"] if asked.only else {}
        keep(kept | {name: results[name] for name in names}, KEPT)
    return min(counts["crash"] + counts["WRONG"], 1)


if __name__ == "__main__":
    sys.exit(main())
