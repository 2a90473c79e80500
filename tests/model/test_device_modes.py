"""The mode that refuses what would wait for a device."""

from collections.abc import Callable

import pytest
import torch

from tests.model.device_modes import Refused, fake_cuda

Code = Callable[[torch.Tensor], object]

WAITING: dict[str, Code] = {
    "item": lambda x: x[0, 0].item(),
    "tolist": lambda x: x.tolist(),
    "if": lambda x: 1 if x.any() else 2,
    "equal": lambda x: torch.equal(x, x),
    "nonzero": lambda x: x.nonzero(),
    "read by a mask": lambda x: x[x > 0],
    "write by a mask": lambda x: x.__setitem__(x > 0, 0.0),
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "repeat_interleave": lambda x: torch.repeat_interleave(x[0].long()),
    "copy to the host": lambda x: x.cpu(),
    "copy to a host tensor": lambda x: torch.empty(2, 3).copy_(x),
    "copy from a host tensor": lambda x: x.copy_(torch.ones(2, 3)),
    "move to the device": lambda x: torch.ones(2).to(x.device),
    "mix": lambda x: x + torch.ones(2, 3),
    "number on the host": lambda x: x * torch.ones(()),
}


@pytest.mark.parametrize("code", WAITING.values(), ids=WAITING.keys())
def test_code_that_waits_for_the_device_is_refused(code: Code) -> None:
    with fake_cuda():
        x = torch.empty(2, 3, device="cuda")
        with pytest.raises(Refused):
            code(x)


def test_code_that_stays_on_the_device_runs() -> None:
    with fake_cuda() as mode:
        x = torch.empty(2, 3, device="cuda")
        rows = torch.empty(5, dtype=torch.int64, device="cuda")
        x[rows] += 1
        y = torch.where(x > 0, x.index_select(0, rows[:2]), 0.0).softmax(-1).sort(stable=True)
        assert y.values.device.type == "cuda"
    assert {"aten::index", "aten::index_put_", "aten::where"} <= {
        name.partition(".")[0] for name in mode.ops
    }
