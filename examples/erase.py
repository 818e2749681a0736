"""A request is answered without model, dataset or GPU. Run `examples/chat.py` first: `python examples/erase.py`."""

from hf_s3t import S3TStore, UnknownExampleError

store = S3TStore("out/chat")
person = "Flithesha Deganer"
print("where:", [(place.found, place.places) for place in store.locate(groups=[person])])

plan = store.delete(groups=[person], dry_run=True)  # changes nothing
print(f"would remove {len(plan.stages_removed)} stages; {plan.dark_examples} other rows wait for the repair")

receipt = store.delete(groups=[person], reference="case-118")
print(f"{receipt.receipt}: {receipt.examples} rows are no longer served since {receipt.inactive_since}")
for limit in receipt.limits:
    print("not covered:", limit)

try:
    store.delete(ids=["nobody"])
except UnknownExampleError as error:
    print("refused:", error)
