"""Whether the harness is there, asked without importing it, which takes seconds."""

import importlib.util

from distill.errors import UserError


def require_harness() -> None:
    """Raises UserError where lm-evaluation-harness is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("lm-evaluation-harness is not installed; pip install 'distill-ssm[eval]', or lm-eval")
