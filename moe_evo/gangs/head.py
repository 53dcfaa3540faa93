"""The head of the Ray cluster that this process is connected to: whether it is still there.

Where it is gone, calls of Ray wait, until Ray ends the whole process after a minute, with a line and a code of its own.
What the driver of a run waits for is therefore asked for here.
"""

from __future__ import annotations

import time
from typing import Any

from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from moe_evo.errors import ClusterError
from moe_evo.gangs.ray_border import answers, ray

_STEP_S = 5.0
_TRY_S = 5.0
_PAUSE_S = 0.5
_LOST_S = 15.0


def answer_of(reference: Any, within_s: float) -> Any:
    """What `ray.get` returns; raises what it raises, and ClusterError where meanwhile the head is lost."""
    ends = time.monotonic() + within_s
    while True:
        left_s = max(ends - time.monotonic(), 0.0)
        try:
            return ray.get(reference, timeout=min(left_s, _STEP_S))
        except RayTaskError:
            raise  # the actor did answer
        except (GetTimeoutError, RayActorError) as error:  # either may mean the head, or the actor alone
            _check_head(error)
            if isinstance(error, RayActorError) or left_s <= _STEP_S:
                raise


def head_answers() -> bool:
    """Whether the head answers; False after 5 s."""
    return answers(ray.get_runtime_context().gcs_address, _TRY_S)


def _check_head(error: Exception) -> None:
    """Raise ClusterError where the head does not answer for 15 s; a network that fails for less ends no run."""
    started = time.monotonic()
    while not head_answers():
        silent_s = time.monotonic() - started
        if silent_s >= _LOST_S:
            raise ClusterError(
                f"the Ray cluster is gone (its head at {ray.get_runtime_context().gcs_address} did not answer for "
                f"{silent_s:.0f} s); run the same command again, on any cluster: it goes on where it stood"
            ) from error
        time.sleep(_PAUSE_S)
