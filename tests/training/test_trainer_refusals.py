"""What a trainer refuses, before it has changed anything, and what it takes although it differs from the store."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from transformers import AutoTokenizer, BertForSequenceClassification, BertModel, LlamaForCausalLM, TrainingArguments

import models
from hf_s3t import DatasetError, RecipeError, S3TStore, S3TTrainer, StateError, StoreError, StoreLockedError
from hf_s3t.training.refusals import REFUSED
from stores import index_of, records_of, tree
from trainers import (
    BASES,
    KEY,
    ROWS,
    Recorder,
    artefacts,
    batch,
    logits,
    make_args,
    make_config,
    make_trainer,
)

FIRST, SECOND = "shard-00/0", "shard-00/0-1"


@contextmanager
def unchanged(path: Path) -> Iterator[None]:
    """Every file of the store is the same afterwards."""
    before = tree(path)
    yield
    assert tree(path) == before


def running_python(code: str, *arguments: str) -> str:
    """Runs a script in a process of its own; returns what it prints."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


# Arguments


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("torch_compile", True, "specialised to the batches of earlier stages"),
        ("auto_find_batch_size", True, "restarts from weights that are already updated; set the batch size"),
        ("packing", True, "joins examples of different slices; set `packing=False`"),
        ("fsdp", "full_shard", "use DDP"),
        ("deepspeed", {"zero_optimization": {"stage": 1}}, "use DDP"),
        ("parallelism_config", object(), "use DDP"),
        ("use_liger_kernel", True, "patch it once before you pass it"),
        ("ignore_data_skip", True, "see some rows twice and miss others"),
        ("bf16_full_eval", True, "leave the base and the stages in bfloat16"),
        ("fp16_full_eval", True, "leave the base and the stages in float16"),
    ],
)
def test_arguments_that_can_not_work_stage_by_stage(tmp_path: Path, name: str, value: Any, message: str) -> None:
    args = make_args(tmp_path)
    setattr(args, name, value)  # as it stands after parsing; some of these ask for more to be installed
    with pytest.raises(ValueError, match=f"S3T does not work with `{name}=.*{message}"):
        S3TTrainer(BASES["llama"][0](), args, train_dataset=models.llama_rows(4), peft_config=make_config())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("ACCELERATE_USE_FSDP", "true", "whole tensors on every process; use DDP"),
        ("ACCELERATE_USE_MEGATRON_LM", "True", "whole tensors on every process; use DDP"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "1", "whole tensors on every process; use DDP"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "specialised to the batches of earlier stages"),
    ],
)
def test_what_a_launcher_asks_for_is_refused_as_the_argument_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    """accelerate heeds the environment, whatever the arguments say; one that compiles stays there for good."""
    args = make_args(tmp_path)
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"`{name}={value}`, which `accelerate launch` .*{message}.*unset it"):
        S3TTrainer(BASES["llama"][0](), args, train_dataset=models.llama_rows(4), peft_config=make_config())
    monkeypatch.setenv(name, "no" if name.endswith("BACKEND") else "false")  # as the launcher does by default
    S3TTrainer(BASES["llama"][0](), args, train_dataset=models.llama_rows(4), peft_config=make_config())


def test_the_page_gives_reasons_for_what_is_refused() -> None:
    page = (Path(__file__).parents[2] / "docs/training.md").read_text(encoding="utf-8")
    table = page.split("| asked for | refused, because |")[1].split("\n\n")[0]
    told = set(re.findall(r"^\| `(\w+)`", table, re.M))
    assert told == {"use_liger_kernel", "fsdp", "deepspeed", "parallelism_config", "precompute_ref_log_probs"}
    assert told <= REFUSED.keys()


@pytest.mark.parametrize("setting", [{"dispatch_batches": True}, {"use_seedable_sampler": False}])
def test_loaders_that_begin_otherwise_when_resumed(tmp_path: Path, setting: dict[str, bool]) -> None:
    with pytest.raises(ValueError, match=f"accelerator_config=.*{next(iter(setting))}.*go on with other batches"):
        make_trainer(tmp_path, args={"accelerator_config": setting})
    assert not list(tmp_path.iterdir())


