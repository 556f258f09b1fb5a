"""The one rule by which a claim gets its verdict."""

from collections.abc import Sequence

RULE = (
    "A claim is CONFIRMED or REFUTED where it was measured under the conditions that it names: its "
    "batch sizes, its model where it is about one, a machine that was not disturbed, at least two "
    "timed steps or two seeds, and a difference beyond their noise. Else it is NOT COMPARABLE, and "
    "what is missing is said. A range is confirmed from its weaker end on."
)
CONFIRMED, REFUTED, NOT_COMPARABLE = "confirmed", "refuted", "not comparable"


def judge(holds: bool, missing: Sequence[str] = ()) -> str:
    """The verdict of `RULE`; missing: the conditions of the claim that were not met."""
    return NOT_COMPARABLE if missing else CONFIRMED if holds else REFUTED
