"""The lab's corpus: eight kinds of text out of Debian's packages and PyPI's, each kind a corpus of its own.

    python -m tests.lab.corpus [--output corpora/lab] [--megabytes 36]

Downloads what `KINDS` names with ``apt-get download`` and ``pip download``, writes the texts of each kind as JSON
lines, trains one tokenizer on a part of each kind, and prepares each kind with it: ``./launch.sh prepare``, as below.
What is there already is not made again. The same packages give the same corpus: of a kind, documents are chosen by the
hash of their names until there are enough, and lie in the order of their names. `PACKAGES` beside the corpus lists the
files that the texts came from.

    prepare input=OUTPUT/texts/sample.jsonl output=OUTPUT/tokenizer vocab_size=16384
    prepare input=OUTPUT/texts/KIND.jsonl output=OUTPUT/KIND tokenizer=OUTPUT/tokenizer shard_tokens=1048576
"""

import argparse
import gzip
import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

from data.config import PrepareConfig
from data.prepare.prepare import prepare
from data.read.manifest import MANIFEST_FILE
from data.text.tokenizer import TOKENIZER_FILE

SAMPLE_BYTES = 4_000_000  # of each kind, that the tokenizer learns from
VOCAB_SIZE, SHARD_TOKENS, HELDOUT = 16384, 2**20, 0.02
SHORTEST, LONGEST = 200, 200_000  # characters of a document
PACKAGES = "packages.txt"


@dataclass(frozen=True)
class Kind:
    """A kind of text.

    Attributes:
        debian, pypi: packages that hold it. files: a pattern of the paths in them, without ``.gz``.
    """

    files: str
    debian: tuple[str, ...] = ()
    pypi: tuple[str, ...] = ()


def _translated(language: str) -> Kind:
    names = ("manpages-{}", "manpages-{}-dev", "libreoffice-help-{}")
    packages = tuple(name.format(language) for name in names)
    return Kind(rf"(share/man/.*\.\d\w*|/help/{language}/.*\.html)", packages)


KINDS = {
    "c": Kind(r"linux-source-[^/]*/(fs|kernel|lib|mm|net)/.*\.c", ("linux-source-6.1",)),
    "documentation": Kind(r"share/doc/.*\.html", ("git-doc", "postgresql-doc-15", "python3.11-doc")),
    "french": _translated("fr"),
    "german": _translated("de"),
    "manuals": Kind(r"share/(man/.*\.\d\w*|perl/.*\.pod)", ("libssl-doc", "manpages", "manpages-dev", "perl-doc")),
    "python": Kind(r".*\.py", pypi=("django==5.2", "networkx==3.5", "sqlalchemy==2.0.41", "sympy==1.14.0")),
    "russian": _translated("ru"),
    "rust": Kind(r".*/(library|compiler|src)/.*\.rs", ("rust-src",)),
}


class _Text(HTMLParser):
    """The words of a page, without scripts and what surrounds its text."""

    SKIPPED = ("script", "style", "head", "nav", "header", "aside", "footer")
    BLOCKS = ("p", "div", "tr", "li", "h1", "h2", "h3", "h4", "pre", "dt", "dd", "br", "table")

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._skipped: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self.SKIPPED:
            self._skipped.append(tag)
        elif tag in self.BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        if self._skipped and tag == self._skipped[-1]:
            self._skipped.pop()

    def handle_data(self, data: str) -> None:
        if not self._skipped:
            self.parts.append(data)


def page_text(page: str) -> str:
    """The text of an HTML page, a block a line."""
    parser = _Text()
    parser.feed(page)
    lines = (line.strip() for line in "".join(parser.parts).splitlines())
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def _of_tar(content: io.BufferedIOBase, files: str) -> Iterator[tuple[str, bytes]]:
    """Paths and contents of an archive's files, also of archives in it."""
    with tarfile.open(fileobj=content, mode="r|*") as archive:
        for member in archive:
            inside = archive.extractfile(member) if member.isfile() else None
            if inside is None:
                continue
            if member.name.endswith(".tar.xz"):
                yield from _of_tar(io.BytesIO(inside.read()), files)
            elif re.fullmatch(f"(.*/)?{files}", member.name.removesuffix(".gz")):
                read = inside.read()
                yield member.name, gzip.decompress(read) if member.name.endswith(".gz") else read


