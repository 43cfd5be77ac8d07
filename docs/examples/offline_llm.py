"""Routes of ``vllm.LLM`` in a script: no server, and the traces at hand after ``generate``.

``python offline_llm.py [MODEL]``, the bundled model by default.
"""

import os
import sys

os.environ["MOESCOPE_ENABLE"] = "1"  # before the LLM is made

from vllm import LLM, SamplingParams

from moescope_service import bundled_model, offline

PROMPTS = ["Tom has 3 apples and buys 4. How many has he now?", "Sara walks 2 km a day for 5 days."]


def main() -> None:
    """Generate two samples a prompt, and print what their routes hold."""
    model = sys.argv[1] if len(sys.argv) > 1 else str(bundled_model.path())
    llm = LLM(model, max_model_len=512, enforce_eager=True)
    outputs = llm.generate(PROMPTS, SamplingParams(n=2, seed=1, max_tokens=32))
    for output, traces in zip(outputs, offline.routes(llm, outputs), strict=True):
        for choice, trace in zip(output.outputs, traces, strict=True):
            print(
                f"request {output.request_id}, choice {choice.index}: "
                f"{len(output.prompt_token_ids)} + {len(choice.token_ids)} tokens, "
                f"routes {list(trace.topk_ids.shape)}, complete: {trace.complete}"
            )


if __name__ == "__main__":  # vLLM may start processes that import this file
    main()
