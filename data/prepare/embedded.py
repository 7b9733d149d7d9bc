"""The embedded corpus: standard-library sources of the Python that runs this, real text on every machine."""

import sysconfig
from pathlib import Path

from data.config import EMBEDDED
from data.errors import CorpusError
from data.prepare.inputs import Document, DocumentsInput

# Installed packages differ from machine to machine; tests would double the corpus with repetitive text.
EXCLUDED_DIRECTORIES = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})
# Written when Python is built, with the paths of the machine that built it.
EXCLUDED_PREFIX = "_sysconfigdata"


def library_root() -> Path:
    """Directory of the standard-library sources. CorpusError where this Python ships without them."""
    root = Path(sysconfig.get_path("stdlib"))
    if not (root / "os.py").is_file():
        raise CorpusError(
            f"data.corpus={EMBEDDED} needs the standard-library sources, and {root} has none: "
            "use another Python, or set data.corpus to a directory made by prepare"
        )
    return root


def embedded_input(max_files: int | None = None) -> DocumentsInput:
    """The library's files sorted by relative path, each a document; `max_files` keeps the first ones only."""
    root = library_root()
    documents, undecodable = [], 0
    for name in _library_files(root)[:max_files]:
        try:
            text = (root / name).read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            undecodable += 1
            continue
        # Split by path: it stays when a file changes between two patch releases.
        documents.append(Document(text, name, key=name.encode()))
    return DocumentsInput({"input": EMBEDDED, "files": len(documents), "undecodable_files": undecodable}, documents)


def _library_files(root: Path) -> list[str]:
    names = []
    for directory, subdirectories, files in root.walk():
        # Pruned in place, so that the walk never enters them: site-packages can hold 100 000 files.
        subdirectories[:] = [name for name in subdirectories if name not in EXCLUDED_DIRECTORIES]
        for name in files:
            path = directory / name
            # Distributions link some files to places that a container may lack.
            if name.endswith(".py") and not name.startswith(EXCLUDED_PREFIX) and path.is_file():
                names.append(path.relative_to(root).as_posix())
    return sorted(names)
