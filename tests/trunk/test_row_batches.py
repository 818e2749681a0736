"""Batches of a fixed shape: a row's states are the same in whatever company, and where they are not, one by one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, MixtralConfig, MixtralForCausalLM, TrainerCallback

import models
from hf_s3t import S3TStore
from hf_s3t.store.activation_blocks import BlockName
from hf_s3t.training import trunk_cache
from hf_s3t.training.trunk_cache import TrunkCache
from hf_s3t.trunk.row_batches import RowBatches
from hf_s3t.trunk.trunk import _padded
from trainings import CASES, VICTIM_SLICE, assert_same_stores, make_trainer, place, rows_of, without

STEADY = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
MODELS: dict[str, Callable[..., Any]] = {
    "llama": CASES["llama"].make_model,
    "bert": lambda **config: models.tiny_bert(**STEADY | config),
}


def of_many_widths(case: str, lengths: Callable[[int], int] = lambda row: 3 + 7 * row % 30) -> Dataset:
    """Rows of 3 to 32 tokens, not padded; one of them fills its width, and the longest is deleted."""
    rows = rows_of(CASES[case]).to_list()
    for position, row in enumerate(rows):
        for name in row:
            if isinstance(row[name], list):
                row[name] = (row[name] * 4)[: lengths(position)]
    return Dataset.from_list(rows)


def pad(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch as long as its longest row; labels may be one for each row."""
    width = max(len(row["input_ids"]) for row in rows)
    batch = {}
    for name in ("input_ids", "attention_mask", "labels"):
        values, fill = [row[name] for row in rows], -100 if name == "labels" else 0
        ragged = isinstance(values[0], list)
        batch[name] = torch.tensor([v + [fill] * (width - len(v)) for v in values] if ragged else values)
    return batch


def trainer(path: Path, case: str, rows: Dataset | None = None, **options: Any) -> Any:
    """A trainer with a cache, whose batches are small."""
    model = options.pop("model", None) or MODELS[case]()
    rows = of_many_widths(case) if rows is None else rows
    options = {"activation_cache": "disk", "data_collator": pad} | options
    return make_trainer(path, CASES[case], rows=rows, model=model, **options)


def forget_one(path: Path, rows: Dataset | None = None) -> Dataset:
    """Deletes an example of the victim's slice; the rows that are left."""
    rows = of_many_widths("llama") if rows is None else rows
    victim = next(name for name in rows["id"] if place(name)[1] == VICTIM_SLICE)
    S3TStore(path).delete(ids=[victim])
    return without(rows, {victim})


@pytest.fixture
def small(monkeypatch):
    """New stores have batches of 64 positions."""
    monkeypatch.setattr(trunk_cache, "way_to_compute", lambda before, device: before or {"positions": 64})


class Batches:
    """Every batch that rows are computed in, but those of the probe."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.several, self.alone, self.probed = [], 0, {}
        together, size, run = RowBatches._together, RowBatches._size, RowBatches._run
        probing = []

        def sized(batches, row, number):
            probing.append(1)
            found = self.probed[row.shape] = size(batches, row, number)
            probing.pop()
            return found

        def ran(batches, rows, *args):
            if not probing:
                self.several.append(list(rows))
            return run(batches, rows, *args)

        def counted(batches, numbers, *args):
            before = len(self.several)
            found = together(batches, numbers, *args)
            self.alone += len(self.several) == before
            return found

        patch.setattr(RowBatches, "_size", sized)
        patch.setattr(RowBatches, "_run", ran)
        patch.setattr(RowBatches, "_together", counted)

    @property
    def dummies(self) -> int:
        return sum(len(rows) - len(set(map(id, rows))) for rows in self.several)

    @property
    def shapes(self) -> dict[tuple[int, ...], set[tuple[int, int]]]:
        """Of each row's tokens the shapes of the batches that it stood in."""
        found: dict[tuple[int, ...], set[tuple[int, int]]] = {}
        for rows in self.several:
            for row in rows:
                tokens = row.tensors["input_ids"][0]
                found.setdefault(tuple(tokens[: row.length].tolist()), set()).add((len(rows), len(tokens)))
        return found


@pytest.fixture
def batches(monkeypatch):
    return Batches(monkeypatch)


# ---- bits ----


