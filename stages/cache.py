"""Before stage 3: the teacher's predictions on the text that the stage will read go to disk, and the teacher may go.

    python -m stages.cache recipe.yaml stages.logits.offline_teacher.top_k=64

Several processes share the work. Whenever they are killed, the same command goes on. ``stages.logits`` writes what is
missing by itself; this program is for writing it elsewhere or earlier, on the machine that holds a large teacher.
"""

import time

from rich.console import Console

from distill.engines import processes
from distill.run import Run
from distill.teacher_cache.offline import complete_teacher_cache
from distill.units import size
from stages.command import run_program


def main(run: Run) -> None:
    started = time.perf_counter()
    cache = complete_teacher_cache(run)
    seconds = time.perf_counter() - started
    if processes.is_main():
        Console(highlight=False, markup=False, soft_wrap=True).print(
            f"{cache.folder}: {cache.tokens:,} tokens, {size(cache.n_bytes)} in {len(cache.shards)} shards,"
            f" {cache.n_bytes / cache.tokens:.1f} bytes a token\n"
            f"the top {cache.codec.k} of {cache.codec.vocabulary:,} tokens hold {cache.covered():.3%} of the teacher's"
            f" probability; {seconds:.0f} s"
        )


if __name__ == "__main__":
    run_program(main, "Write the teacher's top-k predictions to disk, for a logits stage with offline_teacher.")
