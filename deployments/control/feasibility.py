"""Whether any node of a cluster could ever run a replica. Pure.

The check uses the total resources of a node, not the free ones. A replica that waits for others to
end is starting; a replica that no node could ever take is infeasible.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

_SPREAD_APART: Final = "STRICT_SPREAD"
_ON_ONE_NODE: Final = "STRICT_PACK"
_CHOICE: Final = re.compile(r"(?P<not>!?)in\((?P<values>[^)]*)\)")


@dataclass(frozen=True, slots=True)
class Node:
    """One node: its total resources, as Ray counts them, and its labels."""

    resources: Mapping[str, float]
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Bundle:
    """Resources and labels that one node must have.

    ``labels`` are alternatives, one of which has to match. Each is a Ray label selector (values
    ``value``, ``!value``, ``in(a, b)``, ``!in(a, b)``).
    """

    resources: Mapping[str, float]
    labels: tuple[Mapping[str, str], ...] = ({},)

    def fits(self, node: Node) -> bool:
        """Return whether a node could take this bundle if the node were empty."""
        return not self._lacks(node)

    def missing(self, nodes: Iterable[Node]) -> str:
        """Return the requirements that no node meets; empty if some node could take the bundle."""
        lacks = [self._lacks(node) for node in nodes]
        if not all(lacks):
            return ""
        wanted = self._entries()
        nowhere = [entry for entry in wanted if all(entry in lack for lack in lacks)]
        if nowhere:
            return ", ".join(nowhere)
        return f"{', '.join(wanted)} on one node"

    def _lacks(self, node: Node) -> set[str]:
        lacks = {
            f"{name}: {amount:g}"
            for name, amount in self.resources.items()
            if node.resources.get(name, 0.0) < amount
        }
        if not any(_matches(selector, node.labels) for selector in self.labels):
            lacks.add(self._labels_entry())
        return lacks

    def _entries(self) -> list[str]:
        asked = [f"{name}: {amount:g}" for name, amount in self.resources.items() if amount]
        return [*asked, self._labels_entry()] if any(self.labels) else asked

    def _labels_entry(self) -> str:
        ways = (", ".join(f"{name}={value}" for name, value in one.items()) for one in self.labels)
        return f"label {' or '.join(ways)}"


@dataclass(frozen=True, slots=True)
class Need:
    """What one replica needs: one bundle, or its placement group's bundles and their strategy."""

    bundles: tuple[Bundle, ...]
    strategy: str = "PACK"

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Need:
        """Return what a replica with these deployment options needs.

        Args:
            options: ``ray_actor_options``, merged with Serve's ``placement_group_bundles``,
                ``placement_group_strategy`` and ``placement_group_bundle_label_selector``, as in a
                config file.
        """
        bundles = options.get("placement_group_bundles")
        if not bundles:
            return cls((_actor_bundle(options),))
        labels = options.get("placement_group_bundle_label_selector") or []
        if len(labels) == 1:
            labels = labels * len(bundles)
        selectors = [*labels, *({} for _ in bundles)]
        pairs = zip(bundles, selectors, strict=False)
        strategy = options.get("placement_group_strategy") or "PACK"
        return cls(tuple(Bundle(one, (selector,)) for one, selector in pairs), strategy)

    def missing(self, nodes: Iterable[Node]) -> str:
        """Return what the nodes do not offer; empty if they could take a replica.

        Bundles that may share a node are checked one by one. So whatever is reported missing is
        missing, but an empty result does not prove that all bundles fit together.
        """
        nodes = tuple(nodes)
        if self.strategy == _ON_ONE_NODE:
            return self._together().missing(nodes)
        for bundle in self.bundles:
            if missing := bundle.missing(nodes):
                return missing
        fitting = sum(any(bundle.fits(node) for bundle in self.bundles) for node in nodes)
        if self.strategy == _SPREAD_APART and fitting < len(self.bundles):
            return f"{len(self.bundles)} such nodes"
        return ""

    def _together(self) -> Bundle:
        resources: dict[str, float] = {}
        labels: dict[str, str] = {}
        for bundle in self.bundles:
            for name, amount in bundle.resources.items():
                resources[name] = resources.get(name, 0.0) + amount
            labels |= bundle.labels[0]
        return Bundle(resources, (labels,))


def _actor_bundle(options: Mapping[str, Any]) -> Bundle:
    kind = options.get("accelerator_type")
    resources = {
        "CPU": options.get("num_cpus"),
        "GPU": options.get("num_gpus"),
        "memory": options.get("memory"),
        **(options.get("resources") or {}),
        # Ray itself requests this smallest possible amount.
        **({f"accelerator_type:{kind}": 0.001} if kind else {}),
    }
    others = (one.get("label_selector") or {} for one in options.get("fallback_strategy") or ())
    return Bundle(
        {name: float(amount) for name, amount in resources.items() if amount},
        (options.get("label_selector") or {}, *others),
    )


def _matches(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    return all(_matches_value(wanted, labels.get(name)) for name, wanted in selector.items())


def _matches_value(wanted: str, value: str | None) -> bool:
    if choice := _CHOICE.fullmatch(wanted):
        values = [one.strip() for one in choice["values"].split(",")]
        return (value in values) is not bool(choice["not"])
    if wanted.startswith("!"):
        return value != wanted[1:]
    return value == wanted
