"""Corpora larger than memory: made-up text, and how fast and in how much memory its tokens are made and read.

python benchmarks/corpus.py make FOLDER MEGABYTES        # files of JSON Lines, plain text and compressed JSON Lines
python benchmarks/corpus.py tokenize FOLDER [LENGTH]     # into the cache; prints a line of JSON
python benchmarks/corpus.py read FOLDER [BLOCKS]         # the packs of as many blocks of 1,024 tokens, in the order of training
python benchmarks/corpus.py watch PID                    # anonymous memory of a process, every second, until it ends
"""

import gzip
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
FILES = 12
BATCH = 2000


def texts(megabytes: float, seed: int) -> Iterator[str]:
    """Documents of made-up sentences, of lengths that differ widely: words of this project's pages, as often as they have them."""
    pages = " ".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md")))
    counts = Counter(re.findall(r"[A-Za-z']+[.,]?", pages))
    words, weights = np.array(list(counts)), np.array(list(counts.values()), float)
    draw, left = np.random.default_rng(seed), megabytes * 1e6
    while left > 0:
        sizes = np.clip(draw.lognormal(5.3, 1.1, BATCH), 5, 20_000).astype(int)
        drawn = draw.choice(words, sizes.sum(), p=weights / weights.sum())
        for part in np.split(drawn, np.cumsum(sizes)[:-1]):
            text = " ".join(part.tolist())
            yield text
            if (left := left - len(text) - 12) <= 0:
                return


def make(folder: Path, megabytes: float) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(FILES):
        part = texts(megabytes / FILES, number)
        if number % 4 == 3:
            with gzip.open(folder / f"{number:02d}.jsonl.gz", "wt", compresslevel=1) as file:
                file.writelines(json.dumps({"text": text}) + "\n" for text in part)
        else:
            with open(folder / f"{number:02d}.jsonl", "w", encoding="utf-8") as file:
                file.writelines(json.dumps({"text": text}) + "\n" for text in part)


def anonymous(pid: int | str = "self") -> float:
    """Megabytes of anonymous memory of a process: what is not pages of files."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8")
    return int(re.findall(r"^Anonymous: +(\d+)", text, re.MULTILINE)[0]) / 1000


def load(folder: Path, length: int) -> "tuple[object, float]":
    from trimtab.base import Base
    from trimtab.data import DataConfig, load_data

    base = Base.load("smollm2-135m-instruct")
    base.encode(["warm"])
    before = anonymous()
    config = DataConfig(train=str(folder), corpus=True, max_length=length)
    data = load_data(
        config, base, None, 0, on_stage=lambda said: print(f"{said}; {anonymous():.0f} MB", file=sys.stderr, flush=True)
    )
    return data, before


def tokenize(folder: Path, length: int = 1024) -> None:
    started = time.perf_counter()
    data, before = load(folder, length)
    seconds, corpus = time.perf_counter() - started, data.corpus
    facts = {"tokens": corpus.tokens, "documents": corpus.documents, "seconds": round(seconds, 1)}
    print(json.dumps({**facts, "tokens_per_second": round(corpus.tokens / seconds), "anonymous_mb": [before, anonymous()]}))


def read(folder: Path, blocks: int = 20_000) -> None:
    from trimtab.data import pack_all

    data, _ = load(folder, 1024)
    corpus, before, most, tokens, started = data.corpus, anonymous(), 0.0, 0, time.perf_counter()
    for number in range(0, blocks, 16):
        rows = [row for block in range(number, number + 16) for row in corpus.rows(block)]
        tokens += sum(len(pack.ids) for pack in pack_all(rows, 1024, share=False))
        most = max(most, anonymous()) if number % 1600 == 0 else most
    seconds = time.perf_counter() - started
    print(
        json.dumps(
            {"tokens": tokens, "tokens_per_second": round(tokens / seconds), "anonymous_mb": [before, most, anonymous()]}
        )
    )


def watch(pid: int) -> None:
    try:
        while True:
            print(f"{time.time():.1f} {anonymous(pid):.0f}", flush=True)
            time.sleep(1)
    except (FileNotFoundError, ProcessLookupError, IndexError):
        pass


if __name__ == "__main__":
    command, target, *number = sys.argv[1:]
    if command == "make":
        make(Path(target), float(number[0]))
    elif command == "watch":
        watch(int(target))
    else:
        {"tokenize": tokenize, "read": read}[command](Path(target), *map(int, number))
