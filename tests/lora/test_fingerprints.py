"""A tensor that changed anywhere has another fingerprint, of either kind; that of a device is made on the device."""

from __future__ import annotations

import struct

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_s3t.lora.fingerprints import ON_DEVICE, ON_HOST, chunk_sums, fingerprints, odd_multipliers

CPU, WORDS = torch.device("cpu"), 4
KINDS = (ON_HOST, ON_DEVICE)
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int8, torch.bool)


def fingerprint(tensor: torch.Tensor, kind: str = ON_DEVICE, **settings) -> str:
    """Of one of the kinds, wherever the tensor lies, with tiny chunks."""
    return fingerprints({"it": tensor}, {"it": kind}, **{"chunk_words": WORDS} | settings)["it"]


def numbers(count: int, seed: int = 0) -> torch.Tensor:
    """Random bytes."""
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


# The sum


def test_multipliers_are_those_of_splitmix64_and_odd():
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]  # of seed 0
    found = odd_multipliers(1000, 0, CPU)
    assert [number % (1 << 64) for number in found[:4].tolist()] == [number | 1 for number in published]
    assert bool((found % 2 != 0).all()) and len(set(found.tolist())) == 1000
    other = odd_multipliers(1000, (1 << 64) - 1, CPU)
    assert bool((other % 2 != 0).all()) and not set(other.tolist()) & set(found[:10].tolist())


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 16, 17, 32, 51, 64])
def test_a_sum_is_the_formula(count):
    data, multipliers = numbers(count), odd_multipliers(WORDS, 7, CPU)
    padded = bytes(data.tolist()) + bytes(-count % 4)
    words = struct.unpack(f"<{len(padded) // 4}i", padded)
    expected = [
        sum(word * number for word, number in zip(words[begin : begin + WORDS], multipliers.tolist(), strict=False))
        for begin in range(0, max(len(words), 1), WORDS)
    ]
    found = [int(one) for one in chunk_sums(data, multipliers)]
    assert [one % (1 << 64) for one in found] == [one % (1 << 64) for one in expected]


@pytest.mark.parametrize("kind", KINDS)
def test_any_single_bit_is_seen(kind):
    """Chunks have 16 bytes here: among them are first and last bytes, borders of words and chunks, and the tail."""
    data = numbers(3 * 16 + 7)
    whole = fingerprint(data, kind)
    found = set()
    for place in range(len(data)):
        for bit in range(8):
            changed = data.clone()
            changed[place] ^= 1 << bit
            found.add(fingerprint(changed, kind))
    assert len(found) == 8 * len(data) and whole not in found
    assert fingerprint(data.clone(), kind) == whole


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_words_and_of_chunks_is_seen(kind):
    words = numbers(4 * WORDS * 3).view(torch.int32).view(3, WORDS)
    found = {fingerprint(words, kind)}
    found.add(fingerprint(words[[1, 0, 2]], kind))
    found.add(fingerprint(words[:, [1, 0, 2, 3]], kind))
    found.add(fingerprint(words[:, [3, 1, 2, 0]], kind))
    assert len(found) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_dtype_and_shape_are_seen(kind):
    zeros = torch.zeros(6, dtype=torch.int32)
    like = [zeros, zeros[:5], zeros.view(2, 3), zeros.view(3, 2), zeros.view(torch.float32), zeros.view(torch.uint8)]
    like += [zeros[:0], zeros[:0].view(0, 2), zeros[0], zeros[:1]]
    assert len({fingerprint(value, kind) for value in like}) == len(like)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_a_tensor_holds_counts_and_not_how_it_lies(dtype, kind):
    plain = (torch.arange(7 * 5) % 2).to(dtype).view(7, 5)
    whole = fingerprint(plain, kind)
    assert fingerprint(plain.t().contiguous().t(), kind) == whole
    inside = torch.zeros(7 * 5 + 1, dtype=dtype)[1:].view(7, 5).copy_(plain)  # may begin between two words
    assert fingerprint(inside, kind) == whole
    assert fingerprint(torch.nn.Parameter(plain, requires_grad=plain.is_floating_point()), kind) == whole
    changed = plain.clone()
    changed[6, 4] = 1 - changed[6, 4].int()
    assert fingerprint(changed, kind) != whole


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_gives_other_fingerprints(kind):
    data = numbers(100)
    assert len({fingerprint(data, kind, seed=seed) for seed in (0, 1, (1 << 64) - 1)}) == 3


# Where it is made


class Device(TorchDispatchMode):
    """Counts what leaves the device. A tensor that is there has no numbers: in place of a copy there are zeros."""

    def __init__(self):
        super().__init__()
        self.to_host: list[int] = []
        self.sums = self.largest = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        assert operation is not torch.ops.aten._local_scalar_dense.default
        if operation is torch.ops.aten._to_copy.default and kwargs.get("device") == CPU:
            self.to_host.append(args[0].numel())
            return torch.zeros(args[0].shape, dtype=args[0].dtype)
        made = operation(*args, **kwargs)
        self.sums += operation is torch.ops.aten.sum.default
        self.largest = max(self.largest, made.nbytes if isinstance(made, torch.Tensor) else 0)
        return made


def test_numbers_of_a_device_stay_there_and_all_sums_come_in_one_copy():
    """`meta` is a device that is not the CPU, and no tensor of the CPU may be mixed with its own."""
    shapes = [(1000, 40), (3,), (), (0, 5), (17, 3)]
    tensors = {str(shape): torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes}
    with Device() as device:
        found = fingerprints(tensors, chunk_words=1000)
    assert device.to_host == [20 + 4]  # the sums of the chunks, 20 of the first
    assert all(text.startswith(f"{ON_DEVICE} torch.bfloat16 ") for text in found.values())
    assert device.largest <= 1000 * 40 * 2  # that is the first, seen as bytes; what is made is of a chunk's size
    with Device() as device:
        fingerprints({**tensors, "more": torch.empty(9, device="meta")}, chunk_words=1000)
    assert device.to_host == [20 + 5]


def test_what_is_tied_is_read_once_and_has_all_its_names():
    weight = torch.randn(20, 4)
    tied = {"one": weight, "other": torch.nn.Parameter(weight), "part": weight[:10], "turned": weight.view(4, 20)}
    with Device() as device:
        found = fingerprints(tied, dict.fromkeys(tied, ON_DEVICE))
    assert device.sums == 3
    assert found["one"] == found["other"] and len(set(found.values())) == 3
