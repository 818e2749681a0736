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
        """Audits the store: which promises hold, which are broken, and which could not be checked. Changes nothing.

        Args:
            retrain (`"all"` or `list[str]`, *optional*): live stages to train again and to compare byte for byte. Each
                starts from the parent in the store and trains on the remaining rows.
            sample (`int`, *optional*): instead, draw this many live stages at random.
            seed (`int`, *optional*): seed of the draw. `None`: a new one, which the report names.
            make_trainer (`Callable`): needed for both. It takes an `output_dir` and returns a trainer with the model,
                arguments, config and train set that trained the store. It is called once.
            scan_for (`str` or `Path`, *optional*): a file of texts and ids, one per line (`.jsonl`: as JSON). Every
                byte of the store and its state is searched for them; see [`scan_check`].

        Returns:
            [`VerifyReport`]: its `influence_free` and `bit_equal` are the two grades of claim.

        Raises:
            StoreError: there is no store, or its manifest cannot be read.
            StoreLockedError: somebody kept changing it during the audit.
            ValueError: a stage is not live, there is no `make_trainer`, or a text to look for is too short.
            RecipeError, StateError: this trainer does not fit the store, or state or key are missing.
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