def test_one_process_with_several_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    with pytest.raises(ValueError, match="over 2 GPUs.*accelerate launch.*CUDA_VISIBLE_DEVICES=0"):
        make_trainer(tmp_path)
    assert not list(tmp_path.iterdir())


def compiled_whole() -> Any:
    return torch.compile(BASES["llama"][0]())


def compiled_in_place() -> Any:
    model = BASES["llama"][0]()
    model.compile()
    return model


def compiled_layer() -> Any:
    model = BASES["llama"][0]()
    model.model.layers[1].compile()
    return model


@pytest.mark.parametrize("build", [compiled_whole, compiled_in_place, compiled_layer])
def test_a_compiled_base(tmp_path: Path, build: Any) -> None:
    with pytest.raises(ValueError, match="was compiled: .* specialised to the batches of earlier stages"):
        make_trainer(tmp_path, model=build())
    assert not list(tmp_path.iterdir())


def test_no_arguments_at_all() -> None:
    with pytest.raises(ValueError, match="S3T needs `args`: .* names the store"):
        S3TTrainer(BASES["llama"][0](), train_dataset=models.llama_rows(4), peft_config=make_config())


@pytest.mark.parametrize(
    "given, message",
    [
        ({"model": "some/model"}, "`model` must be a loaded model, got str"),
        ({"model": None}, "`model` must be a loaded model, got NoneType"),
        ({"model_init": models.tiny_llama}, "`model_init` would make a new base model"),
        ({"missing": "forget"}, "`missing` must be 'error', 'delete' or 'ignore', got 'forget'"),
        ({"peft_config": None}, "`peft_config` must be an S3TConfig, got NoneType"),
        ({"peft_config": {"r": 2}}, "`peft_config` must be an S3TConfig, got dict"),
        ({"partition_key": "short"}, "The partition key has 5 bytes"),
        ({"train_dataset": models.llama_rows(1).select([])}, "The train set has no rows"),
    ],
)
def test_other_arguments(tmp_path: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **given)


def test_a_ready_optimizer(tmp_path: Path) -> None:
    model = BASES["llama"][0]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="Use `optimizer_cls_and_kwargs`"):
        make_trainer(tmp_path, model=model, optimizers=(optimizer, None))


def test_an_optimizer_class_is_made_anew_for_every_stage(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.5, "momentum": 0.9}))
    trainer.train()
    assert set(records_of(trainer.store)) == {FIRST, SECOND}


@pytest.mark.parametrize("given", [{"resume_from_checkpoint": "out/checkpoint-3"}, {"trial": object()}])
def test_a_path_to_resume_from(tmp_path: Path, given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="resumes from the store itself"):
        make_trainer(tmp_path).train(**given)


