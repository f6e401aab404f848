"""The embedded default corpus: byte text of the running CPython's standard library, or of any folder of text."""

import platform
import sysconfig
from pathlib import Path

from structmat.data.corpus import Corpus, from_documents
from structmat.data.errors import DataError

# Of the standard library we keep what people wrote: no tests and demos, no third-party packages, no generated tables
# (encodings, pydoc_data), and nothing that depends on how this interpreter was built (_sysconfigdata*, config-*).
EXCLUDED_FOLDERS = frozenset(
    "__pycache__ dist-packages encodings idlelib lib2to3 pydoc_data site-packages test tests turtledemo".split()
)
EXCLUDED_PREFIXES = ("_sysconfigdata", "config-", "sitecustomize")


def load(root: str | Path | None = None, glob: str = "**/*.py") -> Corpus:
    """Reads every file under `root` that matches `glob`, sorted by relative path, as bytes.

    Args:
      root: folder of the user's own text; None is the standard library of the running CPython, less EXCLUDED_FOLDERS.
      glob: pattern below root; own text needs its own, such as `**/*.txt`.

    Returns:
      Corpus of uint8 tokens, files joined by a zero byte, one file in ten held out by a hash of its relative path.

    Raises:
      DataError: root is not a folder, or no non-empty file in it matches.
    """
    folder = Path(root) if root is not None else Path(sysconfig.get_paths()["stdlib"])
    advice = (
        "pass root=None for the standard library of this Python"
        if root is not None
        else "this Python was installed without its sources; pass root= a folder of your own text"
    )
    if not folder.is_dir():
        found = "is not a folder" if folder.exists() else "does not exist"
        raise DataError(f"no text at {str(folder)!r} (glob {glob!r}): it {found}; {advice}")
    files = sorted((p.relative_to(folder).as_posix(), p) for p in folder.glob(glob) if p.is_file())
    if root is None:
        files = [(name, p) for name, p in files if not _excluded(name)]
    documents = [(name, text) for name, p in files if (text := p.read_bytes())]
    if not documents:
        raise DataError(
            f"no text at {str(folder)!r}: none of its files matching glob {glob!r} has any content; "
            f"put text there, pass a glob that matches it (such as '**/*.txt'), or {advice}"
        )
    source = (
        f"{platform.python_implementation()} {platform.python_version()} standard library" if root is None else folder
    )
    return from_documents(documents, f"{source} ({glob}): {len(documents)} files")


def _excluded(name: str) -> bool:
    return any(part in EXCLUDED_FOLDERS or part.startswith(EXCLUDED_PREFIXES) for part in name.split("/"))
