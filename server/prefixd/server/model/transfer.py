"""Numbers of the host that are copied to the device."""

from collections.abc import Sequence

import numpy as np
import torch


def on_device(values: "Sequence[int] | np.ndarray", device: torch.device) -> torch.Tensor:
    """An int64 tensor of these values on the device. Does not wait for the device: a copy from
    memory that is not pinned would."""
    tensor = torch.from_numpy(np.asarray(values, dtype=np.int64))
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