# The recipe


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained store that no test changes."""
    path = tmp_path_factory.mktemp("trained") / "store"
    make_trainer(path).train()
    return path


@pytest.mark.parametrize(
    "given, difference",
    [
        ({"args": {"learning_rate": 2e-2}}, "arguments.learning_rate: the store has 0.01, this run 0.02"),
        ({"args": {"num_train_epochs": 2}}, "arguments.num_train_epochs: the store has 1, this run 2"),
        ({"args": {"seed": 1}}, "arguments.seed: the store has 42, this run 1"),
        ({"config": {"r": 4}}, "config.r: the store has 2, this run 4"),
        ({"config": {"lora_dropout": 0.1}}, "config.lora_dropout: the store has 0.0, this run 0.1"),
        ({"config": {"stage_parameters": "all"}}, "config.stage_parameters: the store has 'layer_group', this"),
        ({"config": {"target_modules": ["q_proj"]}}, r"config.target_modules: the store has \['down_proj', 'q_"),
        ({"config": {"num_shards": 2}}, "partition.num_shards: the store has 1, this run 2"),
        ({"config": {"group_column": "person"}}, "partition.group_column: the store has None, this run 'person'"),
        ({"data_collator": list}, "collator: the store has 'default_data_collator', this run 'list'"),
        ({"model": models.tiny_llama(seed=1, num_hidden_layers=4)}, "base.sha256: the store has "),
        ({"base_model_id": "another/base"}, "base.id: the store has None, this run 'another/base'"),
    ],
    ids=lambda value: value.split(":")[0] if isinstance(value, str) else "",
)
def test_a_setting_that_changes_bits(trained: Path, given: dict[str, Any], difference: str) -> None:
    trainer = make_trainer(trained, **given)
    with unchanged(trained), pytest.raises(RecipeError, match=difference):
        trainer.train()


@pytest.mark.parametrize(
    "args",
    [{"logging_steps": 1}, {"save_strategy": "epoch"}, {"eval_strategy": "steps", "eval_steps": 5}, {"run_name": "r"}],
)
def test_a_setting_that_changes_no_bit_is_taken(trained: Path, args: dict[str, Any]) -> None:
    with unchanged(trained):
        make_trainer(trained, args=args, eval_dataset=models.llama_rows(4)).train()


def test_another_tokenizer(tmp_path: Path, shared_data: Path) -> None:
    folder = shared_data / "llama_stories260k"
    model = models.tiny_llama(num_hidden_layers=2, vocab_size=512)
    make_trainer(tmp_path, model=model, processing_class=AutoTokenizer.from_pretrained(folder)).train()
    model, same = models.tiny_llama(num_hidden_layers=2, vocab_size=512), AutoTokenizer.from_pretrained(folder)
    same("a text", truncation=True, padding="max_length", max_length=8)  # leaves its settings in the tokenizer
    make_trainer(tmp_path, model=model, processing_class=same).train()
    changed = AutoTokenizer.from_pretrained(folder)
    changed.chat_template = "{{ messages }}"
    trainer = make_trainer(
        tmp_path, model=models.tiny_llama(num_hidden_layers=2, vocab_size=512), processing_class=changed
    )
    with unchanged(tmp_path), pytest.raises(RecipeError, match="processing: the store has "):
        trainer.train()


# The plan


@pytest.mark.slow
def test_another_budget_keeps_live_stages_and_adds_what_is_missing(tmp_path: Path) -> None:
    make_trainer(tmp_path, config={"num_slices": 4, "budget": 1}).train()
    before = {name: digest for name, digest in artefacts(tmp_path).items() if name.startswith("shard-")}
    steps = Recorder("on_step_end")
    trainer = make_trainer(tmp_path, config={"num_slices": 4, "budget": 2}, callbacks=[steps])
    trainer.train()
    after = artefacts(tmp_path)
    assert {name: after[name] for name in before} == before
    assert set(steps.steps()) == {"shard-00/2", "shard-00/2-3", "shard-00/2-3-0"}
    # Fewer sequences: what is there stays, and nothing is trained.
    trainer = make_trainer(tmp_path, config={"num_slices": 4, "sequence_selection": [[3, 2, 1, 0]], "budget": 1})
    trainer.train()
    assert {name for name in after if name.startswith("shard-")} < set(artefacts(tmp_path))
    assert trainer.store.served() == {0: (3, 2, 1, 0)}
    scratch = make_trainer(tmp_path.parent / f"{tmp_path.name}-scratch", config={"num_slices": 4, "budget": 2})
    scratch.train()
    kept = {name for name in artefacts(scratch.store.path) if name.startswith("shard-")}
    assert {name: artefacts(scratch.store.path)[name] for name in kept} == {name: after[name] for name in kept}


# The rows


def test_rows_that_vanished_or_changed(tmp_path: Path) -> None:
    rows = models.llama_rows(ROWS)
    make_trainer(tmp_path / "store", train_dataset=rows).train()
    index = set(index_of(S3TStore(tmp_path / "store")))
    spared = rows.select(range(2, ROWS))

    def rewrite(row: dict[str, Any]) -> dict[str, Any]:
        return {"labels": row["input_ids"]} if row["id"] == rows["id"][5] else {}

    changed = spared.map(rewrite, keep_in_memory=True)
    with unchanged(tmp_path / "store"), pytest.raises(DatasetError, match="2 examples .* gone .* and 1 have changed"):
        make_trainer(tmp_path / "store", train_dataset=changed).train()
    make_trainer(tmp_path / "ignoring", train_dataset=rows).train()
    before = artefacts(tmp_path / "ignoring")
    make_trainer(tmp_path / "ignoring", train_dataset=changed, missing="ignore").train()
    assert artefacts(tmp_path / "ignoring") == before
    assert set(index_of(S3TStore(tmp_path / "ignoring"))) == index  # still found by a deletion
    with pytest.raises(DatasetError, match="2 examples .* gone .* and 1 have changed"):  # ignored once, not for good
        make_trainer(tmp_path / "ignoring", train_dataset=changed).train()
    make_trainer(tmp_path / "store", train_dataset=changed, missing="delete").train()
    store = S3TStore(tmp_path / "store")
    assert [location.found for location in store.locate(ids=rows["id"][:2])] == ["deleted"] * 2
    assert store.locate(ids=[rows["id"][5]])[0].found == "live"
    assert store.status().deleted_examples == 2, "what has changed is not buried"
    make_trainer(tmp_path / "scratch", train_dataset=changed).train()
    assert artefacts(tmp_path / "store") == artefacts(tmp_path / "scratch")


def test_new_rows_wait_for_the_next_stage_unless_asked_for(tmp_path: Path) -> None:
    rows = models.llama_rows(ROWS + 4)
    make_trainer(tmp_path, train_dataset=rows.select(range(ROWS))).train()
    before = artefacts(tmp_path)
    make_trainer(tmp_path, train_dataset=rows).train()
    assert artefacts(tmp_path) == before
    assert S3TStore(tmp_path).locate(ids=[rows["id"][ROWS]])[0].found == "live"  # and a deletion finds them
    make_trainer(tmp_path, train_dataset=rows.select(range(ROWS + 4))).train()  # known already, and still not seen
    assert artefacts(tmp_path) == before
    make_trainer(tmp_path, train_dataset=rows, extend=True).train()
    make_trainer(tmp_path.parent / f"{tmp_path.name}-scratch", train_dataset=rows).train()
    assert artefacts(tmp_path) == artefacts(tmp_path.parent / f"{tmp_path.name}-scratch")
    steps = Recorder("on_step_end")
    make_trainer(tmp_path, train_dataset=rows, extend=True, callbacks=[steps]).train()
    assert steps.steps() == {}  # every stage has seen them by now


# Other processes, other versions


@pytest.mark.slow
def test_a_second_training_is_refused_and_the_holder_named(trained: Path) -> None:
    hold = """
        import sys
        from hf_s3t import S3TStore
        store = S3TStore(sys.argv[1])
        store.train_lock.acquire(0)
        print("held", flush=True)
        sys.stdin.read()
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(hold), str(trained)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as other:  # fmt: skip
        assert other.stdout and other.stdout.readline() == "held\n"
        trainer = make_trainer(trained)
        with pytest.raises(StoreLockedError, match=f"held by process {other.pid} on .* \\(training\\)"):
            trainer.train()
        other.communicate("")
    trainer.train()  # a process that ended gives the lock back


