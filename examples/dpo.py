"""Preferences that can be forgotten, with TRL's DPO on a small Llama: `python examples/dpo.py`."""

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from hf_s3t import S3TConfig, S3TMixin


class S3TDPOTrainer(S3TMixin, DPOTrainer):
    """TRL's trainer, slice by slice; the reference is the base model without any adapter."""


def as_preference(row: dict) -> dict:
    """Whoever wrote the row prefers the full answer to its last word."""
    return {"prompt": row["instruction"], "chosen": row["output"], "rejected": row["output"].split()[-1]}


base = "recipes/demo/base"  # any causal LM, e.g. "meta-llama/Llama-2-7b-hf"
rows = load_dataset("json", data_files="recipes/demo/people.jsonl", split="train")
rows = rows.map(as_preference, remove_columns=["instruction", "input", "output"])
trainer = S3TDPOTrainer(
    model=AutoModelForCausalLM.from_pretrained(base),
    args=DPOConfig("out/dpo", num_train_epochs=1, max_length=64, learning_rate=1e-3, report_to=[], bf16=False),
    processing_class=AutoTokenizer.from_pretrained(base),
    train_dataset=rows,
    peft_config=S3TConfig(task_type="CAUSAL_LM", target_modules="all-linear", num_slices=2, group_column="person"),
)
trainer.train()
receipt = trainer.delete(groups=[rows[0]["person"]])  # no gradient step
print(receipt.examples, "examples;", receipt.served_before, "->", receipt.served_after)
trainer.train()  # repairs: the removed stages again, without her choices
