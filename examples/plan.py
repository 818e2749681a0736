"""Compares plans before anything is trained: `python examples/plan.py`."""

from hf_s3t import S3TPlanner

planner = S3TPlanner(examples=52_002, requests_per_day=0.5, horizon_days=365, shards=2, slices=4)
best = planner.recommended
if best is None:
    print("no plan keeps enough for these numbers: fewer requests, more shards, or repairs more often")
else:
    print(best.setting.config)
    print(f"training costs {best.training_cost} slice passes, {best.stages} stages are stored")
    print(f"about {best.first_dead:.0f} requests until a shard is dead, if nothing is repaired")
