"""What is used of Ray that is not typed or not public.

Ray is imported here as Any, because its annotations do not cover `remote`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray as _library

from moe_evo.errors import ClusterError
from moe_evo.versions import ADVICE

ray: Any = _library
ActorHandle = Any
"""An actor whose methods are called with `.remote(...)`."""


def free_by_node() -> Mapping[str, Mapping[str, float]]:
    """What is free on each node of the connected cluster, by node id; no public name of Ray's tells it."""
    try:
        available = ray._private.state.available_resources_per_node
    except AttributeError as error:
        raise ClusterError(
            f"Ray {ray.__version__} has no available_resources_per_node, where what is free on each node was "
            f"expected; {ADVICE}"
        ) from error
    found: Mapping[str, Mapping[str, float]] = available()
    return found


def free_in_words() -> str:
    """GPUs and CPUs that are free on the connected cluster."""
    free = ray.available_resources()
    return ", ".join(f"{name} {free[name]:g}" for name in ("GPU", "CPU") if name in free) or "nothing"