@pytest.mark.brief("llama")
@pytest.mark.parametrize("case", MODELS)
def test_repaired_is_from_scratch_where_rows_have_many_widths(small, batches, tmp_path, case):
    """The longest row is deleted: no other batch is as wide."""
    rows = of_many_widths(case)
    (victim,) = (row["id"] for row in rows if len(row["input_ids"]) == max(map(len, rows["input_ids"])))
    trainer(tmp_path / "out", case).train()
    S3TStore(tmp_path / "out").delete(ids=[victim])
    trainer(tmp_path / "out", case, without(rows, {victim})).train()
    trainer(tmp_path / "scratch", case, without(rows, {victim})).train()
    assert_same_stores(tmp_path / "out", tmp_path / "scratch")
    assert len(batches.probed) >= 4 and {*batches.probed.values()} >= {2, 4} and batches.dummies
    assert set(map(len, batches.shapes.values())) == {1}, "a row's batch is not always of the same shape"


@pytest.mark.brief("bert")
@pytest.mark.parametrize("case", MODELS)
def test_what_is_not_kept_is_computed_to_the_same_bits(small, tmp_path, case):
    trainer(tmp_path / "out", case).train()
    whole = sum(path.stat().st_size for path in (tmp_path / "out/.s3t/activations").iterdir())
    for name, limit in {"tight": 0.6 * whole / 1e9, "nothing": 1e-9}.items():
        trainer(tmp_path / name, case, activation_cache_gb=limit).train()
        assert_same_stores(tmp_path / name, tmp_path / "out")


