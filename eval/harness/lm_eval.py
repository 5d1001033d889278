"""The harness's own command line, with the model ``distill`` and this project's task files known to it.

python -m eval.harness.lm_eval --model distill --model_args pretrained=runs/quickstart/logits --tasks recall
"""

import sys

from lm_eval.__main__ import cli_evaluate

from distill.programs import report_user_errors
from eval.harness import model
from eval.harness.names import TASKS


@report_user_errors()
def main() -> None:
    """As ``lm_eval``; ``--include_path`` is this project's folder of tasks unless it is given."""
    model.register()
    if not any(word.startswith("--include_path") for word in sys.argv) and "--tasks" in sys.argv:
        sys.argv += ["--include_path", str(TASKS)]
    cli_evaluate()


if __name__ == "__main__":
    main()
