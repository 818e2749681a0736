"""A model that answers while another process deletes. Run `examples/chat.py` first: `python examples/serve.py`."""

from transformers import AutoTokenizer

from hf_s3t import S3TEnsemble, S3TStore

BASE = "recipes/demo/base"
tokenizer = AutoTokenizer.from_pretrained(BASE)
model = S3TEnsemble.from_pretrained("out/chat", BASE)  # the base is in memory once, whatever the number of shards
prompt = tokenizer("Name the town of Yuzoric Nuthoford. ", return_tensors="pt")
print("before:", tokenizer.decode(model.generate(**prompt, max_new_tokens=12)[0], skip_special_tokens=True))

S3TStore("out/chat").delete(slices=[(0, 0)])  # anybody with the state, in any process

model.refresh()  # looks at one file; new answers are computed by what is live now
print("after: ", tokenizer.decode(model.generate(**prompt, max_new_tokens=12)[0], skip_special_tokens=True))
print("generation", model.generation, "of", S3TStore("out/chat").status().generation)
