"""The table of seams: what of which library is touched, what depends on it, and why it is needed."""

from __future__ import annotations

from typing import NamedTuple

SEEN = {
    "accelerate": "1.15",
    "datasets": "4.7 to 5.2",
    "huggingface_hub": "1.33 to 2.4",
    "peft": "0.21.2",
    "torch": "2.6 to 2.15",
    "transformers": "5.23 and 5.24",
    "trl": "1.16",
}
"""Versions of each library that its seams were tested with."""


class Seam(NamedTuple):
    """One place where the library is sewn to another one.

    Args:
        library (`str`): the other library, as `pip` names it.
        depends (`str`): `"promise 1"` and the like: it is an error when the seam is not as expected. `"speed: ..."` or
            `"comfort: ..."`: it is a warning, which says what is lost.
        touches (`str`): what of the library is private, or may be renamed.
        why (`str`): what it is needed for.
    """

    library: str
    depends: str
    touches: str
    why: str


TABLE: dict[str, Seam] = {
    # ---- training: PEFT's tuner, the weights of a model, the Trainer and its callbacks, what a recipe is made of ----
    "peft_type": Seam("peft", "promise 8", "the members of the enum `PeftType` and the tuners by them",
        "`register_peft_method` takes no method that the enum lacks, such as `S3T`"),
    "lora_model": Seam("peft", "promise 1", "the private methods of `LoraModel` that `TunerSeam` overrides",
        "an adapter lies in the layers that its stage owns, and nowhere else"),
    "peft_names": Seam("peft", "promises 1 and 4", "the names of parameters within adapters: `lora_`, `base_layer`, "
        "`modules_to_save`, `original_module`", "what a stage owns and what belongs to the base is told by names"),
    "active_adapters": Seam("peft", "promise 2", "`active_adapter` of the tuner and of the model",
        "a stage trains beside its parent: two LoRAs answer and one head does"),
    "all_linear": Seam("peft", "promise 8", "`_maybe_include_all_linear_layers`",
        "the layers are known before the first adapter is made"),
    "targeting": Seam("peft", "promise 8", "how `check_target_module_exists` reads a config and a path",
        "the adapters of the store lie in the same modules when stock PEFT loads them"),
    "task_heads": Seam("peft", "promise 2", "the names of the heads that its classes for tasks train whole",
        "every stage stores the heads that it trains"),
    "loading_marks": Seam("transformers", "promise 4", "the mark `_is_hf_initialized` of parameters that were loaded",
        "a head that the checkpoint lacks is drawn from the seed alone, and stored"),
    "loading_report": Seam("transformers",
        "comfort: a head that the checkpoint lacks is not drawn from the seed; name a checkpoint that can be read",
        "`_commit_hash` of a config, and `from_pretrained(device_map='meta', output_loading_info=True)`",
        "of the weights without a mark, those are drawn that the checkpoint lacks, and no others"),
    "drawn_weights": Seam("transformers", "promise 4", "the method `_init_weights` of models",
        "a head that the checkpoint lacks is drawn from the seed alone"),
    "preparation": Seam("datasets", "promises 3 and 4", "`Dataset.map`, replaced while a Trainer prepares its rows",
        "a prepared row holds something of its own example alone, not of others in its batch"),
    "compiled": Seam("torch", "promise 4", "`_compiled_call_impl` of a module, `_orig_mod` of a compiled one",
        "a compiled base is specialised to the batches of all stages so far, and is refused"),
    "attention": Seam("transformers", "promise 4", "`_attn_implementation` of a model's config",
        "cached states are of the kernel that computes now"),
    "two_trunks": Seam("transformers", "promise 4, and answers of several members",
        "`is_encoder_decoder` and `get_text_config` of a model's config, and `get_encoder` of models",
        "an activation cache holds the states of one trunk, and members share none with what runs beside it"),
    "tokenizer_rules": Seam("transformers", "promise 4", "`backend_tokenizer` of fast tokenizers",
        "a tokenizer that works otherwise is another recipe"),
    "refused_arguments": Seam("transformers", "promises 1 and 4", "the names of arguments that are refused",
        "what cannot work stage by stage is refused, not ignored"),
    "refused_arguments_of_trl": Seam("trl", "promise 2",
        "the names `packing`, `padding_free` and `precompute_ref_log_probs`",
        "what joins rows of different slices is refused, not ignored"),
    "trainer": Seam("transformers", "promises 1, 5 and 7", "what `seams/trainer.py` lists of the `Trainer`",
        "stages train one after another in one Trainer, and their checkpoints are found, guarded and never pushed"),
    "checkpoints": Seam("transformers", "promise 5", "the name of a checkpoint's folder",
        "a checkpoint that was not wholly written is never resumed"),
    "neftune": Seam("transformers", "promise 4", "`neftune_hook_handle` of the `Trainer`",
        "a stage that a deletion stops leaves no noise to the next one"),
    "accelerator": Seam("accelerate", "promises 3 and 4", "`scaler` and `gradient_state` of the `Accelerator`",
        "a stage begins from its recipe, its examples and its parent, and from nothing that an earlier one left"),
    "callbacks": Seam("transformers", "promises 1 and 3", "the list of a `CallbackHandler`, and when it is told",
        "a guard looks at what trains, and for deletions, at every optimizer step"),
    "workers": Seam("torch", "comfort: five seconds for each of them that is left to the garbage collector",
        "`_iterator` of a `DataLoader`, and its `_shutdown_workers`",
        "the processes that load rows end when the training ends or is interrupted"),
    "callback_events": Seam("transformers", "comfort: `stage` in the arguments of callbacks, one run for trackers",
        "`CallbackHandler.call_event`", "callbacks are told which stage trains, and trackers see one run"),
    "trackers": Seam("transformers", "comfort: one run for trackers, tensorboard beside the store",
        "`get_reporting_integration_callbacks` and `TensorBoardCallback.logging_dir`",
        "trackers see one run, and tensorboard writes beside the store"),
    # ---- answering ----
    "models_loss": Seam("transformers", "the served model's evaluation", "`loss_function` of models",
        "the loss of an ensemble follows from its averaged logits"),
    "logits": Seam("transformers", "answers of several members", "the names of outputs, `logits` and `..._logits`",
        "they are what is averaged over the members"),
    "pipelines": Seam("transformers", "comfort: a log without that error", "`SUPPORTED_PEFT_TASKS` of pipelines",
        "a pipeline logs an error about classes that it does not know"),
    "activation_checkpointing": Seam("transformers", "promise 4",
        "`is_activation_checkpointing` of models, and which layers are `GradientCheckpointingLayer`s",
        "a layer that is run again from outside would not be fed its cached states"),
    # ---- the Hub ----
    "http_library": Seam("huggingface_hub", "promise 7", "the library whose errors `HfHubHTTPError` inherits from",
        "a request that failed is told from one whose answer was lost, and what may have arrived is looked for"),
    "upload_mode": Seam("huggingface_hub", "promise 7", "`CommitOperationAdd._upload_mode` after an upload",
        "weights that git itself would keep are refused before the commit, as no purge removes them"),
    "large_file_listing": Seam("huggingface_hub", "promise 7", "the route `lfs-files`, with `fileOid` and `size`",
        "every stored large file is seen; `list_lfs_files` fails at one without a name"),
    "large_file_deletion": Seam("huggingface_hub", "promise 7", "what `permanently_delete_lfs_files` takes and reads",
        "contents are deleted of which only the sha256 is known"),
    "own_requests": Seam("huggingface_hub", "promise 7", "`get_session`, `build_hf_headers`, the routes "
        "`discussions/{n}/ref` and `info/lfs/objects/batch`, the headers `x-linked-etag` and `x-error-code`",
        "refs of pull requests are removed, and probes see what the Hub answers, not what a client makes of it"),
}  # fmt: skip
"""Every seam by its name."""
