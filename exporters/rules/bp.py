"""Plain backpropagation: the whole network as one block, no auxiliary. What every other rule is compared with."""

from __future__ import annotations

from edgelocal.exporters.rules.base import Rule

RULE = Rule("bp", auxiliary=None)
