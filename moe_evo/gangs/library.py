"""The border to Ray: its name as Any, as its annotations do not know what `remote` does to a class."""

from __future__ import annotations

from typing import Any

import ray as _library

ray: Any = _library
ActorHandle = Any
"""An actor whose methods are called with `.remote(...)`."""