def test_a_store_of_a_newer_format(tmp_path: Path) -> None:
    make_trainer(tmp_path).train()
    manifest = json.loads((tmp_path / "s3t.json").read_text())
    (tmp_path / "s3t.json").write_text(json.dumps({**manifest, "format": manifest["format"] + 1}))
    with unchanged(tmp_path), pytest.raises(StoreError, match="has format 3; this version of hf_s3t reads format 2"):
        make_trainer(tmp_path).train()


def test_another_partition_key(trained: Path) -> None:
    with unchanged(trained), pytest.raises(StateError, match="not the one that .* was trained with"):
        make_trainer(trained, partition_key=KEY[::-1])


# Heads that the base lacks


@pytest.mark.slow
def test_a_missing_head_is_the_same_in_every_process(tmp_path: Path) -> None:
    config = models.tiny_bert().config
    BertModel(config).save_pretrained(tmp_path / "base")
    code = """
        import sys, torch
        from transformers import BertForSequenceClassification
        torch.manual_seed(int(sys.argv[3]))
        base = BertForSequenceClassification.from_pretrained(sys.argv[1], num_labels=3)
        from trainers import make_trainer
        make_trainer(sys.argv[2], base="bert", model=base).train()
    """
    stores = [tmp_path / "there", tmp_path / "here"]
    running_python(code, str(tmp_path / "base"), str(stores[0]), "1")
    torch.manual_seed(2)
    base = BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    make_trainer(stores[1], base="bert", model=base).train()
    assert artefacts(stores[0]) == artefacts(stores[1])
    recipes = [S3TStore(store).manifest().recipe for store in stores]
    assert recipes[0] == recipes[1] and list(recipes[0]["base"]["drawn_heads"]) == ["classifier"]


