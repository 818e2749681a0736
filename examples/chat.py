"""Supervised fine-tuning with TRL, deletable by person: `python examples/chat.py`."""

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from hf_s3t import S3TConfig, S3TMixin

BASE = "recipes/demo/base"  # any causal language model, such as "HuggingFaceTB/SmolLM2-135M-Instruct"


class S3TSFTTrainer(S3TMixin, SFTTrainer):
    """Any trainer becomes S3T this way."""


rows = load_dataset("json", data_files="recipes/demo/people.jsonl", split="train")
rows = rows.map(lambda row: {"prompt": row["instruction"] + " ", "completion": row["output"]})
rows = rows.remove_columns(["instruction", "input", "output"])
args = SFTConfig(
    "out/chat", max_steps=10, max_length=64, report_to=[],
    bf16=False, activation_checkpointing=False,  # both are on by default, for GPUs
)  # fmt: skip
config = S3TConfig(task_type="CAUSAL_LM", target_modules="all-linear", num_slices=2, group_column="person")
trainer = S3TSFTTrainer(
    AutoModelForCausalLM.from_pretrained(BASE), args, train_dataset=rows, peft_config=config,
    processing_class=AutoTokenizer.from_pretrained(BASE),
)  # fmt: skip
trainer.train()
print(trainer.delete(groups=["Fetamir Medresson"]).examples, "rows deleted")
trainer.train()
