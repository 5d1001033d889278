"""Before anything else: the recipe's text goes to disk as token blocks.

    python -m stages.prepare recipes/quickstart.yaml

Every stage does this by itself when the blocks are not there; this program is for doing it earlier, on a machine
without a GPU. Whenever it is killed, the same command goes on.
"""

from distill.engines import processes
from distill.run import Run
from stages.command import run_program


def main(run: Run) -> None:
    train, held_out = run.blocks
    if processes.is_main():
        print(f"{run.folder('data')}: {train.n_tokens:,} training tokens, {held_out.n_tokens:,} held out")


if __name__ == "__main__":
    run_program(main, "Tokenise a recipe's text, so that training can start at once.")