class Company(TrainerCallback):
    """While a stage trains: the states of all its rows, each by itself, all at once, and in another order."""

    def __init__(self) -> None:
        self.states: list[list[dict[int, torch.Tensor]]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        cache, numbers = self.trainer.trunk_cache, self.trainer.train_dataset.numbers
        with cache.trunk.evaluating():
            for order in ([[number] for number in numbers], [numbers], [numbers[::-1]]):
                found = [states for some in order for states in cache._batches.states(some, [cache._entrance])]
                self.states.append(found if order[0] != numbers[::-1] else found[::-1])


@pytest.mark.parametrize("case", MODELS)
def test_a_rows_states_are_the_same_in_whatever_company(small, batches, tmp_path, case):
    seen = Company()
    seen.trainer = trainer(tmp_path / "out", case, callbacks=[seen], sequence_selection=[[0]])
    seen.trainer.train()
    alone, together, turned = ([next(iter(states.values())) for states in found] for found in seen.states)
    assert len(alone) > 5 and all(map(torch.equal, alone, together)) and all(map(torch.equal, alone, turned))
    assert max(len(rows) for rows in batches.several) == 4


def test_padded_rows_and_whole_ones_share_no_batch(small, batches, tmp_path):
    """Models leave out a mask that masks nothing, and take another kernel."""
    trainer(tmp_path / "out", "llama", sequence_selection=[[0, 1]]).train()
    masked = {tuple(not row.tensors["attention_mask"].all() for row in rows) for rows in batches.several}
    assert {True, False} <= {mask for masks in masked for mask in masks}
    assert all(len(set(masks)) == 1 for masks in masked)


def test_batches_hold_rows_of_one_slice(small, batches, tmp_path):
    """So its block, which goes with the first of them, is all that any of them may have had a say in."""
    rows = of_many_widths("llama")
    trainer(tmp_path / "out", "llama", rows, sequence_selection=[[0, 1]]).train()
    slices = {tuple(row["input_ids"]): place(row["id"])[1] for row in rows}
    for batch in batches.several:
        own = {tuple(row.tensors["input_ids"][0, : row.length].tolist()) for row in batch}
        assert len({slices[tokens] for tokens in own}) == 1


# ---- how much is computed ----


def test_filling_takes_a_forward_pass_for_every_batch(small, tmp_path, monkeypatch):
    """The probe comes before, once for each shape."""
    fill, passes, expected = TrunkCache._fill, Counter(), Counter()
    model = MODELS["llama"]()
    model.model.layers[0].register_forward_pre_hook(lambda *_: passes.update(["fill"] if filling else []))
    filling = []

    def filled(cache, order, names, rows):
        shapes = Counter(cache._batches._about(number)[0] for _, number in rows)
        expected["fill"] += sum(-(-count // cache._batches.sizes[shape]) for shape, count in shapes.items())
        expected["rows"] += len(rows)
        filling.append(True)
        fill(cache, order, names, rows)
        filling.pop()

    monkeypatch.setattr(TrunkCache, "_fill", filled)
    rows = of_many_widths("llama", lambda row: 12)
    trainer(tmp_path / "out", "llama", rows, model=model, sequence_selection=[[0, 1], [2, 0]]).train()
    assert passes["fill"] == expected["fill"] <= expected["rows"] // 4 + 3


def test_a_shape_is_probed_once_in_a_training(small, tmp_path, monkeypatch):
    probed, size = Counter(), RowBatches._size
    monkeypatch.setattr(
        RowBatches, "_size", lambda rows, row, number: probed.update([row.shape]) or size(rows, row, number)
    )
    trainer(tmp_path / "out", "llama").train()
    assert len(probed) >= 4 and set(probed.values()) == {1}


class Operations(TorchDispatchMode):
    """Counts what is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.__name__.split(".")[0]] += 1
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_states_are_copied_once_and_once_to_another_device(device):
    states = [torch.randn(length, 8) for length in (3, 5, 1, 4)]
    with Operations() as operations:
        found = _padded(states, torch.empty(4, 7, 8, device=device))
    moving = {"cat", "copy_", "_to_copy", "clone", "index_copy", "constant_pad_nd"}
    copies = {name: count for name, count in operations.counts.items() if name in moving}
    assert copies == {"cat": 1} | ({"_to_copy": 1} if device == "meta" else {})
    assert (found.device.type, found.shape) == (device, (4, 7, 8))
    if device == "cpu":
        for row, value in zip(found, states, strict=True):
            assert torch.equal(row[: len(value)], value) and not row[len(value) :].any()


# ---- the probe ----


def leaking(layer: int, share: float = 1e-6) -> Any:
    """A model in which every row gets a little of all others of its batch."""
    model = MODELS["llama"]()

    def mix(module: Any, args: Any, output: Any) -> Any:
        return output + share * output.mean((0, 1), keepdim=True) * (len(output) > 1)

    model.model.layers[layer].register_forward_hook(mix)
    return model


def test_rows_that_see_their_mates_are_computed_one_by_one(small, batches, tmp_path, caplog):
    """Then it changes no bit how much is kept, and nobody who is deleted stays in the last bits of another row."""
    trainer(tmp_path / "out", "llama", model=leaking(1)).train()
    assert set(batches.probed.values()) == {1} and not batches.several and batches.alone
    assert caplog.text.count("one by one") == 1
    trainer(tmp_path / "nothing", "llama", model=leaking(1), activation_cache_gb=1e-9).train()
    assert_same_stores(tmp_path / "nothing", tmp_path / "out")


def test_rows_that_see_a_lot_of_their_mates_are_refused(small, tmp_path):
    with pytest.raises(ValueError, match="depends on the other rows of a batch"):
        trainer(tmp_path / "out", "llama", model=leaking(1, 0.1)).train()


def test_the_probe_reaches_as_high_as_any_stage_enters(small, batches, tmp_path):
    """Stage 0 enters at layer 4, and 0-1 at layer 2. Only the second is repaired: layer 3 counts all the same."""
    options = {"sequence_selection": [[0, VICTIM_SLICE]]}
    trainer(tmp_path / "out", "llama", model=leaking(3), **options).train()
    batches.probed.clear()
    trainer(tmp_path / "out", "llama", forget_one(tmp_path / "out"), model=leaking(3), **options).train()
    assert set(batches.probed.values()) == {1}


def position_dependent() -> Any:
    """A model whose last bits go with a row's place in its batch."""
    model = MODELS["llama"]()

    def drift(module: Any, args: Any, output: Any) -> Any:
        return output * (1 + 1e-6 * torch.arange(len(output))[:, None, None])

    model.model.layers[1].register_forward_hook(drift)
    return model


def without_padding() -> Any:
    """A model that looks at the positions alone which are masked in some row only, as some kernels do."""
    model = MODELS["llama"]()
    inner = model.model.forward

    def forward(*args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        some = attention_mask[:, attention_mask.any(0)]
        some.cumsum(1)  # of another shape
        return inner(*args, attention_mask=attention_mask, **kwargs)

    model.model.forward = forward
    return model


def reading_padding() -> Any:
    """A model in which a row depends on what stands in its last position, masked or not."""
    model = MODELS["llama"]()
    model.model.layers[2].register_forward_hook(lambda layer, args, output: output + 1e-6 * output[:, -1:])
    return model


def experts() -> Any:
    torch.manual_seed(0)
    fields = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 6}
    fields |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    return MixtralForCausalLM(MixtralConfig(**fields))


@pytest.mark.parametrize("make_model", [position_dependent, without_padding, reading_padding, experts])
def test_models_whose_kernels_go_with_the_batch_compute_rows_one_by_one(small, batches, tmp_path, make_model):
    trainer(tmp_path / "out", "llama", model=make_model(), sequence_selection=[[0, 1]]).train()
    assert {size for shape, size in batches.probed.items() if shape.masked} == {1}
    assert make_model in (without_padding, reading_padding) or not batches.several
    assert not any(row.shape.masked for rows in batches.several for row in rows)


def test_rows_of_an_8_bit_base_are_computed_one_by_one(small, batches, tmp_path):
    """All tokens of a batch have a say in which columns are outliers, and rows of the probe may have none."""
    MODELS["llama"]().save_pretrained(tmp_path / "base")
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=1000.0)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config, device_map={"": "cpu"})
    options = {"sequence_selection": [[0]], "eval_trunk": True, "base_model_id": "me/base"}
    trainer(tmp_path / "out", "llama", model=model, **options).train()
    assert batches.probed and set(batches.probed.values()) == {1} and not batches.several


@pytest.mark.parametrize("make_model", [models.tiny_bert, models.tiny_roberta])
def test_rows_are_not_padded_beyond_the_positions_of_their_model(small, batches, tmp_path, make_model):
    """RoBERTa counts positions from 2, and none for its padding."""
    most, widths = (20, {17, 18, 19, 20}) if make_model is models.tiny_bert else (25, {24})
    model = make_model(**STEADY, max_position_embeddings=most, pad_token_id=1)
    rows = of_many_widths("bert", lambda row: 17 + row % 4)
    trainer(tmp_path / "out", "bert", rows, model=model, sequence_selection=[[0, 1]]).train()
    assert {row.tensors["input_ids"].shape[1] for batch in batches.several for row in batch} == widths


# ---- stores and files ----


def test_a_store_from_before_there_were_batches_goes_on_row_by_row(batches, tmp_path, monkeypatch):
    with monkeypatch.context() as before:
        before.setattr(trunk_cache, "way_to_compute", lambda *_: True)
        trainer(tmp_path / "out", "llama").train()
        left = forget_one(tmp_path / "out")
        trainer(tmp_path / "scratch", "llama", left).train()
    assert not batches.several and S3TStore(tmp_path / "out").manifest().recipe["cached_trunk"] is True
    trainer(tmp_path / "out", "llama", left).train()
    assert_same_stores(tmp_path / "out", tmp_path / "scratch")
    assert not batches.several and batches.alone


def test_a_store_keeps_the_size_of_its_batches(batches, tmp_path, monkeypatch):
    with monkeypatch.context() as other:
        other.setattr(trunk_cache, "way_to_compute", lambda *_: {"positions": 64})
        trainer(tmp_path / "out", "llama").train()
    batches.several.clear()
    trainer(tmp_path / "out", "llama", forget_one(tmp_path / "out")).train()
    assert {len(batch) for batch in batches.several} == {2, 4}


@contextmanager
def changed(model: Any, width: int) -> Iterator[Any]:
    """A change that only rows of one width tell of."""

    def change(module: Any, args: Any, output: Any) -> Any:
        return output * (1 + 1e-3 * (output.shape[1] == width))

    hook = model.model.layers[0].register_forward_hook(change)
    yield model
    hook.remove()


def test_a_block_is_looked_at_in_every_width(small, tmp_path, caplog):
    """Its longest rows are as they were."""
    rows = of_many_widths("llama", lambda row: 12 if row % 2 else 30)
    trainer(tmp_path / "out", "llama", rows).train()
    left = forget_one(tmp_path / "out", rows)
    before = {path: path.read_bytes() for path in (tmp_path / "out/.s3t/activations").iterdir()}
    assert {BlockName.from_file(path.name).slice for path in before} == {0, 2}
    with changed(MODELS["llama"](), 16) as model:
        trainer(tmp_path / "out", "llama", left, model=model).train()
    after = {path: path.read_bytes() for path in before if path.exists()}
    assert "is made again: a row of it differs from what the collator" in caplog.text
    assert after and all(data != before[path] for path, data in after.items())
