"""What every rule builds on: the block as a module, and what a rule has to say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from edgelocal.bundle.spec import RuleSpec
from edgelocal.exporters.units import Network


@dataclass(frozen=True)
class Place:
    """Where an auxiliary network goes: behind unit `unit`, the last one of block number `block` of `blocks`.

    `depth` is the auxiliary depth if someone else chose it, None if the rule chooses.
    """

    unit: int
    block: int
    blocks: int
    depth: int | None = None


Auxiliary = Callable[[Network, Place, RuleSpec], nn.Module]
Depths = Callable[[int, RuleSpec], tuple[int, ...]]


@dataclass(frozen=True)
class Rule:
    """A rule for training blocks apart.

    `auxiliary` builds the network behind a block: (N, channels, ...) -> (N, classes); None means that the rule knows
    one block only. With `merges_tail` and tail "merge" the last depth + 1 units stay together in the last block.
    `depths` says how deep the rule wants the auxiliary networks of a number of blocks, all but the last one's; None
    means that they have no depth to choose.
    """

    name: str
    auxiliary: Auxiliary | None
    merges_tail: bool = False
    depths: Depths | None = None


class LocalBlock(nn.Module):
    """Consecutive units of a network with what trains them: an auxiliary network, or for the last the network's head.

    `body` holds the very modules of the network, so weights are shared with `network.module`.
    """

    def __init__(self, name: str, network: Network, span: range, auxiliary: nn.Module | None) -> None:
        super().__init__()
        units = network.units[span.start : span.stop]
        self.name = name
        self.unit_names = tuple(unit.name for unit in units)
        self.body = nn.Sequential(*(unit.module for unit in units))
        self.head = network.head if span.stop == len(network.units) else None
        self.auxiliary = auxiliary
        self._names = self._contract_names(network.module)
        self._places = self._module_names(network.module)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Block input -> (block output, logits (N, classes)); in the last block both are the logits.

        Nothing is detached here: the caller detaches the output before it feeds the next block.
        """
        h: Tensor = self.body(x)
        if self.head is not None:
            h = self.head(h)
        return h, h if self.auxiliary is None else self.auxiliary(h)

    def tensor_names(self) -> dict[str, str]:
        """Own state_dict key -> name in the original module, or aux/<block>/<name inside the auxiliary>."""
        return dict(self._names)

    def module_name(self, path: str) -> str:
        """Own path of a submodule ("body.0.conv1") -> its name in the original module, or aux/<block>/<name>.

        A module that only groups others has the name of the unit it makes.
        """
        return self._places[path]

    def _module_names(self, original: nn.Module) -> dict[str, str]:
        names = {id(part): name for name, part in original.named_modules()}
        units = {f"body.{index}": name for index, name in enumerate(self.unit_names)}
        return {
            path: f"aux/{self.name}/{path.removeprefix('auxiliary').removeprefix('.')}"
            if path.startswith("auxiliary")
            else names.get(id(part)) or units.get(path, path)
            for path, part in self.named_modules()
        }

    def _contract_names(self, original: nn.Module) -> dict[str, str]:
        # Reversed, so that of several names for one tensor the first is kept, as in named_parameters().
        names = {id(t): name for name, t in reversed(original.state_dict(keep_vars=True).items())}
        return {
            key: f"aux/{self.name}/{key.removeprefix('auxiliary.')}"
            if key.startswith("auxiliary.")
            else names[id(tensor)]
            for key, tensor in self.state_dict(keep_vars=True).items()
        }
