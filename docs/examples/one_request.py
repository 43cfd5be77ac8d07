"""Ask one question and fetch its routes: which experts took each token, with which weights."""

import os

import openai

import moescope

URL = os.environ.get("MOESCOPE_URL", "http://localhost:8000")
QUESTION = (
    "Zoe makes 37 cups of tea and 9 cups of juice for a party. "
    "The guests drink 26 cups. How many cups are left?"
)

server = openai.OpenAI(base_url=f"{URL}/v1", api_key="none")
with moescope.Client(URL) as client:
    response = server.chat.completions.create(
        model=client.info().model,
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=64,
        temperature=0,
    )
    (trace,) = client.routes(response.id)

print(response.choices[0].message.content)
print(f"{trace.num_tokens} tokens, {trace.prompt_len} of the prompt; complete: {trace.complete}")
print(f"{trace.num_layers} layers, {trace.top_k} of {trace.num_experts} experts a token and layer")
print("The last routed token:")
for layer, experts, weights in zip(
    trace.layers, trace.topk_ids[-1], trace.topk_weights[-1], strict=True
):
    chosen = sorted(zip(weights, experts, strict=True), reverse=True)
    print(f"  layer {layer}: " + ", ".join(f"expert {e} ({w:.3f})" for w, e in chosen))
