"""What is spilled comes back as it was, and memory that several values share stays shared."""

from __future__ import annotations

import os
import tempfile

import pytest
import torch
from torch import Tensor

from entprune.errors import OutputError
from entprune.spill import SpillingStore, Values

SPILLED = SpillingStore(limit=0)


def kept(store: SpillingStore, *results: object) -> Values:
    values = Values()
    for result in results:
        store.step().put(values, result)
    return values


TENSORS = {
    "plain": torch.randn(3, 4, 5, 6),
    "channels last": torch.randn(3, 4, 5, 6).contiguous(memory_format=torch.channels_last),
    "rows of a larger one": torch.randn(6, 4)[1:4],
    "transposed": torch.randn(6, 8).T,
    "bfloat16": torch.randn(3, 4).to(torch.bfloat16),
    "float64": torch.randn(3, 4, dtype=torch.float64),
    "bool": torch.randn(7) > 0,
    "int64": torch.arange(5),
    "scalar": torch.tensor(3.0),
    "empty": torch.randn(0, 4),
}


@pytest.mark.parametrize("tensor", TENSORS.values(), ids=TENSORS)
def test_tensors_come_back_with_values_and_strides(tensor: Tensor) -> None:
    again = kept(SPILLED, torch.zeros(5), tensor)[1]
    assert again.dtype == tensor.dtype
    assert again.stride() == tensor.stride()
    assert torch.equal(again, tensor)
    assert tensor.numel() == 0 or again.data_ptr() != tensor.data_ptr()


def test_parts_of_larger_tensors_come_back_whole() -> None:
    wide = torch.randn(4, 6)
    values = kept(SPILLED, wide[:, ::2], wide[:1].expand(3, 6))
    assert torch.equal(values[0], wide[:, ::2])
    assert torch.equal(values[1], wide[:1].expand(3, 6))


def test_structures_are_kept_and_shapes_stay_shapes() -> None:
    pair = (torch.ones(2), [torch.zeros(3), 5])
    values = kept(SPILLED, pair, torch.Size((2, 3)), 7)
    first, (second, number) = values[0]
    assert torch.equal(first, pair[0])
    assert torch.equal(second, torch.zeros(3))
    assert number == 5
    assert values[1].numel() == 6
    assert values[2] == 7
    assert len(values) == len(list(values)) == 3


def test_values_are_held_until_the_limit_and_again_after_a_release() -> None:
    store, size = SpillingStore(limit=100), 40
    parts = [torch.full((10,), float(number)) for number in range(3)]
    assert parts[0].nbytes == size
    values = kept(store, *parts)
    assert [values[number].data_ptr() == part.data_ptr() for number, part in enumerate(parts)] == [True, True, False]
    assert torch.equal(values[2], parts[2])
    store.release(values)
    later = torch.zeros(25)
    assert kept(store, later)[0].data_ptr() == later.data_ptr()


def test_views_of_held_memory_take_no_room() -> None:
    store, tensor = SpillingStore(limit=40), torch.randn(10)
    values = kept(store, tensor)
    views = kept(store, tensor.view(5, 2), tensor)
    assert views[0].data_ptr() == views[1].data_ptr() == tensor.data_ptr()
    store.release(values)
    other = torch.zeros(1)
    assert kept(store, other)[0].data_ptr() != other.data_ptr()  # the views still need it
    store.release(views)
    assert kept(store, other)[0].data_ptr() == other.data_ptr()


def test_change_in_place_is_seen_by_all_who_share_the_memory() -> None:
    source = kept(SPILLED, torch.arange(-3.0, 3.0))
    step, matrix, rectified = SPILLED.step(), Values(), Values()
    step.put(matrix, step.get(source, 0).view(2, 3))
    step = SPILLED.step()
    step.put(rectified, step.get(matrix, 0).relu_())
    assert source[0].tolist() == [0, 0, 0, 0, 1, 2]
    assert matrix[0].tolist() == rectified[0].tolist() == [[0, 0, 0], [0, 1, 2]]


def test_what_one_operation_reads_twice_is_one_memory() -> None:
    source = kept(SPILLED, torch.arange(4.0))
    step = SPILLED.step()
    assert step.get(source, 0).data_ptr() == step.get(source, 0).data_ptr()


def test_values_outlive_those_whose_memory_they_share() -> None:
    source = kept(SPILLED, torch.arange(4.0))
    step, view = SPILLED.step(), Values()
    step.put(view, step.get(source, 0)[1:])
    SPILLED.release(source)
    del source, step
    assert view[0].tolist() == [1, 2, 3]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")  # noqa: PTH110 -- a device
def test_no_room_gets_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda: open("/dev/full", "wb+"))  # noqa: PTH123, SIM115
    with pytest.raises(OutputError, match=r"expected room for .* got 'No space left on device'; let TMPDIR"):
        kept(SPILLED, torch.zeros(3))
