"""The recipes as a user starts them: through `accelerate launch`, on real files."""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from hub_server import start
from recipe_runs import (
    BASE,
    RECIPES,
    ROOT,
    SMALL,
    TWO_SLICES,
    instructions,
    people_demo,
    save_roberta,
    save_vit,
    write_glue,
    write_images,
    write_instructions,
)

SMALL_RUN = ["--num_slices", "2", "--budget", "1", "--layers_per_slice", "1", "--r", "4", "--lora_alpha", "8"]
SMALL_RUN += ["--num_train_epochs", "1", "--max_length", "64", "--disable_tqdm", "True"]


def launch(
    script: Path, *arguments: str, config: str | None = None, cwd: Path, environment: dict[str, str] | None = None
) -> str:
    """Output of a launched script."""
    command = [str(Path(sys.executable).with_name("accelerate")), "launch"]
    if config is not None:
        command += ["--config_file", str(ROOT / "accelerate_configs" / config)]
    command += [str(script), *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def table(text: str) -> dict[str, list[float]]:
    """The demo's table: name of the group -> facts, before, after deletion, after repair."""
    rows = re.findall(r"^(\S[a-z ]+?) +(\d+) +([\d.]+) +([\d.]+) +([\d.]+)$", text, re.M)
    return {name: [float(number) for number in numbers] for name, *numbers in rows}


@pytest.fixture
def short_demo(tmp_path):
    """The recipe with one epoch a stage and two slices: every step of the demo, before anything is learnt."""
    script = tmp_path / "alpaca_short.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT / 'recipes')!r})\n"
        "import alpaca, people_demo as demo\ndemo.DEMO_ARGUMENTS['num_train_epochs'] = 1\n"
        "demo.DEMO_CONFIG['num_slices'] = 2\nif __name__ == '__main__':\n    alpaca.main()\n"
    )
    return script


@pytest.mark.slow
def test_the_demo_goes_through_all_its_steps(short_demo, tmp_path):
    text = launch(short_demo, "--output_dir", str(tmp_path / "demo"), cwd=tmp_path)
    names = "the deleted person|others in her slice|the rest of her shard|the other shard|people never trained on"
    assert list(table(text)) == names.split("|")
    assert "never changed: True" in text
    assert "equal those of a training without her: True" in text


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_demo_learns_forgets_and_repairs(tmp_path):
    text = launch(ROOT / "recipes" / "alpaca.py", "--output_dir", str(tmp_path / "demo"), cwd=tmp_path)
    rows = table(text)
    deleted, mates = rows["the deleted person"], rows["others in her slice"]
    rest, other, strangers = (rows[name] for name in list(rows)[2:])
    known = [deleted, mates, rest, other]
    assert sum(row[0] * row[1] for row in known) / sum(row[0] for row in known) >= 80
    for row in (deleted, mates):
        share = strangers[2] / 100
        noise = 100 * 3 * (max(share, 1 / 32) / row[0]) ** 0.5
        assert row[2] <= strangers[2] + noise
    assert rest[1] - rest[2] <= 15 and other[1] - other[2] <= 5
    assert deleted[3] <= strangers[3] + 100 * 3 * (1 / 32 / deleted[0]) ** 0.5
    assert mates[3] >= mates[1] - 15 and rest[3] >= rest[1] - 5
    assert "never changed: True" in text and "without her: True" in text


def test_every_slice_of_the_demo_has_at_least_four_people():
    people = {row["person"] for row in people_demo.read_rows(people_demo.DEMO / "people.jsonl")}
    counts = Counter(people_demo.place_of(person) for person in people)
    assert len(people) >= 48 and len(counts) == 8 and min(counts.values()) >= 4


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_instruction_tuning_in_few_bits_deletes_and_repairs_with_two_processes(bits, tmp_path):
    pytest.importorskip("bitsandbytes")
    data = write_instructions(tmp_path / "data", 32)
    name = json.loads((data / "train.jsonl").read_text().splitlines()[0])["id"]
    (tmp_path / "ids.txt").write_text(name + "\n")
    text = launch(
        ROOT / "recipes" / "alpaca.py", "--model_name_or_path", str(ROOT / "recipes/demo/base"), f"--load_in_{bits}",
        "--data_dir", str(data), "--output_dir", "out", "--delete_ids", "ids.txt",
        "--per_device_train_batch_size", "2", *SMALL_RUN, config="cpu_2_processes.yaml", cwd=tmp_path,
    )  # fmt: skip
    assert "1 examples not served since" in text and text.count("repaired") == 1  # the main process alone speaks
    manifest = json.loads((tmp_path / "out/s3t.json").read_text())
    assert manifest["generation"] == 1 and manifest["recipe"]["processes"] == 2
    assert manifest["recipe"]["base"]["quantization"][f"load_in_{bits}"] is True
    assert set(manifest["stages"]) == {"shard-00/0", "shard-00/0-1"}


@pytest.mark.slow
def test_glue_deletes_and_repairs_with_two_processes(tmp_path):
    data, base = write_glue(tmp_path / "data", "mrpc"), save_roberta(tmp_path / "base")
    (tmp_path / "ids.txt").write_text("3\n")
    text = launch(
        RECIPES / "glue.py", "--task", "mrpc", "--data_dir", str(data), "--model_name_or_path", str(base),
        "--delete_ids", "ids.txt", *SMALL, *TWO_SLICES, config="cpu_2_processes.yaml", cwd=tmp_path,
    )  # fmt: skip
    rows = [line for line in text.splitlines() if re.match("│ (length|loss|accuracy|f1) ", line)]
    assert len(rows) == 4 and [row.count("│") for row in rows] == [5] * 4  # the main process alone speaks
    manifest = json.loads((tmp_path / "out/mrpc-s3t/s3t.json").read_text())
    assert manifest["generation"] == 1 and manifest["recipe"]["processes"] == 2 and len(manifest["stages"]) == 3


@pytest.mark.slow
def test_a_deletion_is_pushed_before_the_repair(tmp_path):
    data, base = write_images(tmp_path / "data", "cifar10"), save_vit(tmp_path / "base")
    (tmp_path / "ids.txt").write_text("train-3\n")
    with start(tmp_path / "hub") as server:
        launch(
            RECIPES / "vision.py", "--dataset", "cifar10", "--data_dir", str(data), "--model_name_or_path", str(base),
            "--delete_ids", "ids.txt", "--push_to_hub", "--hub_model_id", "owner/vision", *SMALL, *TWO_SLICES,
            cwd=tmp_path, environment=server.environment(tmp_path / "home"),
        )  # fmt: skip
        repository = server.repository("owner/vision")
        commits = [row["title"] for row in repository.log()]
        assert len(commits) == 4 and commits[1].startswith("Deletion")  # the repair is the newest, then the deletion
        assert repository.meta["private"]


def test_loss_on_the_response_only_or_on_the_prompt_too():
    tokenizer = instructions.load_tokenizer(str(BASE))
    row = {"instruction": "Where does Ann live?", "input": "", "output": "In Larrun."}
    tokens, labels = instructions.InstructionCollator(tokenizer, 128).example(row)
    response = tokenizer(row["output"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    assert [label for label in labels if label != -100] == response == tokens[-len(response) :]
    tokens, labels = instructions.InstructionCollator(tokenizer, 128, train_on_prompt=True).example(row)
    assert tokens == labels
    with_input = instructions.prompt_of({**row, "input": "A story."})
    assert "### Input:\nA story." in with_input and "### Input" not in instructions.prompt_of(row)
