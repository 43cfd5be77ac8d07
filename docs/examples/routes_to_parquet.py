"""Send many prompts at once, write their routes to routes.parquet, and query that with DuckDB.

``python routes_to_parquet.py [NUM_PROMPTS]``, 200 by default.
"""

import os
import sys
from concurrent.futures import ThreadPoolExecutor

import duckdb
import openai
from pyarrow import parquet

import moescope
from moescope import arrow

URL = os.environ.get("MOESCOPE_URL", "http://localhost:8000")
NUM_PROMPTS = int(sys.argv[1]) if len(sys.argv) > 1 else 200
PROMPTS = [f"Tom has {n + 2} apples and buys {n % 9 + 1}. How many?" for n in range(NUM_PROMPTS)]
# The file has one row a token. Lists begin at 1 in SQL: topk_ids[1] are the first layer's experts.
QUERY = """
SELECT expert,
       count(*) FILTER (is_prompt) AS prompt, count(*) FILTER (NOT is_prompt) AS output
FROM (SELECT unnest(topk_ids[1]) AS expert, is_prompt FROM 'routes.parquet')
GROUP BY expert ORDER BY count(*) DESC, expert LIMIT 5
"""

server = openai.OpenAI(base_url=f"{URL}/v1", api_key="none")
with moescope.Client(URL) as client:
    model = client.info().model
    with ThreadPoolExecutor(16) as pool:
        complete = server.completions.create
        running = [pool.submit(complete, model=model, prompt=p, max_tokens=32) for p in PROMPTS]
    # One call fetches the routes of up to 1,024 requests.
    batch = client.routes_batch([one.result().id for one in running])

traces = [trace for found in batch.traces.values() for trace in found]
parquet.write_table(arrow.to_table(traces), "routes.parquet")
rows = sum(trace.num_rows for trace in traces)
print(f"{len(traces)} sequences, {rows:,} routed tokens: routes.parquet; failed: {batch.failed}")
print("The busiest experts of the first layer:")
for expert, prompt, output in duckdb.sql(QUERY).fetchall():
    print(f"  expert {expert}: selected by {prompt} tokens of prompts, {output} of outputs")
