"""How `prepare` scales: on one core, with a process on each of two, and with two parts on one core each.

    python -m tests.bench.prepare_scaling [--megabytes N]       prints the table of RESULTS.md

The text is the standard library's sources, as JSON lines, over and over. Each run is a process of its own that may use
the named cores, from its start to its end; the corpora of all runs must have the same bytes.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from data.prepare.embedded import library_root
from data.text.tokenizer import train_bpe

ROOT = Path(__file__).parents[2]
CALL = [sys.executable, "-m", "train", "prepare"]
FILES = 8
AT_LEAST = 0.8  # of what as many cores should give


def write_text(root: Path, num_bytes: int) -> None:
    """JSON lines of about so many bytes in several files, and a tokenizer beside them."""
    sources = sorted(library_root().rglob("*.py"))
    texts = [text for path in sources if (text := path.read_text(encoding="utf-8", errors="replace")).strip()]
    train_bpe(texts[:200], 8192, progress=False).save(root / "tokenizer.json")
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (root / "text").mkdir()
    number = 0
    for file in range(FILES):
        with (root / "text" / f"{file}.jsonl").open("w", encoding="utf-8") as out:
            while out.tell() < num_bytes // FILES:
                out.write(lines[number % len(lines)])
                number += 1


def command(root: Path, name: str, cores: set[int], *settings: str) -> list[str]:
    """`prepare` of the text, on some cores."""
    fixed = [f"input={root / 'text'}", f"output={root / name}", f"tokenizer={root / 'tokenizer.json'}"]
    pieces = [f"piece_bytes={2**22}", f"shard_tokens={2**20}"]
    listed = ",".join(map(str, sorted(cores)))
    return ["taskset", "-c", listed, *CALL, *fixed, *pieces, *settings]


def seconds_of(commands: list[list[str]]) -> float:
    """From the start of the first to the end of the last, all at once."""
    start = time.perf_counter()
    started = [
        subprocess.Popen(one, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for one in commands
    ]
    codes = [process.wait() for process in started]
    if any(codes):
        raise SystemExit(f"{commands[0][3:]} ended with {codes}")
    return time.perf_counter() - start


def table(root: Path, num_bytes: int) -> str:
    """Seconds and speed of each way, in Markdown."""
    write_text(root, num_bytes)
    size = sum(path.stat().st_size for path in (root / "text").iterdir())
    first, second = sorted(os.sched_getaffinity(0))[:2]
    parts = [command(root, "parts", {core}, f"part={n}/2") for n, core in ((1, first), (2, second))]
    found = {
        "one core": seconds_of([command(root, "one", {first})]),
        "two cores": seconds_of([command(root, "two", {first, second})]),
        "two parts, a core each, and `--join`": seconds_of(parts),
    }
    join = [*CALL, "--join", str(root / "parts")]
    found["two parts, a core each, and `--join`"] += seconds_of([join])
    lines = ["| | seconds | MB/s | of one core |", "|---|---|---|---|"]
    for name, seconds in found.items():
        scale = found["one core"] / seconds
        lines.append(f"| {name} | {seconds:.1f} | {size / seconds / 1e6:.2f} | {scale:.2f} |")
        print(lines[-1], file=sys.stderr, flush=True)
        if name != "one core" and scale < AT_LEAST * 2:
            raise SystemExit(f"does not hold: {name} are {scale:.2f} times as fast as one core")
    contents = [{path.name: path.read_bytes() for path in (root / name).iterdir()} for name in ("one", "two", "parts")]
    if not contents[0] == contents[1] == contents[2]:
        raise SystemExit("does not hold: the corpora differ")
    return "\n".join(lines)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--megabytes", type=int, default=120)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        print(table(Path(scratch), options.megabytes * 10**6))


if __name__ == "__main__":
    main()
