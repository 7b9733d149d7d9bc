"""The one way in which a file of a checkpoint is unpickled: only what a table of contents is made of may be named.

A pickle is a program: whoever reads it runs it. Checkpoints come from elsewhere too, so that reading one must not run
what its writer chose. Everything in this project that unpickles bytes from a file goes through here.
torch is imported when it is needed.
"""

import importlib
import io
import pickle
from typing import IO, Any

# Module -> its names that PyTorch's distributed checkpoint (2.11 to 2.13) writes into `.metadata`.
ALLOWED = {
    "pathlib": {"PosixPath"},  # of the directory that it was first written to; 3.13 has it in another module
    "pathlib._local": {"PosixPath"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
}


class UnsafePickle(Exception):
    """A file of a checkpoint that cannot be read without running what it names, or not at all."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in ALLOWED.get(module, ()):
            return vars(importlib.import_module(module))[name]
        if module == "torch":
            torch = importlib.import_module("torch")
            if isinstance(vars(torch).get(name), torch.dtype):
                return vars(torch)[name]
        raise UnsafePickle(f"it names {module}.{name}, which no checkpoint holds: whoever reads it would run that")


def load_pickle(stream: IO[bytes], where: str) -> Any:
    """What a file of a checkpoint holds.

    Raises:
        UnsafePickle: it names something else than a checkpoint's table of contents does, or is damaged.
    """
    try:
        return _Unpickler(stream).load()
    except UnsafePickle as error:
        raise UnsafePickle(f"{where} was not read: {error}") from None
    except Exception as error:  # damaged bytes raise whatever they happen to say
        raise UnsafePickle(f"{where} is damaged: {' '.join(str(error).split()) or type(error).__name__}") from error


def require_plain(content: io.BytesIO, where: str) -> io.BytesIO:
    """The bytes of an object in a checkpoint, once it is sure that `torch.load` runs nothing of their choice.

    Raises:
        UnsafePickle: they hold more than tensors, numbers, texts and collections of them.
    """
    import torch

    try:
        torch.load(io.BytesIO(content.getvalue()), weights_only=True)
    except Exception as error:
        reason = " ".join(str(error).split("\n")[0].split())
        raise UnsafePickle(f"{where} was not read, it holds more than numbers and texts: {reason}") from error
    return content
