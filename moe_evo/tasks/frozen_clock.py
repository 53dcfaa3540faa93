"""Chat templates whose clock stands still.

Some templates write today's date. A run that is continued another day, or on a node of another time zone, would mix
two prompts, and two runs could not be compared. So for every template it is noon of the same day.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime

FROZEN_TIME = datetime(2025, 1, 1, 12, tzinfo=UTC)

_DIRECTIVE = re.compile(r"%[-_0^#]?[A-Za-z]")
_CLOCK = "strftime_now"
"""The only function that a template has to ask for the time; transformers gives it to all."""


def with_frozen_clock(template: str) -> str:
    """The chat template, in which `strftime_now` tells FROZEN_TIME; others than those that call it are unchanged."""
    if _CLOCK not in template:
        return template
    written = {one: FROZEN_TIME.strftime(one) for one in sorted(set(_DIRECTIVE.findall(template)))}
    filters = "".join(f"|replace({directive!r}, {text!r})" for directive, text in written.items())
    macro = f"{{% macro {_CLOCK}(format) %}}{{{{ format|replace('%%', '\\0'){filters}|replace('\\0', '%') }}}}"
    # the empty expression keeps a first empty line of the template, which a block before it would take away
    return f"{macro}{{% endmacro %}}{{{{ '' }}}}{template}"
