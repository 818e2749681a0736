"""Whether a tensor is still what it was, found out where it lies.

sha256 is computed on the host, in one thread: of a base of 13 GB that takes longer than a stage. What is compared with
itself, in one process, needs no cryptography. On the CPU a fingerprint is xxh3 of the bytes; on any other device it is
a sum, computed there, and one number for each 16 MB comes to the host:

```
bytes of a tensor    |  w0   w1   w2   w3  |  w4   w5   w6   w7  |  w8   w9   0 |    32-bit words, in chunks
odd multipliers      |  m0   m1   m2   m3  |  m0   m1   m2   m3  |  m0   m1  m2 |    64 bits each
to the host          |   sum of w * m      |   sum of w * m      |  sum of w * m|    modulo 2^64
```

That is multilinear hashing (Carter & Wegman, "Universal classes of hash functions", 1979; Lemire & Kaser, "Strongly
universal string hashing is fast", 2014, section 3). A change of one word of a chunk is always seen: its difference is
not 0 and below 2^32, and times an odd number that is not 0 modulo 2^64. Any other change goes unseen with a chance of
at most 2^-32: with all multipliers but one given, that of a word whose difference is 2^k times an odd number (k < 32),
the sum of all differences is 0 for at most 2^k of the 2^63 odd multipliers. Where several chunks changed, all of them
would have to go unseen.

The chance is over the multipliers: it holds for changes that do not depend on them. Whoever knows the seed can make
two tensors of one fingerprint. Where somebody else may choose the tensors, take a seed that they cannot know, or
[`tensor_digest`].
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import xxhash

CHUNK_WORDS = 1 << 22
"""Words that are summed at a time: 16 MB, for which a device needs about 100 MB to work with."""

ON_HOST, ON_DEVICE = "xxh3", "multilinear"
"""The kinds of fingerprints: each begins with its own."""


def fingerprints(
    tensors: Mapping[str, torch.Tensor],
    before: Mapping[str, str] | None = None,
    seed: int = 0,
    chunk_words: int = CHUNK_WORDS,
) -> dict[str, str]:
    """Fingerprints of tensors, each by its kind, dtype, shape and bytes. None is copied to the host for it.

    Tensors that are tied are read once, and each has its name in what is returned.

    Args:
        tensors (`dict[str, torch.Tensor]`): what to look at, by name.
        before (`dict[str, str]`, *optional*): earlier fingerprints to compare with. A tensor that moved to another
            device since gets the kind that it had, wherever it lies now, so that the two can be compared.
        seed (`int`, *optional*, defaults to 0): of 64 bits. Those of two seeds cannot be compared.
        chunk_words (`int`, *optional*, defaults to `CHUNK_WORDS`): those of two sizes cannot be compared.

    Example:

        ```py
        >>> one, other = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.0])
        >>> found = fingerprints({"one": one, "same": one.clone(), "other": other})
        >>> found["one"] == found["same"] != found["other"]
        True

        ```
    """
    kinds = {name: _kind(value, (before or {}).get(name)) for name, value in tensors.items()}
    places = {name: (kinds[name], *_place(value)) for name, value in tensors.items()}
    once = {place: tensors[name] for name, place in places.items()}
    found = {place: _of_bytes(_bytes(value), seed) for place, value in once.items() if place[0] == ON_HOST}
    for device in {value.device for value in once.values()}:
        here = {place: value for place, value in once.items() if place[:2] == (ON_DEVICE, device)}
        found |= zip(here, _on_device(list(here.values()), device, seed, chunk_words), strict=True)
    return {
        name: f"{kinds[name]} {value.dtype} {tuple(value.shape)} {found[places[name]]}"
        for name, value in tensors.items()
    }


def _kind(tensor: torch.Tensor, before: str | None) -> str:
    if before is not None:
        return before.split()[0]
    return ON_HOST if tensor.device.type == "cpu" else ON_DEVICE


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    """What two tensors have in common that are one."""
    begin = tensor.untyped_storage().data_ptr(), tensor.storage_offset()
    return (tensor.device, *begin, tensor.dtype, tuple(tensor.shape), tensor.stride())


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _of_bytes(data: torch.Tensor, seed: int) -> str:
    array: Any = data.cpu().numpy()
    return xxhash.xxh3_128_hexdigest(array, seed=seed)


def _on_device(tensors: Sequence[torch.Tensor], device: torch.device, seed: int, chunk_words: int) -> Iterator[str]:
    """The sums of all tensors of one device, which come to the host in one copy, as a text for each."""
    if not tensors:
        return
    longest = max(-(-value.numel() * value.element_size() // 4) for value in tensors)
    multipliers = odd_multipliers(max(min(chunk_words, longest), 1), seed, device)
    sums = [chunk_sums(_bytes(tensor), multipliers) for tensor in tensors]
    numbers = iter(torch.stack([one for of_tensor in sums for one in of_tensor]).tolist())
    for of_tensor in sums:
        joined = struct.pack(f"<{len(of_tensor)}q", *(next(numbers) for _ in of_tensor))
        yield hashlib.sha256(joined).hexdigest()


def chunk_sums(data: torch.Tensor, multipliers: torch.Tensor) -> list[torch.Tensor]:
    """Of each chunk of some bytes the sum of its words times their multipliers, modulo 2^64, where the bytes lie."""
    sums = []
    for chunk in data.split(4 * len(multipliers)):
        if chunk.numel() % 4 or chunk.storage_offset() % 4:  # a copy begins where a word may
            chunk = torch.cat([chunk, chunk.new_zeros(-chunk.numel() % 4)])
        words = chunk.view(torch.int32)
        sums.append((multipliers[: len(words)] * words).sum())
    return sums


def odd_multipliers(count: int, seed: int, device: torch.device) -> torch.Tensor:
    """Odd numbers of 64 bits: the outputs of splitmix64, made on the device, with their lowest bit set.

    Source: Steele, Lea & Flood, "Fast splittable pseudorandom number generators", 2014, with the mixer of Stafford
    (variant 13) that its Java class has.
    """
    state = torch.arange(1, count + 1, device=device) * _signed(0x9E3779B97F4A7C15) + _signed(seed)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        state = (state ^ _shifted(state, shift)) * _signed(factor)
    return (state ^ _shifted(state, 31)) | 1


def _signed(number: int) -> int:
    """64 bits as torch writes them."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


def _shifted(numbers: torch.Tensor, by: int) -> torch.Tensor:
    """To the right, with zeros from the left."""
    return (numbers >> by) & ((1 << (64 - by)) - 1)
