"""What llama.cpp says to a GGUF file, for the tests: a program of its own, since llama.cpp ends its process on errors.

It runs where the binding xllamacpp is installed (``pip install xllamacpp``: wheels with llama.cpp inside) and prints,
as JSON, for every prompt the number of its tokens and each next token's log-probabilities, of all tokens.
"""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

INSTALLED = find_spec("xllamacpp") is not None
REASON = "llama.cpp is not installed: pip install xllamacpp"


def complete(
    file: Path, prompts: list[str | list[int]], new_tokens: int, vocabulary: int, forced: int | None = None
) -> list[dict[str, Any]]:
    """For each prompt ``{"n_prompt": …, "tokens": [ids], "logprobs": [{id: log-probability}]}``, greedily.

    The server reports text: it keeps back bytes that are no letter yet, and the end of the text, with their
    log-probabilities. With ``forced`` this token is chosen whatever the model says, which changes no log-probability.
    """
    request = json.dumps([str(file), prompts, new_tokens, vocabulary, forced])
    done = subprocess.run([sys.executable, __file__], input=request, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def _answer(
    file: str, prompts: list[str | list[int]], new_tokens: int, vocabulary: int, forced: int | None
) -> list[dict[str, Any]]:
    import xllamacpp

    wanted = xllamacpp.CommonParams()
    wanted.model.path = file
    wanted.n_ctx, wanted.n_parallel, wanted.cpuparams.n_threads, wanted.warmup = 256, 1, 1, False
    # Keys and values in fp32, as in PyTorch; by default they are rounded to fp16.
    wanted.cache_type_k = wanted.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    wanted.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(wanted)
    kind: dict[str, Any] = {"n_predict": new_tokens, "temperature": 0, "n_probs": vocabulary}
    kind |= {"post_sampling_probs": False, "logit_bias": [] if forced is None else [[forced, 1000.0]]}
    answers = []
    for prompt in prompts:
        answer = server.handle_completions({"prompt": prompt, **kind})
        steps = answer["choices"][0]["logprobs"]["content"]
        answers.append(
            {
                "n_prompt": answer["usage"]["prompt_tokens"],
                "tokens": [step["id"] for step in steps],
                "logprobs": [{each["id"]: each["logprob"] for each in step["top_logprobs"]} for step in steps],
            }
        )
    return answers


if __name__ == "__main__":
    print(json.dumps(_answer(*json.loads(sys.stdin.read()))))
