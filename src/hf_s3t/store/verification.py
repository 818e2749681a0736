"""`S3TStore.verify`: an audit of what is there; if asked for, stages are trained again, and all bytes are searched.

The checks are `audit.py`'s, the retraining is `retraining.py`'s, the search for texts `scan.py`'s.
"""

from __future__ import annotations

import os
from dataclasses import replace

from .audit import VerifyReport, verify
from .folder import StoreFolder
from .retraining import MakeTrainer, Retrain, chosen_stages, train_again
from .scan import scan_check


class Verifiable(StoreFolder):
    """A store that can be audited."""

    def verify(
        self,
        retrain: Retrain | None = None,
        *,
        sample: int | None = None,
        seed: int | None = None,
        make_trainer: MakeTrainer | None = None,
        scan_for: str | os.PathLike[str] | None = None,
    ) -> VerifyReport:
        """Tells what of the store's promises holds, what is broken, and what cannot be told; changes nothing.

        Args:
            retrain (`"all"` or `list[str]`, *optional*): live stages to train again from the remaining rows, each from
                the parent that the store has, and to compare byte for byte.
            sample (`int`, *optional*): draw so many of them instead.
            seed (`int`, *optional*): of the draw, to repeat one. `None`: a new draw, whose seed the report tells.
            make_trainer (`Callable`): for these. It is given an `output_dir` and returns a trainer with the model,
                arguments, config and train set that trained the store. It is called once.
            scan_for (`str` or `Path`, *optional*): a file of texts and ids, one a line (`.jsonl`: as JSON), which are
                looked for in every byte below the store and its state; see [`scan_check`].

        Returns:
            [`VerifyReport`]: its `influence_free` and `bit_equal` are the two grades of claim.

        Raises:
            StoreError: there is no store, or its manifest cannot be read.
            StoreLockedError: somebody kept changing it meanwhile.
            ValueError: a stage is not live, there is no `make_trainer`, or what is looked for is too short.
            RecipeError, StateError: nothing can be trained again with this trainer, or without state and key.
        """
        stages, drawn = chosen_stages(self, retrain, sample, seed)
        wanted = retrain is not None or sample is not None
        if wanted != (make_trainer is not None):
            raise ValueError("Give `make_trainer` together with `retrain` or `sample`, or none of them.")
        report = verify(self)
        if make_trainer is not None:
            rows, retrained = train_again(self, stages, make_trainer)
            report = replace(report, checks=(*report.checks, rows), retrained=retrained, seed=drawn)
        if scan_for is not None:
            report = replace(report, checks=(*report.checks, scan_check(self, scan_for)))
        return report
