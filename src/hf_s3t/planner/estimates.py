"""What a simulation found: means over streams, with how far they can be trusted."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

BAND = (0.05, 0.95)  # of the streams


@dataclass(frozen=True)
class Estimate:
    """A mean over independent streams.

    Args:
        mean (`float`): The mean.
        standard_error (`float`): Its standard error.
        low (`float`): Lower end of the 95 % confidence interval, by Student's t.
        high (`float`): Upper end.
    """

    mean: float
    standard_error: float
    low: float
    high: float

    @classmethod
    def of(cls, values: np.ndarray) -> "Estimate":
        """The mean of one number per stream.

        >>> Estimate.of(np.array([1, 3])).standard_error
        1.0
        """
        return cls._around(float(values.mean()), float(values.std(ddof=1)) / len(values) ** 0.5, len(values))

    @classmethod
    def of_ratio(cls, values: np.ndarray, counts: np.ndarray) -> "Estimate":
        """The sum of the values over the sum of the counts; the error by the delta method.

        >>> Estimate.of_ratio(np.array([2.0, 4.0]), np.array([1, 2]))
        Estimate(mean=2.0, standard_error=0.0, low=2.0, high=2.0)
        """
        ratio = float(values.sum() / counts.sum())
        error = float((values - ratio * counts).std(ddof=1) / counts.mean()) / len(values) ** 0.5
        return cls._around(ratio, error, len(values))

    @classmethod
    def _around(cls, mean: float, error: float, number: int) -> "Estimate":
        reach = _quantile(number - 1) * error
        return cls(mean, error, mean - reach, mean + reach)


@dataclass(frozen=True, eq=False)
class Curve:
    """A number that changes along the streams, one entry per step.

    Args:
        mean (`np.ndarray`): The mean over the streams.
        standard_error (`np.ndarray`): Its standard error.
        low (`np.ndarray`): Lower end of the 95 % confidence interval of the mean.
        high (`np.ndarray`): Upper end.
        band (`np.ndarray`): Between which two numbers the middle 90 % of the streams lie, `(2, steps)`.
    """

    mean: np.ndarray
    standard_error: np.ndarray
    low: np.ndarray
    high: np.ndarray
    band: np.ndarray

    @classmethod
    def of_counts(cls, counts: np.ndarray) -> "Curve":
        """From the number of streams with the value 0, 1, 2, ... at each step, `(steps, values)`.

        >>> Curve.of_counts(np.array([[0, 0, 2], [1, 0, 1]])).mean
        array([2., 1.])
        """
        streams = int(counts[0].sum())
        values = np.arange(counts.shape[1])
        total, squares = counts @ values, counts @ values**2
        mean = total / streams
        error = np.sqrt(np.maximum(squares - total * mean, 0) / (streams - 1) / streams)
        reach = _quantile(streams - 1) * error
        below = counts.cumsum(axis=1)
        band = np.stack([(below >= share * streams).argmax(axis=1) for share in BAND])
        return cls(mean, error, mean - reach, mean + reach, band)

    @classmethod
    def joined(cls, parts: "Sequence[Curve]", steps: int) -> "Curve":
        """The parts one after the other, cut to a number of steps."""
        names = [field.name for field in fields(cls)]
        return cls(*(np.concatenate([getattr(part, name) for part in parts], axis=-1)[..., :steps] for name in names))


@dataclass(frozen=True, eq=False)
class Simulation:
    """What happened to the streams.

    A stream ends at the horizon or, where nothing is ever repaired, when nothing is left. The first fields have one
    number per stream; the estimates over them are properties.

    Args:
        requests (`np.ndarray`): Requests until the stream ended.
        first_dead (`np.ndarray`): The request after which some shard was dead for the first time; 0: there was none.
        all_dead (`np.ndarray`): The request after which all shards were dead at once; 0: there was none.
        repairs (`np.ndarray`): Repairs that trained something; shards repaired at the same moment count as one.
        repair_cost (`np.ndarray`): What they cost, in slice passes.
        days (`np.ndarray`, *optional*): Days until the stream ended. `None` without a rate.
        training_cost (`int`): What training before the first request costs, in slice passes.
        slices_in_use (`Curve`): The summed lengths of the served prefixes after 0, 1, 2, ... requests and the repair
            that followed at once, up to the smallest number of requests that ended a stream at the horizon.
        slices_in_use_by_day (`Curve`, *optional*): The same at the end of day 0, 1, 2, ..., before a repair that falls
            on that moment. `None` without a horizon in days.
    """

    requests: np.ndarray
    first_dead: np.ndarray
    all_dead: np.ndarray
    repairs: np.ndarray
    repair_cost: np.ndarray
    days: np.ndarray | None
    training_cost: int
    slices_in_use: Curve
    slices_in_use_by_day: Curve | None

    @property
    def requests_until_first_dead(self) -> Estimate | None:
        """`None` if some stream ended before: then see `first_dead_share`."""
        return Estimate.of(self.first_dead) if self.first_dead.all() else None

    @property
    def requests_until_all_dead(self) -> Estimate | None:
        """`None` if some stream ended before: then see `all_dead_share`."""
        return Estimate.of(self.all_dead) if self.all_dead.all() else None

    @property
    def first_dead_share(self) -> Estimate:
        """The share of streams in which some shard was dead before the end."""
        return Estimate.of(self.first_dead > 0)

    @property
    def all_dead_share(self) -> Estimate:
        """The share of streams in which all shards were dead at once before the end."""
        return Estimate.of(self.all_dead > 0)

    @property
    def repair_cost_per_request(self) -> Estimate:
        """Slice passes of repairs per request: what a longer horizon tends to."""
        return Estimate.of_ratio(self.repair_cost, self.requests)

    @property
    def cost_per_request(self) -> Estimate:
        """Slice passes per request, the training before the first one included."""
        return Estimate.of_ratio(self.repair_cost + self.training_cost, self.requests)

    @property
    def requests_between_repairs(self) -> Estimate | None:
        """All requests over all repairs. `None` if there was no repair."""
        return Estimate.of_ratio(self.requests, self.repairs) if self.repairs.any() else None

    @property
    def days_between_repairs(self) -> Estimate | None:
        """All days over all repairs. `None` if there was no repair, or no rate."""
        return Estimate.of_ratio(self.days, self.repairs) if self.days is not None and self.repairs.any() else None


def _quantile(freedom: int) -> float:
    """Student's t below which 97.5 % lie."""
    from scipy.special import stdtrit  # takes longer to import than a plan of two slices to judge

    return float(stdtrit(freedom, 0.975))