def contents(package: Path, files: str) -> Iterator[tuple[str, bytes]]:
    """Paths and contents of a package's files that match."""
    if package.suffix == ".whl":
        with zipfile.ZipFile(package) as archive:
            for name in sorted(name for name in archive.namelist() if re.fullmatch(files, name)):
                yield name, archive.read(name)
        return
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(package)], stdout=subprocess.PIPE) as unpacking:
        assert unpacking.stdout is not None
        yield from _of_tar(unpacking.stdout, files)


def documents(packages: list[Path], files: str) -> Iterator[tuple[str, str]]:
    """Names and texts of a kind's documents, without what occurs twice, is no UTF-8, or is very short or long."""
    seen = set()
    for package in packages:
        for name, content in contents(package, files):
            try:
                text = content.decode()
            except UnicodeDecodeError:
                continue
            text = page_text(text) if name.endswith(".html") else text
            key = hashlib.blake2b(text.encode()).digest()
            if SHORTEST <= len(text) <= LONGEST and key not in seen:
                seen.add(key)
                yield f"{package.name.split('_')[0].split('-')[0]}/{name.removeprefix('./')}", text


def choose(found: list[tuple[str, str]], num_bytes: float) -> list[tuple[str, str]]:
    """Documents of about so many bytes, by the hash of their names; in the order of their names."""
    chosen, size = [], 0
    for name, text in sorted(found, key=lambda pair: hashlib.blake2b(pair[0].encode()).digest()):
        if size >= num_bytes:
            break
        chosen.append((name, text))
        size += len(text.encode())
    return sorted(chosen)


def download(kind: Kind, folder: Path) -> list[Path]:
    """A kind's packages, in a fixed order."""
    folder.mkdir(parents=True, exist_ok=True)
    before = set(folder.iterdir())
    if not before and kind.debian:
        subprocess.run(["apt-get", "-q", "download", *kind.debian], cwd=folder, check=True)
    if not before and kind.pypi:
        alike = ["--no-deps", "--only-binary=:all:", "--platform=any", "--dest=."]
        subprocess.run([sys.executable, "-m", "pip", "-q", "download", *alike, *kind.pypi], cwd=folder, check=True)
    return sorted(path for path in folder.iterdir() if path.suffix in (".deb", ".whl"))


def write_texts(output: Path, downloads: Path, num_bytes: float) -> None:
    """The texts of each kind as JSON lines, and a sample of all for the tokenizer."""
    texts = output / "texts"
    texts.mkdir(parents=True, exist_ok=True)
    sample, packages = [], []
    for name, kind in KINDS.items():
        files = download(kind, downloads / name)
        packages += [f"{name} {file.name}" for file in files]
        chosen = choose(list(documents(files, kind.files)), num_bytes)
        lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for _, text in chosen]
        (texts / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        sample += [text for _, text in choose(chosen, SAMPLE_BYTES)]
        print(f"{name}: {len(chosen)} documents, {sum(len(text.encode()) for _, text in chosen):,} bytes", flush=True)
    lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in sample]
    (texts / "sample.jsonl").write_text("".join(lines), encoding="utf-8")
    (output / PACKAGES).write_text("\n".join(packages) + "\n", encoding="utf-8")


def main() -> None:
    """Makes whatever of the corpus is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("corpora/lab"), help="directory of the corpora")
    parser.add_argument("--downloads", type=Path, help="directory of the packages; OUTPUT/downloads unless given")
    parser.add_argument("--megabytes", type=float, default=36, help="of text of each kind, at the most")
    asked = parser.parse_args()
    output, texts = asked.output, asked.output / "texts"
    if not (output / PACKAGES).exists():
        write_texts(output, asked.downloads or output / "downloads", asked.megabytes * 1e6)
    tokenizer = output / "tokenizer"
    if not (tokenizer / MANIFEST_FILE).exists():
        prepare(PrepareConfig(input=str(texts / "sample.jsonl"), output=str(tokenizer), vocab_size=VOCAB_SIZE))
    for name in KINDS:
        if (output / name / MANIFEST_FILE).exists():
            continue
        config = PrepareConfig(
            input=str(texts / f"{name}.jsonl"),
            output=str(output / name),
            tokenizer=str(tokenizer / TOKENIZER_FILE),
            shard_tokens=SHARD_TOKENS,
            heldout_fraction=HELDOUT,
        )
        prepare(config)
        print(f"{name} prepared", flush=True)


if __name__ == "__main__":
    main()
