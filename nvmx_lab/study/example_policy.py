"""A sync policy in a file of its own: what the last exit needed, the next one will need."""

from nvmx_lab.nested.policies import Predictor, register


@register("last-exit")
class LastExit(Predictor):
    """Learns whether L1 needed a rare field after the last exit."""

    meaning = "eager if L1 needed a rare field after the exit before, else lazy"
    first = False

    def expect(self, learned: bool, reason: str) -> bool:
        """Expect the same again."""
        return learned

    def learn(self, learned: bool, reason: str, *, needed: bool) -> bool:
        """Keep what came."""
        return needed
