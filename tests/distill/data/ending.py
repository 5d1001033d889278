"""A tokenizer that ends the process that uses it; this file imports nothing that would make that slow."""

import os
import signal


class Ending:
    """Pickled like a tokenizer and called like one."""

    def __init__(self, how: str) -> None:
        self.how = how

    def __call__(self, texts: list[str], **options: object) -> dict:
        if self.how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("cannot tokenise this")
