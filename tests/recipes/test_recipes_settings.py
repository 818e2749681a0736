"""What the recipes set: the paper's numbers, which flag comes before which, and the metrics of GLUE and SuperGLUE."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForMultipleChoice,
    RobertaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

from hf_s3t.cli.options import wanted_names
from hf_s3t.lora.layout import find_layout
from recipe_runs import BASE, ROOT, alpaca, common, glue, glue_metrics, instructions, people_demo, vision
from stores import make_store

# L, layers per slice, r, alpha, learning rate, epochs: the paper's table, but for the layers of RTE.
PAPER = {
    "sst2": (7, 3, 16, 32, 1e-5, 10),
    "cola": (7, 2, 8, 16, 4e-4, 30),
    "stsb": (7, 3, 16, 32, 1e-4, 30),
    "qnli": (7, 3, 8, 16, 5e-5, 30),
    "qqp": (7, 3, 16, 32, 5e-5, 30),
    "mrpc": (7, 3, 16, 32, 5e-5, 30),
    "mnli": (7, 3, 16, 32, 1e-4, 30),
    "rte": (8, 3, 16, 32, 1e-5, 30),
    "wic": (12, 2, 16, 32, 1e-4, 30),
    "cb": (12, 2, 16, 32, 1e-4, 30),
    "copa": (12, 2, 32, 64, 1e-5, 30),
    "boolq": (7, 3, 16, 32, 1e-4, 30),
    "multirc": (7, 3, 16, 32, 1e-4, 30),
    "cifar10": (6, 2, 16, 32, 2e-3, 15),
    "cifar100": (6, 2, 16, 32, 2e-3, 15),
    "tiny_imagenet": (6, 4, 16, 32, 2e-3, 15),
    "llama-2-7b": (4, 8, 32, 64, 2e-5, 3),
    "llama-2-13b": (4, 10, 32, 64, 2e-5, 3),
    "llama-3-8b": (4, 8, 32, 64, 2e-5, 3),
}
NARROW = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}


def read(recipe, *argv):
    """Arguments of a recipe, parsed as its `main` does."""
    own = {glue: "GlueArguments", vision: "VisionArguments", alpaca: "AlpacaArguments"}[recipe]
    return common.read_arguments(getattr(recipe, own), recipe.choose_preset, list(argv))


def read_for(name: str, *argv: str):
    flag = next(flag for flag, names in FLAGS.items() if name in names)
    return read({"--task": glue, "--dataset": vision, "--preset": alpaca}[flag], flag, name, *argv)


FLAGS = {"--task": glue.TASKS, "--dataset": vision.DATASETS, "--preset": alpaca.PRESETS}


def test_every_preset_is_in_the_table():
    presets = {name for names in FLAGS.values() for name in names}
    assert {name for name in presets if not name.endswith("-qlora")} == set(PAPER)
    assert {name.removesuffix("-qlora") for name in presets} == set(PAPER)


@pytest.mark.parametrize("name", PAPER)
def test_presets_are_the_papers(name, tmp_path):
    arguments, args = read_for(name, "--output_dir", str(tmp_path))
    lora = arguments.num_slices, arguments.layers_per_slice, arguments.r, arguments.lora_alpha
    assert (*lora, args.learning_rate, args.num_train_epochs) == PAPER[name]
    assert arguments.budget is None and arguments.num_shards in (None, 1) and arguments.stage_parameters is None


def as_deep_as_the_papers(name: str) -> torch.nn.Module:
    """A narrow model with the layers of the one that the paper used."""
    if name in glue.TASKS:
        kind = RobertaForMultipleChoice if name == "copa" else RobertaForSequenceClassification
        return kind(RobertaConfig(num_hidden_layers=24, vocab_size=9, **NARROW))
    if name in vision.DATASETS:
        deep = 24 if "large" in vision.DATASETS[name].model else 12
        return ViTForImageClassification(ViTConfig(num_hidden_layers=deep, image_size=8, patch_size=4, **NARROW))
    layers = 40 if "13b" in name else 32
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, vocab_size=9, num_key_value_heads=2, **NARROW))


@pytest.mark.parametrize("method", ["s3t", "sisa", "full"])
@pytest.mark.parametrize("name", ["cola", "rte", "sst2", "wic", "copa", "cifar10", "tiny_imagenet", *alpaca.PRESETS])
def test_each_preset_fits_the_depth_of_its_model(name, method, tmp_path):
    arguments, _ = read_for(name, "--method", method, "--output_dir", str(tmp_path))
    recipe = glue if name in glue.TASKS else vision if name in vision.DATASETS else alpaca
    targets = instructions.ALL_PROJECTIONS if recipe is alpaca else recipe.TARGETS
    model = as_deep_as_the_papers(name)
    layout = find_layout(model, common.make_config(arguments, target_modules=targets))
    slices, size = PAPER[name.removesuffix("-qlora")][:2]
    layers = model.config.num_hidden_layers
    if method != "s3t":
        assert layout.groups == (tuple(range(layers)),)
    else:
        assert len(layout.grouped_layers) == slices * size <= layers and layers - 1 in layout.groups[0]


def test_qlora_is_a_preset_or_a_flag(tmp_path):
    out = ["--output_dir", str(tmp_path)]
    qlora, plain = read_for("llama-3-8b-qlora", *out)[0], read_for("llama-3-8b", *out, "--load_in_4bit")[0]
    assert vars(qlora) | {"preset": None} == vars(plain) | {"preset": None} and qlora.load_in_4bit
    with pytest.raises(ValueError, match="two ways to hold one base"):
        instructions.load_model("me/base", load_in_8bit=True, load_in_4bit=True)


def test_what_the_paper_says_of_rte_does_not_fit(tmp_path):
    arguments, _ = read_for("rte", "--layers_per_slice", "4", "--output_dir", str(tmp_path))
    with pytest.raises(ValueError, match="8 slices of 4 layers need 32 layers"):
        find_layout(as_deep_as_the_papers("rte"), common.make_config(arguments, target_modules=glue.TARGETS))


def test_flags_come_before_the_file_and_the_file_before_the_preset(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("task: cola\nr: 4\nlearning_rate: 3e-4\nseed: 5\nmodel_name_or_path: me/base\nbudget: 2\n")
    arguments, args = read(glue, str(file), "--r", "6", "--seed", "7", "--output_dir", str(tmp_path))
    assert (arguments.task, arguments.r, args.seed) == ("cola", 6, 7)
    assert (args.learning_rate, arguments.model_name_or_path, arguments.budget) == (3e-4, "me/base", 2)
    assert (arguments.num_slices, args.num_train_epochs, args.remove_unused_columns) == (7, 30, False)
    same = tmp_path / "run.json"
    same.write_text(json.dumps({"dataset": "cifar10", "augment": False, "output_dir": str(tmp_path)}))
    arguments, args = read(vision, str(same))
    assert (arguments.augment, args.output_dir, arguments.num_slices) == (False, str(tmp_path), 6)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--task", "rte", "--method", "full", "--num_slices", "3"], "--method full needs 1 for `num_slices`, got 3"),
        (["--task", "rte", "--method", "full", "--layers_per_slice", "3"], "needs the default for `layers_per_slice`"),
        (["--task", "rte", "--method", "sisa", "--budget", "2"], "--method sisa needs 1 for `budget`, got 2"),
        (["--task", "rte", "--load_best_model_at_end", "True", "--save_strategy", "epoch", "--eval_strategy", "epoch"],
         "would choose weights by the evaluation set"),
        (["--task", "wnli"], "--task must be one of sst2, cola"),
        (["run.yaml", "--task", "rte"], "has \\['learningrate'\\]"),
    ],
)  # fmt: skip
def test_what_is_contradicted_or_unknown_is_refused(argv, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("learningrate: 1\n")
    with pytest.raises(ValueError, match=message):
        read(glue, *argv)


def test_a_method_is_a_setting_of_one_engine(tmp_path):
    def config(*argv):
        return common.make_config(read(glue, "--task", "rte", "--output_dir", str(tmp_path), *argv)[0])

    sisa, full = config("--method", "sisa", "--num_shards", "2"), config("--method", "full")
    assert (sisa.stage_parameters, sisa.budget, sisa.num_slices, sisa.num_shards) == ("all", 1, 8, 2)
    assert (full.stage_parameters, full.num_slices, full.num_shards, full.layers_per_slice) == ("all", 1, 1, None)
    assert (sisa.layers_per_slice, config("--stage_parameters", "all").layers_per_slice) == (None, None)
    assert (config("--num_slices", "3").layers_per_slice, config("--num_slices", "3").num_slices) == (None, 3)
    assert config("--stage_parameters", "all").stage_parameters == "all"
    assert config().stage_parameters == "layer_group"


@pytest.mark.parametrize("name", ["cola", "cifar10", "llama-2-7b"])
def test_rank_groups_take_a_preset_without_its_layers(name, tmp_path):
    rank_groups = ["--stage_parameters", "rank_group", "--output_dir", str(tmp_path)]
    arguments, _ = read_for(name, *rank_groups)
    assert common.make_config(arguments).layers_per_slice is None and arguments.num_slices == PAPER[name][0]
    arguments, _ = read_for(name, *rank_groups, "--layers_per_slice", "2")
    with pytest.raises(ValueError, match="Leave it None"):
        common.make_config(arguments)


def test_ids_are_read_as_the_command_line_reads_them(tmp_path):
    file = tmp_path / "ids.txt"
    file.write_bytes(b"\xef\xbb\xbfrow 1\r\n\r\n 2\x1c\n")
    assert common.read_ids(str(file)) == wanted_names(None, file, None, None).ids == ["row 1", " 2\x1c"]


def test_the_commands_of_the_readme_are_understood(tmp_path):
    lines = re.findall(r"^accelerate launch recipes/(\w+)\.py ([^#\n]+)", (ROOT / "docs/recipes.md").read_text(), re.M)
    assert [name for name, _ in lines] == ["glue", "vision", "alpaca"]
    recipes = {"glue": glue, "vision": vision, "alpaca": alpaca}
    found = [read(recipes[name], *told.split(), "--output_dir", str(tmp_path))[0] for name, told in lines]
    assert (found[0].task, found[1].method, found[2].num_slices) == ("rte", "sisa", 4)


def test_a_split_that_is_not_there_is_named(tmp_path):
    arguments = common.RecipeArguments(data_dir=str(tmp_path), max_examples=2)
    with pytest.raises(ValueError, match=r"has no train.parquet, train.json or train.jsonl"):
        common.need_split(arguments, "train")
    (tmp_path / "train.jsonl").write_text('{"a": 1}\n{"a": 2}\n{"a": 3}\n')
    assert common.need_split(arguments, "train")["a"] == [1, 2]
    assert common.load_split(arguments, "test") is None


def test_rows_are_looked_at_before_anything_is_trained():
    rows = Dataset.from_dict({"sentence1": ["a", "b"], "sentence2": ["a", "b"], "label": [0, -1]})
    common.check_rows(rows, glue.TASKS["mrpc"].columns)
    with pytest.raises(ValueError, match="Column label has -1, but must have whole numbers from 0 to 1"):
        common.check_rows(rows, glue.TASKS["mrpc"].columns, 2)
    with pytest.raises(ValueError, match="The rows have no premise, hypothesis, only sentence1, sentence2, label"):
        common.check_rows(rows, glue.TASKS["cb"].columns, 3)
    assert glue.TASKS["copa"].columns == ["premise", "question", "choice1", "choice2", "label"]


@pytest.mark.parametrize("task", ["boolq", "rte"])
def test_tasks_are_read_from_repositories_as_the_hub_has_them(task, tmp_path, monkeypatch):
    """One folder of parquet files per task, which the card names as a config of its own."""
    assert set(glue.HUB.values()) == {"nyu-mll/glue", "aps/super_glue"}
    monkeypatch.chdir(tmp_path)
    repository = tmp_path / glue.HUB[glue.TASKS[task].suite]
    card = ["---", "configs:"]
    for name in (task, "other"):
        (repository / name).mkdir(parents=True)
        card += [f"- config_name: {name}", "  data_files:"]
        for split in ("train", "validation"):
            rows = {column: [f"{name} {split}"] for column in glue.TASKS[task].columns} | {"label": [1]}
            Dataset.from_dict(rows).to_parquet(repository / name / f"{split}-00000-of-00001.parquet")
            card += [f"  - split: {split}", f"    path: {name}/{split}-*"]
    (repository / "README.md").write_text("\n".join([*card, "---", ""]))
    rows, validation = glue.read_rows(glue.GlueArguments(task=task))
    column = glue.TASKS[task].columns[0]
    assert rows[column] == [f"{task} train"] and validation["validation"][column] == [f"{task} validation"]


# ---- the demo ----


@pytest.mark.parametrize("flag", [("--delete_ids", "ids.txt"), ("--method", "full"), ("--num_slices", "2")])
def test_the_demo_refuses_what_it_would_not_heed(flag, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ids.txt").write_text("3\n")
    with pytest.raises(ValueError, match=f"the embedded demo runs, which has its own .*{flag[0][2:]}"):
        alpaca.main(flag)
    assert not (tmp_path / "out").exists()


def test_the_demo_and_every_method_have_a_folder_of_their_own():
    folders = [read(alpaca)[1].output_dir]
    folders += [read(alpaca, "--model_name_or_path", "x", "--method", name)[1].output_dir for name in common.METHODS]
    assert folders == ["out/demo", "out/alpaca-s3t", "out/alpaca-sisa", "out/alpaca-full"]


def test_the_demo_removes_only_what_it_made(tmp_path):
    make_store(tmp_path / "mine")
    make_store(tmp_path / "demo", key=bytes.fromhex(people_demo.DEMO_KEY))
    with pytest.raises(ValueError, match="is a store that the demo did not make"):
        people_demo.make_room(tmp_path / "mine")
    people_demo.make_room(tmp_path / "demo")
    people_demo.make_room(tmp_path / "nothing")
    assert (tmp_path / "mine" / ".s3t").is_dir() and not (tmp_path / "demo").exists()


# ---- metrics ----


def metric(task, predictions, labels, rows=()):
    return glue_metrics.own_metric(task, rows)(np.array(predictions), np.array(labels))


def test_metrics_of_the_tasks_by_hand():
    predictions, labels = [1, 1, 1, 0, 0], [1, 0, 1, 1, 0]  # 2 of 3 ones found, 2 of 3 that were called one are
    for task in ("sst2", "qnli", "rte", "mnli", "wic", "boolq", "copa"):
        assert metric(task, predictions, labels) == {"accuracy": 0.6}
    for task in ("mrpc", "qqp"):
        assert metric(task, predictions, labels) == pytest.approx({"accuracy": 0.6, "f1": 2 / 3})
    assert metric("cola", predictions, labels) == pytest.approx({"matthews_correlation": (2 * 1 - 1 * 1) / 6})
    assert metric("cola", [1, 1], [1, 0]) == {"matthews_correlation": 0.0}
    assert metric("stsb", [1.0, 2.0, 9.0], [1.0, 2.0, 3.0])["spearmanr"] == pytest.approx(1)
    assert metric("stsb", [1.0, 2.0, 3.0], [3.0, 1.0, 2.0])["pearson"] == pytest.approx(-0.5)
    assert metric("cb", [0, 1, 1, 2], [0, 1, 2, 1])["f1"] == pytest.approx((1 + 0.5 + 0) / 3)


def test_multirc_counts_a_question_only_with_all_its_answers():
    rows = [{"idx": {"paragraph": 0, "question": number // 2, "answer": number % 2}} for number in range(4)]
    found = metric("multirc", [1, 0, 1, 1], [1, 0, 1, 0], rows)
    assert found == pytest.approx({"exact_match": 0.5, "f1_m": (1 + (2 / 3 + 0) / 2) / 2, "f1_a": 0.8})


def test_own_definitions_agree_with_scikit_learns():
    scores = pytest.importorskip("sklearn.metrics", reason="compares with scikit-learn, which is not installed")
    draw = np.random.default_rng(0)
    for labels, predictions in draw.integers(0, 3, (20, 2, 9)):
        macro = scores.f1_score(labels, predictions, average="macro")
        assert metric("cb", predictions, labels)["f1"] == pytest.approx(macro)
        ours, theirs = predictions > 1, labels > 1
        assert metric("mrpc", ours, theirs)["f1"] == pytest.approx(scores.f1_score(theirs, ours, zero_division=0))
        expected = scores.matthews_corrcoef(theirs, ours)
        assert metric("cola", ours, theirs)["matthews_correlation"] == pytest.approx(expected)


# Written for this test: it tells whether predictions and references came as SuperGLUE's script wants them.
OWN_SCRIPT = """
import datasets
import evaluate


