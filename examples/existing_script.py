"""An ordinary Trainer script and the three changes that let it forget: `python examples/existing_script.py`."""

from datasets import load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, TrainingArguments

from hf_s3t import S3TConfig, S3TTrainer  # 1: instead of `Trainer`

BASE = "recipes/demo/base"  # any model with a classification head, such as "FacebookAI/roberta-base"
KINDS = ["town", "work", "instrument", "pet", "food", "colour"]

tokenizer = AutoTokenizer.from_pretrained(BASE)
model = AutoModelForSequenceClassification.from_pretrained(BASE, num_labels=len(KINDS))
rows = load_dataset("json", data_files="recipes/demo/people.jsonl", split="train")
rows = rows.map(lambda row: tokenizer(row["instruction"]) | {"labels": KINDS.index(row["id"].split("-")[-1])})
args = TrainingArguments("out/existing_script", max_steps=10, learning_rate=1e-3, report_to=[])
config = S3TConfig(  # 2: which parts a stage trains, and how the rows are cut
    task_type="SEQ_CLS", target_modules="all-linear", modules_to_save=["score"], num_slices=2, group_column="person"
)
trainer = S3TTrainer(model, args, DataCollatorWithPadding(tokenizer), rows, peft_config=config)  # 3
trainer.train()
receipt = trainer.delete(groups=["Fetamir Medresson"])
print(f"{receipt.examples} rows deleted; stages removed: {', '.join(receipt.stages_removed)}")
trainer.train()  # the repair
print("loss of the served model:", trainer.evaluate(rows.select(range(48)))["eval_loss"])
