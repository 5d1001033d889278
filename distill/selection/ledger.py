"""What has been measured so far, in a file: a selection that was killed goes on where it stopped.

    {"of": "…", "measured": {"kl 3": {"kl": 0.41, "tokens": 16384}}}

``of`` is a digest of all that the numbers depend on. Where it differs, the file is another selection's and is begun
anew: numbers of different students or texts are never ranked together.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distill.atomic import replace_file

Fields = dict[str, Any]


class Ledger:
    """Measures by name; each is written to the file as soon as it is there.

    Attributes:
        measured: all that is there, whoever asked for it.
        asked: what this object was asked for, whether it was measured now or before.
    """

    def __init__(self, path: Path, *of: object) -> None:
        self.path, self.of = path, hashlib.sha256(json.dumps([str(one) for one in of]).encode()).hexdigest()
        self.measured: dict[str, Fields] = {}
        self.asked: set[str] = set()
        try:
            found = json.loads(path.read_text())
            self.measured = found["measured"] if found["of"] == self.of else {}
        except (OSError, ValueError, KeyError, TypeError):
            pass  # none yet, or one that cannot be read: all is measured again

    def measure(self, name: str, make: Callable[[], Fields]) -> Fields:
        """What was measured under this name, now or before; plain data, with the ``tokens`` that it took."""
        self.asked.add(name)
        if name not in self.measured:
            self.measured[name] = make()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self.path, json.dumps({"of": self.of, "measured": self.measured}, indent=1).encode())
        return self.measured[name]

    @property
    def tokens(self) -> int:
        """Of all that was asked for, each once."""
        return sum(self.measured[name]["tokens"] for name in self.asked)
