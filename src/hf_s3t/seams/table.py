"""The table of seams: where the library is sewn to others, why, what depends on it, and when it can go."""

from __future__ import annotations

from typing import NamedTuple


class Seam(NamedTuple):
    """One place where the library is sewn to another one.

    Args:
        library (`str`): the other library, as `pip` names it.
        touches (`str`): what of it that is private, or may be renamed.
        why (`str`): what it is needed for.
        depends (`str`): `"promise 1"` and the like: it is an error when the seam is not as expected. Else what is
            lost, which is a warning: `"speed: ..."`, `"comfort: ..."`.
        seen (`str`): versions that it was tested with.
        until (`str`): when it can go.
    """

    library: str
    touches: str
    why: str
    depends: str
    seen: str
    until: str


PEFT, TRANSFORMERS, TRL, HUB = "0.21.2", "5.23 and 5.24", "1.16", "1.33 to 2.4"
"""Versions that the seams were seen with."""

TABLE: dict[str, Seam] = {
    # ---- training: the Trainer and its callbacks, PEFT's tuner, what a recipe is made of ----
    "peft_type": Seam(
        "peft",
        "the members of the enum `PeftType` and the tuners by them, extended by `S3T`",
        "`register_peft_method` takes no method that the enum lacks",
        "promise 8",
        PEFT,
        "once PEFT lets others add a method",
    ),
    "lora_model": Seam(
        "peft",
        "`LoraModel`'s methods `_pre_injection_hook`, `_prepare_adapter_config` and `_check_target_module_exists`",
        "an adapter lies in the layers that its stage owns, and nowhere else",
        "promise 1",
        PEFT,
        "once a config can name modules by their whole paths, one adapter beside another",
    ),
    "peft_names": Seam(
        "peft",
        "the names that parameters have within adapters (`lora_`, `base_layer`, `modules_to_save`, `original_module`)",
        "what a stage owns and what belongs to the base is told by names",
        "promises 1 and 4",
        PEFT,
        "once PEFT says which adapter a parameter is of",
    ),
    "active_adapters": Seam(
        "peft",
        "`active_adapter` of the tuner and of the model, set beside the layers' own",
        "a stage trains beside its parent: two LoRAs answer and one head does",
        "promise 2",
        PEFT,
        "once `set_adapter` takes several adapters where there are heads",
    ),
    "all_linear": Seam(
        "peft",
        "`_maybe_include_all_linear_layers`",
        "the layers are known before the first adapter is made",
        "promise 8",
        PEFT,
        "once PEFT says which modules a config targets",
    ),
    "targeting": Seam(
        "peft",
        "how `check_target_module_exists` reads a config and a path",
        "the adapters of the store lie in the same modules when stock PEFT loads them",
        "promise 8",
        PEFT,
        "once PEFT says which modules a config targets",
    ),
    "task_heads": Seam(
        "peft",
        "the names of the heads that its classes for tasks train whole",
        "every stage stores the heads that it trains",
        "promise 2",
        PEFT,
        "once PEFT says so before it wraps a model",
    ),
    "loading_marks": Seam(
        "transformers",
        "the mark `_is_hf_initialized` of parameters that were loaded",
        "a head that the checkpoint lacks is drawn from the seed alone, and stored",
        "promise 4",
        TRANSFORMERS,
        "once a model says which weights it lacked after it was loaded",
    ),
    "preparation": Seam(
        "datasets",
        "`Dataset.map`, which is replaced while a Trainer prepares its rows",
        "a prepared row holds something of its own example alone, not of others in its batch",
        "promises 3 and 4",
        "4.7 to 5.2",
        "once a Trainer prepares rows after it was told which of them belong together",
    ),
    "loading_report": Seam(
        "transformers",
        "`_commit_hash` of a model's config, and `from_pretrained(device_map='meta', output_loading_info=True)`",
        "of the weights without a mark, those are drawn that the checkpoint lacks, and no others",
        "comfort: a head that the checkpoint lacks is not drawn from the seed; name a checkpoint that can be read",
        TRANSFORMERS,
        "once a model says which weights it lacked after it was loaded",
    ),
    "drawn_weights": Seam(
        "transformers",
        "the method `_init_weights` of models",
        "a head that the checkpoint lacks is drawn from the seed alone",
        "promise 4",
        TRANSFORMERS,
        "once there is a public method that draws one module",
    ),
    "compiled": Seam(
        "torch",
        "`_compiled_call_impl` of a module, `_orig_mod` of one that `torch.compile` returned",
        "a compiled base is specialised to the batches of all stages so far, and is refused",
        "promise 4",
        "2.6 to 2.15",
        "once torch says in public whether a module is compiled",
    ),
    "attention": Seam(
        "transformers",
        "`_attn_implementation` of a model's config",
        "cached states are of the kernel that computes now",
        "promise 4",
        TRANSFORMERS,
        "once a config says so under a public name",
    ),
    "two_trunks": Seam(
        "transformers",
        "`is_encoder_decoder` of a model's config",
        "an activation cache holds the states of one trunk",
        "promise 4",
        TRANSFORMERS,
        "never: it is public, and only has to be there",
    ),
    "layer_drop": Seam(
        "transformers",
        "the names of settings by which models leave layers out (`LAYER_DROPS`)",
        "an activation cache refuses them before the first row",
        "comfort: an error at once, not at the first layer that is left out",
        TRANSFORMERS,
        "once models agree on a name",
    ),
    "tokenizer_rules": Seam(
        "transformers",
        "`backend_tokenizer` of fast tokenizers",
        "a tokenizer that works otherwise is another recipe",
        "promise 4",
        TRANSFORMERS,
        "never: it is public, and only has to be there",
    ),
    "silent_arguments": Seam(
        "transformers",
        "the names of arguments that change no bit (`SILENT`, `CHOOSING`)",
        "a recipe holds all that changes bits; a name that is not listed is taken for one that does",
        "promise 4",
        TRANSFORMERS,
        "once arguments say what they are for",
    ),
    "refused_arguments": Seam(
        "transformers",
        "the names of arguments that are refused",
        "what can not work stage by stage is refused, not ignored",
        "promises 1 and 4",
        TRANSFORMERS,
        "never: they are public, and only have to be there",
    ),
    "refused_arguments_of_trl": Seam(
        "trl",
        "the names `packing` and `padding_free`",
        "what joins rows of different slices is refused, not ignored",
        "promise 2",
        TRL,
        "never: they are public, and only have to be there",
    ),
    "trainer": Seam(
        "transformers",
        "the private methods, attributes and arguments of the `Trainer` that `seams/trainer.py` lists",
        "stages train one after another in one Trainer, and their checkpoints are found, guarded and never pushed",
        "promises 1, 5 and 7",
        TRANSFORMERS,
        "method by method, once there are callbacks that can do the same",
    ),
    "checkpoints": Seam(
        "transformers",
        "the name of a checkpoint's folder",
        "a checkpoint that was not wholly written is never resumed",
        "promise 5",
        TRANSFORMERS,
        "once `on_save` says which folder was written",
    ),
    "neftune": Seam(
        "transformers",
        "`neftune_hook_handle` of the `Trainer`",
        "a stage that a deletion stops leaves no noise to the next one",
        "promise 4",
        TRANSFORMERS,
        "once the Trainer takes its hook back after an error, too",
    ),
    "accelerator": Seam(
        "accelerate",
        "`scaler`, and `gradient_state` with its `sync_gradients` and `dataloader_references`",
        "a stage begins from its recipe, its examples and its parent, and from nothing that an earlier one left",
        "promises 3 and 4",
        "1.15",
        "once a Trainer can be told to begin afresh",
    ),
    "callbacks": Seam(
        "transformers",
        "the list `callbacks` of the `CallbackHandler`, and when callbacks are told",
        "a guard looks at what trains, and for deletions, at every optimizer step",
        "promises 1 and 3",
        TRANSFORMERS,
        "never: the events are public, and only have to come",
    ),
    "callback_events": Seam(
        "transformers",
        "`CallbackHandler.call_event`",
        "callbacks are told which stage trains, and trackers see one run",
        "comfort: `stage` in the arguments of callbacks, one run for trackers",
        TRANSFORMERS,
        "once callbacks can be told more from outside",
    ),
    "trackers": Seam(
        "transformers",
        "`get_reporting_integration_callbacks` and `TensorBoardCallback.logging_dir`",
        "trackers see one run, and tensorboard writes beside the store",
        "comfort: one run for trackers, tensorboard beside the store",
        TRANSFORMERS,
        "once both are documented",
    ),
    "progress": Seam(
        "transformers",
        "`ProgressCallback.training_bar`",
        "one progress bar over the whole plan",
        "comfort: logs that are printed above the progress bar",
        TRANSFORMERS,
        "once the progress bar is documented",
    ),
    # ---- answering: layers, caches, pipelines ----
    "rows_of_arguments": Seam(
        "transformers",
        "the names of arguments of one dimension (`WHOLE`, `BY_ROW`)",
        "some have a value per row, some have not; a name that is not listed is refused",
        "answers of several members",
        TRANSFORMERS,
        "once models say which dimension of an argument is the batch",
    ),
    "lora_by_views": Seam(
        "peft",
        "`lora_A`, `lora_B`, `lora_dropout` and `scaling` of its `Linear`, and how it multiplies them",
        "rows of one member lie together, and PEFT gathers and scatters them one by one",
        "speed: up to a third of a forward pass",
        PEFT,
        "once PEFT takes adjacent rows by views",
    ),
    "models_loss": Seam(
        "transformers",
        "`loss_function` of models, and the name of models for multiple choice, which have none",
        "the loss of an ensemble follows from its averaged logits",
        "the served model's evaluation",
        TRANSFORMERS,
        "never: it is public, and only has to be there",
    ),
    "logits": Seam(
        "transformers",
        "the names of outputs, `logits` and `..._logits`",
        "they are what is averaged over the members",
        "answers of several members",
        TRANSFORMERS,
        "never: they are public, and only have to be there",
    ),
    "fused_head": Seam(
        "trl",
        "the argument `fused_lm_head`, and the values that it asks for instead of logits",
        "`SFTTrainer` evaluates a model by them",
        "the served model's evaluation",
        TRL,
        "once TRL computes them from logits",
    ),
    "pipelines": Seam(
        "transformers",
        "`SUPPORTED_PEFT_TASKS` of pipelines",
        "a pipeline logs an error about classes that it does not know",
        "comfort: a log without that error",
        TRANSFORMERS,
        "once pipelines take any model that generates",
    ),
    "activation_checkpointing": Seam(
        "transformers",
        "`is_activation_checkpointing` of models, and which layers are `GradientCheckpointingLayer`s",
        "a layer that is run again from outside would not be fed its cached states",
        "promise 4",
        TRANSFORMERS,
        "never: they are public, and only have to be there",
    ),
    # ---- the Hub ----
    "http_library": Seam(
        "huggingface_hub",
        "the library with `HTTPError` and `TransportError` that `HfHubHTTPError` inherits from",
        "a request that failed is told from one whose answer was lost, and what may have arrived is looked for",
        "promise 7",
        HUB,
        "once huggingface_hub exports an error of its own for a Hub that can not be reached",
    ),
    "upload_mode": Seam(
        "huggingface_hub",
        "`CommitOperationAdd._upload_mode` after `preupload_lfs_files`",
        "weights that git itself would keep are refused before the commit, as no purge removes them",
        "promise 7",
        HUB,
        "once the operation says in public how it was uploaded; the tree after the commit says it too late",
    ),
    "large_file_listing": Seam(
        "huggingface_hub",
        "the route `api/models/{repo}/lfs-files` and its fields `fileOid` and `size`",
        "every stored large file is seen, also one that no revision names; `list_lfs_files` fails at one without name",
        "promise 7",
        HUB,
        "once `HfApi.list_lfs_files` accepts files without a name",
    ),
    "large_file_deletion": Seam(
        "huggingface_hub",
        "`permanently_delete_lfs_files(repo_id, lfs_files, rewrite_history)`, which reads `file_oid` alone",
        "contents are deleted of which only the sha256 is known",
        "promise 7",
        HUB,
        "once the client deletes large files by their sha256",
    ),
    "own_requests": Seam(
        "huggingface_hub",
        "`utils.get_session` (an httpx client), `utils.build_hf_headers`, the routes `discussions/{n}/ref` and "
        "`info/lfs/objects/batch`, and the headers `x-linked-etag` and `x-error-code`",
        "refs of pull requests are removed, and probes see what the Hub answers, not what a client makes of it",
        "promise 7",
        HUB,
        "once the client has methods for them that tell a file that is gone from a repository that is hidden",
    ),
    "cache_layout": Seam(
        "huggingface_hub",
        "the layout of its cache: `models--me--model/{refs,snapshots,trees,blobs}`, `chunk-cache`, `shard-cache`",
        "old revisions are removed from the disk of whoever deletes, and what else lies there is named",
        "promise 7",
        HUB,
        "once `scan_cache_dir` knows of lists of revisions, broken downloads and the Xet cache",
    ),
}
"""Every seam by its name."""
