"""What a Serve application is made of, before it is deployed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def deployments_of(application: Any) -> Iterator[Any]:
    """Yield the deployments that an application is made of, each with what it is bound to."""
    rest = [application]
    while rest:
        deployment = rest.pop()._bound_deployment
        yield deployment
        for value in [*deployment.init_args, *deployment.init_kwargs.values()]:
            inner = value.values() if isinstance(value, dict) else [value]
            rest += [item for item in inner if isinstance(item, type(application))]
