"""The served model in memory: one adapter per live shard, the members' probabilities averaged.

Members are switched in turn, each with its own head. The root adapter of several shards is something else: an average
of weights. Loading from a folder, forward and generation are here; what is served is decided by `folder.py`.
"""

from __future__ import annotations

import logging
import math
import os
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from torch import nn
from torch.nn.functional import logsigmoid
from transformers import DynamicCache
from transformers.modeling_outputs import ModelOutput

from .adapter import Adapter
from .card import AUTO_CLASSES
from .errors import StoreError
from .folder import StoreFolder

logger = logging.getLogger(__name__)


class S3TEnsemble(nn.Module):
    """Answers with the average of its members' probabilities.

    Args:
        model ([`~peft.PeftModel`] or `PreTrainedModel`): holds one loaded adapter per member.
        members (`list[str]`): names of those adapters; empty: the model answers as it is.
    """

    def __init__(self, model: nn.Module, members: list[str]):
        super().__init__()
        self.model: Any = model
        self.members = members

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike[str], base_model: nn.Module | str | None = None, **kwargs: Any
    ) -> S3TEnsemble:
        """Loads the served prefixes of a store onto a base model.

        Args:
            folder (`str` or `Path`): the store. It needs neither key nor state.
            base_model (`PreTrainedModel` or `str`, *optional*): the base, or where to load it from. `None`: the id
                that the store names.
            kwargs: for the base model's `from_pretrained`.

        Raises:
            StoreError: the store does not say which base it needs, or its files are damaged.
        """
        store = StoreFolder(folder)
        if not isinstance(base_model, nn.Module):
            base_model = _load_base(store, base_model, kwargs)
        members = read_members(store)
        model: Any = base_model
        for name, adapter in members.items():
            config = LoraConfig(**adapter.config)
            if model is base_model:
                model = get_peft_model(base_model, config, adapter_name=name)
            else:
                PeftModel.add_adapter(model, name, config)
            set_peft_model_state_dict(model, adapter.tensors, adapter_name=name)
        if not members:
            logger.warning("no stage of %s is live: the bare base model answers", folder)
        return cls(model, list(members)).eval()

    @property
    def config(self) -> Any:
        """The base model's config."""
        return self.model.config

    @property
    def _names(self) -> list[str | None]:
        return [*self.members] or [None]

    @property
    def device(self) -> torch.device:
        """Where the base model is."""
        return next(self.model.parameters()).device

    def forward(self, **batch: Any) -> ModelOutput:
        """Logits of the ensemble, `log(mean(softmax(logits)))` over the members; the loss follows from them.

        Args:
            batch: as for the base model; `labels` give a loss.
        """
        labels, items = batch.pop("labels", None), batch.pop("num_items_in_batch", None)
        by_token = batch.pop("fused_lm_head", False)  # how TRL's SFTTrainer asks, since 1.16
        averaged = self._average([self._member_logits(name, batch) for name in self._names])
        if by_token:
            return _by_token(averaged, labels)
        loss = None
        if labels is not None:
            loss = self._loss(averaged, labels, items)
        return ModelOutput(**({} if loss is None else {"loss": loss}), logits=averaged)

    def _member_logits(self, name: str | None, batch: dict[str, Any]) -> torch.Tensor:
        if name is not None:
            self.model.set_adapter(name, inference_mode=True)
        return self.model(**batch).logits

    def _average(self, logits: list[torch.Tensor]) -> torch.Tensor:
        if len(logits) == 1:
            return logits[0]
        problem = getattr(self.config, "problem_type", None)
        if problem == "regression" or logits[0].shape[-1] == 1:
            return torch.stack(logits).mean(dim=0)
        stacked = torch.stack([value.float() for value in logits])
        if problem == "multi_label_classification":  # a probability of its own per label: the logit of their mean
            return logsigmoid(stacked).logsumexp(dim=0) - logsigmoid(-stacked).logsumexp(dim=0)
        return stacked.log_softmax(-1).logsumexp(dim=0) - math.log(len(logits))

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor, items: Any) -> torch.Tensor:
        base = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        kwargs = {"logits": logits, "labels": labels, "config": base.config, "pooled_logits": logits}
        if items is not None:
            kwargs["num_items_in_batch"] = items
        return base.loss_function(**kwargs, vocab_size=getattr(base.config, "vocab_size", None))

    @torch.no_grad()
    def generate(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, max_new_tokens: int = 64
    ) -> torch.Tensor:
        """Greedy generation from the averaged probabilities, with a key-value cache per member.

        Args:
            input_ids (`torch.Tensor`): `(batch, sequence)`, padded on the left.
            attention_mask (`torch.Tensor`, *optional*): `(batch, sequence)`.
            max_new_tokens (`int`): most tokens to add.

        Returns:
            `torch.Tensor`: `(batch, sequence + new)`; after a row's end-of-sequence token come padding tokens.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        caches = {name: DynamicCache(config=self.config) for name in self._names}
        settings = self.model.generation_config
        ends = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
        pad = settings.pad_token_id if settings.pad_token_id is not None else 0
        running, step, sequence = torch.ones(len(input_ids), dtype=torch.bool), input_ids, input_ids
        for _ in range(max_new_tokens):
            positions = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -step.shape[1] :]
            batch = {"input_ids": step, "attention_mask": mask, "position_ids": positions, "use_cache": True}
            logits = [
                self._member_logits(name, {**batch, "past_key_values": cache})[:, -1] for name, cache in caches.items()
            ]
            chosen = self._average(logits).argmax(-1)
            chosen = torch.where(running.to(chosen.device), chosen, pad)
            sequence = torch.cat([sequence, chosen[:, None]], dim=1)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            stops = torch.tensor([end for end in ends if end is not None], device=chosen.device)
            running &= ~torch.isin(chosen, stops).cpu()
            step = chosen[:, None]
            if not running.any():
                break
        return sequence


def _by_token(logits: torch.Tensor, labels: Any) -> ModelOutput:
    """Instead of logits what TRL's fused head gives per predicted token; zero where there is no label."""
    log_probabilities, wanted = logits[:, :-1].float().log_softmax(-1), labels[:, 1:]
    mask = wanted != -100
    values = {
        "log_probs": log_probabilities.gather(-1, wanted.clamp(min=0)[..., None])[..., 0],
        "entropy": -(log_probabilities.exp() * log_probabilities).sum(-1),
        "is_top1": log_probabilities.argmax(-1) == wanted,
    }
    return ModelOutput(**{name: value.masked_fill(~mask, 0) for name, value in values.items()}, label_mask=mask)


def _load_base(store: StoreFolder, name: str | None, kwargs: dict[str, Any]) -> nn.Module:
    recipe = store.manifest().recipe
    name = name or recipe["base"]["id"]
    auto_class, _ = AUTO_CLASSES.get(recipe["config"]["task_type"], (None, None))
    if name is None or auto_class is None:
        raise StoreError(f"{store.path} does not say how to load its base model. Load it and pass `base_model=`.")
    return getattr(transformers, auto_class).from_pretrained(name, **kwargs)


def read_members(store: StoreFolder) -> dict[str, Adapter]:
    """The served prefix of every live shard, assembled, by the name that its adapter gets (`"shard-00"`)."""
    manifest = store.live()
    served = sorted(manifest.plan.served(manifest.stages).items())
    return {f"shard-{shard:02d}": store.assemble(shard, prefix, manifest) for shard, prefix in served}