class OwnScript(evaluate.Metric):
    def _info(self):
        number = datasets.Value("int64")
        place = {"paragraph": number, "question": number, "answer": number}
        features = datasets.Features({"predictions": {"idx": place, "prediction": number}, "references": number})
        return evaluate.MetricInfo(description="", citation="", features=features)

    def _compute(self, predictions, references):
        assert self.config_name == "multirc"
        right = [row["prediction"] == label for row, label in zip(predictions, references)]
        return {"right": sum(right), "answers": sum(row["idx"]["answer"] for row in predictions)}
"""


def test_a_metric_that_evaluate_has_is_used_and_otherwise_the_log_says_so(tmp_path, monkeypatch, caplog):
    pytest.importorskip("evaluate", reason="the extra `recipes` is not installed")
    monkeypatch.chdir(tmp_path)
    rows = [{"idx": {"paragraph": 0, "question": 0, "answer": answer}} for answer in range(3)]
    predictions, labels = np.array([1, 0, 1]), np.array([1, 0, 0])
    own = glue_metrics.task_metric("super_glue", "multirc", rows)
    assert own(predictions, labels)["exact_match"] == 0
    assert "by the recipe's own definitions: evaluate.load('super_glue') failed" in caplog.text
    (tmp_path / "super_glue").mkdir()
    (tmp_path / "super_glue" / "super_glue.py").write_text(OWN_SCRIPT)
    theirs = glue_metrics.task_metric("super_glue", "multirc", rows)
    assert theirs(predictions, labels) == {"right": 2, "answers": 3}


# ---- batches ----


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def test_batches_of_pairs_choices_and_values(tokenizer):
    pair = {"sentence1": "a", "sentence2": "a town in the north", "label": 2.5}
    batch = glue.TextCollator(tokenizer, "stsb", 64)([pair, {**pair, "sentence2": "a"}])
    assert batch["labels"].dtype == torch.float and batch["input_ids"].shape == batch["attention_mask"].shape
    assert batch["attention_mask"].sum(1).tolist() == sorted(batch["attention_mask"].sum(1).tolist(), reverse=True)
    row = {"premise": "It rained.", "question": "cause", "choice1": "a", "choice2": "a town", "label": 1}
    batch = glue.TextCollator(tokenizer, "copa", 64)([row, row, row])
    assert batch["input_ids"].shape[:2] == (3, 2) and batch["labels"].tolist() == [1, 1, 1]
    texts = tokenizer.batch_decode(batch["input_ids"][0], skip_special_tokens=True)
    assert all("It rained. What was the cause of this?" in text for text in texts) and "town" in texts[1]


def test_answers_of_multirc_are_not_sorted(tmp_path):
    argv = ["--task", "multirc", "--train_sampling_strategy", "group_by_length", "--output_dir", str(tmp_path)]
    with pytest.raises(ValueError, match="MultiRC's metric joins the answers of a question by their order"):
        glue.make_trainer(*read(glue, *argv), Dataset.from_list([]), {"validation": Dataset.from_list([])})


def test_the_word_of_wic_and_the_answer_of_multirc_are_read():
    wic = {"word": "bank", "sentence1": "S1", "sentence2": "S2"}
    assert glue.segments_of("wic", wic) == [("bank: S1", "S2")]
    multirc = {"paragraph": "P", "question": "Q?", "answer": "A"}
    assert glue.segments_of("multirc", multirc) == [("P", "Q? A")]


def test_classes_and_values_are_predicted():
    answer = SimpleNamespace(predictions=np.array([[0.1, 0.9], [3.0, 2.0]]))
    assert glue.predictions_of("rte", answer).tolist() == [1, 0]
    assert glue.predictions_of("stsb", SimpleNamespace(predictions=np.array([[2.5], [1.0]]))).tolist() == [2.5, 1.0]
