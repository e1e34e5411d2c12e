"""Whether any node of a cluster could ever run a replica. Pure.

The check uses the total resources and the labels of each node (``ray.nodes()``), not the free
resources. A replica that waits for others to end is starting; a replica that no node could ever
take is infeasible. Serve's own status cannot tell: it reports both as ``UPDATING``, and names what
is free after 30 s.

Two facts come from private messages (``app.ray_compat``), because nothing public has them:

- The placement group of a replica. Serve's public details leave it out. Ray's
  ``placement_group_table`` knows that a group is infeasible, but neither its labels nor, except by
  names that Serve makes up, its pool. Without it, an engine on several nodes that a cluster can
  never take would be ``starting`` for ever, or ``frontline status`` could not name what is missing.
- What Ray's autoscaler can never bring. Without it, a model whose node is being added would be
  ``engine_not_offered``, and its requests would be refused meanwhile.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from app.ray_compat.cluster import AskedBundle, LabelChoice

_SPREAD_APART: Final = "STRICT_SPREAD"
_ON_ONE_NODE: Final = "STRICT_PACK"
_VALUES: Final = re.compile(r"in\(([^)]*)\)")


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
        return all(offered(node) for offered in self._requirements().values())

    def missing(self, nodes: Iterable[Node]) -> str:
        """Return the requirements that no node meets; empty if some node could take the bundle."""
        nodes = tuple(nodes)
        if any(map(self.fits, nodes)):
            return ""
        wanted = self._requirements()
        nowhere = [words for words, offered in wanted.items() if not any(map(offered, nodes))]
        return ", ".join(nowhere) if nowhere else f"{', '.join(wanted)} on one node"

    def asked(self) -> AskedBundle:
        """Return the bundle as an autoscaler that cannot bring it reports it."""
        resources = frozenset((name, amount) for name, amount in self.resources.items() if amount)
        return resources, frozenset(frozenset(_choices(one)) for one in self.labels if one)

    def _requirements(self) -> dict[str, Callable[[Node], bool]]:
        """Return each requirement in words, with the check whether a node meets it."""
        wanted: dict[str, Callable[[Node], bool]] = {
            f"{name}: {amount:g}": partial(_has, name, amount)
            for name, amount in self.resources.items()
            if amount
        }
        if all(self.labels):
            ways = (", ".join(f"{k}={v}" for k, v in one.items()) for one in self.labels)
            wanted[f"label {' or '.join(ways)}"] = partial(_matches, self.labels)
        return wanted


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
        labels = options.get("placement_group_bundle_label_selector") or [{}]
        if len(labels) == 1:
            labels = labels * len(bundles)
        strategy = options.get("placement_group_strategy") or "PACK"
        pairs = zip(bundles, labels, strict=True)
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

    def can_come(self, refused: Iterable[tuple[AskedBundle, ...]] | None) -> bool:
        """Return whether an autoscaler may still add the nodes that are missing.

        Args:
            refused: the requests that fit none of the nodes that it can add; ``None`` if no
                autoscaler runs.
        """
        own = Counter(bundle.asked() for bundle in self.bundles)
        return refused is not None and all(Counter(request) != own for request in refused)

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


def _has(name: str, amount: float, node: Node) -> bool:
    return node.resources.get(name, 0.0) >= amount


def _matches(selectors: Iterable[Mapping[str, str]], node: Node) -> bool:
    return any(
        all((node.labels.get(name) in values) is wanted for name, values, wanted in _choices(each))
        for each in selectors
    )


def _choices(selector: Mapping[str, str]) -> Iterable[LabelChoice]:
    for name, wanted in selector.items():
        values = wanted.removeprefix("!")
        found = _VALUES.fullmatch(values)
        words = found[1].split(",") if found else [values]
        yield name, frozenset(map(str.strip, words)), not wanted.startswith("!")
