"""What the data sheets of GPUs say: the peak that shares of it are taken of, and their memory."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """Peak of dense bfloat16 matrix products, operations a second, and memory, bytes (NVIDIA's data sheets)."""

    peak: float
    memory: float


GPUS = {"H100": Gpu(989e12, 80e9), "H200": Gpu(989e12, 141e9), "B200": Gpu(2250e12, 180e9)}
OTHERS = ("PCIe", "NVL")  # of the same names, with other clocks


def data_sheet(name: str) -> Gpu | None:
    """The GPU of a device's name ("NVIDIA H100 80GB HBM3"); None where no sheet is known here."""
    if any(other in name for other in OTHERS):
        return None
    return next((gpu for short, gpu in GPUS.items() if short in name.split()), None)
