"""Rules: how blocks get their auxiliary networks. A further rule is one file with a `RULE`, and its line here."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from edgelocal.bundle.spec import RuleSpec
from edgelocal.errors import UsageError
from edgelocal.exporters.guest import network_errors
from edgelocal.exporters.rules import auglocal, bp, linear
from edgelocal.exporters.rules.base import LocalBlock, Place, Rule
from edgelocal.exporters.units import Network, seeded

__all__ = ["LocalBlock", "Place", "Rule", "build_blocks", "find", "names"]

_RULES: dict[str, Rule] = {module.RULE.name: module.RULE for module in (auglocal, linear, bp)}


def names() -> tuple[str, ...]:
    """Every name `find` knows."""
    return tuple(_RULES)


def find(name: str) -> Rule:
    """The rule called `name`.

    Raises:
        UsageError: there is none.
    """
    if name not in _RULES:
        close = difflib.get_close_matches(name, _RULES, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise UsageError(f"no rule is called {name!r}{hint}; there are {', '.join(_RULES)}")
    return _RULES[name]


def build_blocks(
    network: Network, rule: RuleSpec, cut: tuple[range, ...], seed: int, depths: Sequence[int] | None = None
) -> tuple[LocalBlock, ...]:
    """Cut `network` at `cut`, contiguous ranges of unit indices, and put an auxiliary behind every block but the last.

    Auxiliaries are drawn from `seed`, each from a stream of its own. `depths` gives the depth of each; without it the
    rule chooses.

    Raises:
        UsageError: an unknown rule or bad settings, a cut that does not cover the units in order, several blocks under
            a rule that knows one, or depths that do not go with the blocks or the rule.
        ExportError: an auxiliary cannot be made for this network.
    """
    builder = find(rule.name).auxiliary
    if [index for span in cut for index in span] != list(range(len(network.units))) or not all(cut):
        raise UsageError(f"the blocks {[*cut]} do not cover the {len(network.units)} units of {network.name} in order")
    if builder is None and len(cut) > 1:
        raise UsageError(f"rule {rule.name} trains the network as one block, found {len(cut)}; leave --blocks out")
    _check_depths(rule.name, len(cut) - 1, depths)
    digits = max(2, len(str(len(cut) - 1)))
    blocks = []
    for index, span in enumerate(cut):
        name = str(index).zfill(digits)
        auxiliary = None
        if builder is not None and index < len(cut) - 1:
            with seeded(seed, f"aux/{name}"), network_errors(f"building the auxiliary network of block {name}"):
                auxiliary = builder(network, Place(span[-1], index, len(cut), depths[index] if depths else None), rule)
        blocks.append(LocalBlock(name, network, span, auxiliary))
    return tuple(blocks)


def _check_depths(rule: str, expected: int, depths: Sequence[int] | None) -> None:
    if depths is None:
        return
    if find(rule).depths is None:
        raise UsageError(f"the auxiliary networks of rule {rule} have no depth, found {[*depths]}; give none")
    if len(depths) != expected or min(depths, default=1) < 1:
        raise UsageError(
            f"found the auxiliary depths {[*depths]}, expected {expected} of at least 1, one for every block but the "
            "last"
        )