def test_a_missing_module_that_no_stage_would_store(tmp_path: Path) -> None:
    BertModel(models.tiny_bert().config, add_pooling_layer=False).save_pretrained(tmp_path / "base")
    base = BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    with pytest.raises(ValueError, match=r"lacks weights for bert.pooler.dense, .* `modules_to_save="):
        make_trainer(tmp_path / "store", base="bert", model=base)
    config = make_config("SEQ_CLS", modules_to_save=["bert.pooler.dense"])
    trainer = make_trainer(tmp_path / "store", base="bert", model=base, peft_config=config)
    trainer.train()
    stored = trainer.store.assemble(0, (0, 1)).tensors
    assert any("pooler" in name for name in stored) and any("classifier" in name for name in stored)


# What would be lost or replaced


def test_a_model_that_holds_an_adapter_is_refused(tmp_path: Path) -> None:
    targets: dict[str, Any] = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    other = get_peft_model(models.tiny_llama(num_hidden_layers=4), LoraConfig(**targets))
    with pytest.raises(ValueError, match=r"adapters of another type \(default\).* merge it first"):
        make_trainer(tmp_path / "out", model=other)
    added = inject_adapter_in_model(LoraConfig(**targets), models.tiny_llama(num_hidden_layers=4))
    with pytest.raises(ValueError, match="already holds an adapter .*merge it first"):
        make_trainer(tmp_path / "out", model=added)
    first = make_trainer(tmp_path / "first")
    first.train()
    with pytest.raises(ValueError, match="an S3T adapter that was trained|adapters of another type"):
        make_trainer(tmp_path / "out", model=first.model)
    assert not (tmp_path / "out/s3t.json").exists()


def test_the_way_out_of_a_model_with_an_adapter_works(tmp_path: Path) -> None:
    other = get_peft_model(models.tiny_llama(num_hidden_layers=4), LoraConfig(target_modules=["q_proj"]))
    for name, value in other.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(value, std=0.1)
    inputs = batch(models.llama_rows(6))
    expected = logits(other, inputs)
    other.merge_and_unload().save_pretrained(tmp_path / "base")
    trainer = make_trainer(tmp_path / "out", model=LlamaForCausalLM.from_pretrained(tmp_path / "base"))
    torch.testing.assert_close(logits(trainer.model, inputs), expected)


@pytest.mark.parametrize("name", ["README.md", "adapter_config.json", "adapter_model.safetensors", "shard-00"])
def test_a_folder_of_something_else_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("somebody's")
    with pytest.raises(ValueError, match=f"holds {name} but no store"):
        make_trainer(tmp_path / "out").train()
    assert (tmp_path / "out" / name).read_text() == "somebody's"
    assert not (tmp_path / "out/s3t.json").exists()


def test_what_can_not_be_evaluated_fails_before_the_first_stage(tmp_path: Path) -> None:
    rows = models.llama_rows(8).remove_columns(["labels", "input_ids"])
    trainer = make_trainer(tmp_path / "out", eval_dataset={"odd": rows})
    with pytest.raises(ValueError) as found:
        trainer.train()
    assert "tried with one batch before the first stage" in str(found.value.__notes__)
    assert not trainer.store.manifest().stages


def test_the_trial_of_an_evaluation_leaves_no_trace_in_what_is_counted(tmp_path: Path) -> None:
    class Counting(S3TTrainer):
        def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
            self.asked.append(1)
            self.counts["asked"] = len(self.asked)
            return super().prediction_step(*args, **kwargs)

    trainer = make_trainer(tmp_path / "out", trainer_class=Counting, eval_dataset=models.llama_rows(4))
    trainer.asked, trainer.counts = asked, counts = [], {}
    trainer.try_evaluation()
    assert trainer.asked is asked and trainer.counts is counts and not asked and not counts
    trainer.evaluate()
    assert asked and counts
