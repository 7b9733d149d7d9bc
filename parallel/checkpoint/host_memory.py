"""Host memory that a GPU's tensors are copied to for a save: that of their numbers, and little more."""

import torch
from torch import Tensor

BLOCK_BYTES = 2**28  # of memory that tensors share; larger ones open larger blocks
ALIGNED_BYTES = 512  # where a tensor begins, as in PyTorch's own memory of a GPU


def host_copies(tensors: list[Tensor], pin: bool) -> list[Tensor]:
    """Tensors of the host, of the shapes and types of contiguous ones, not filled yet.

    PyTorch rounds pinned memory up to a power of two and keeps it for the next time: each tensor with memory of its own
    would hold up to twice its bytes. Blocks of such sizes are filled with many, the largest first.
    """
    blocks: list[tuple[int, int, list[int]]] = []  # its bytes, those that are taken, whose they are
    sizes = [-(-tensor.nbytes // ALIGNED_BYTES) * ALIGNED_BYTES for tensor in tensors]
    for number in sorted(range(len(tensors)), key=lambda number: -sizes[number]):
        size = sizes[number]
        fits = (place for place, (room, taken, _) in enumerate(blocks) if taken + size <= room)
        place = next(fits, len(blocks))
        if place == len(blocks):
            blocks.append((max(BLOCK_BYTES, 1 << (size - 1).bit_length() if size else 0), 0, []))
        room, taken, members = blocks[place]
        blocks[place] = (room, taken + size, [*members, number])
    copies: dict[int, Tensor] = {}
    for _, taken, members in blocks:
        block, begin = torch.empty(taken, dtype=torch.uint8, pin_memory=pin), 0
        for number in members:
            tensor = tensors[number]
            copies[number] = block[begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            begin += sizes[number]
    return [copies[number] for number in range(len(tensors))]
