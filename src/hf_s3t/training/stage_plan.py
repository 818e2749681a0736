"""The tree of stages that a config asks for, and the seed of each stage."""

from __future__ import annotations

import hashlib
import logging

from ..lora.config import S3TConfig
from ..plan.bms import bms
from ..plan.optimal import optimal
from ..plan.sequences import select_sequences
from ..plan.tree import Plan, Stage

logger = logging.getLogger(__name__)


def make_plan(config: S3TConfig, seed: int) -> Plan:
    """The tree of stages that a config asks for; random orders differ between shards, the best ones do not."""
    num_slices, budget, prior = config.num_slices, config.budget, config.deletion_prior
    if config.sequence_selection == "optimal":
        best = optimal(num_slices, budget, config.cost_budget, prior)
        logger.info(
            "the plan keeps %.1f %% of what training every order would, over the whole life of a shard",
            100 * best.value / best.every_order,
        )
        return Plan.make(config.num_shards, num_slices, best.orders, prune=config.prune)
    numbers = [_number(f"orders of shard {shard}, seed {seed}") for shard in range(config.num_shards)]
    if config.sequence_selection == "bms":
        chosen = [bms(num_slices, config.sequences_wanted, prior, seed=number) for number in numbers]
    else:
        chosen = [select_sequences(config.sequence_selection, num_slices, budget, seed=number) for number in numbers]
    return Plan.make_per_shard(config.num_slices, chosen, prune=config.prune)


def stage_seed(seed: int, stage: Stage) -> int:
    """A stage's seed: a digest of the run's seed, the shard and the prefix, so that no other stage moves it."""
    return _number(f"seed {seed}, stage {stage.name}")


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1
