"""Rounds of given values, and rounds on servers that answer by a script."""

import orjson
from stream_server import DONE, delta, serving, usage

from moescope.overhead import comparison, hosting, rounds
from moescope.overhead.arms import MOESCOPE, STOCK, STOCK_AGAIN
from moescope.overhead.rounds import Load, Pass, Round
from moescope.replay import ReplayOptions

OPTIONS = ReplayOptions(model="demo", concurrency=1)


def made(value, *, token_ids=((1,),), **metrics):
    return Pass(
        wall_s=value,
        prompt_tokens=1,
        completion_tokens=1,
        metrics={**dict.fromkeys(comparison.METRICS, value), **metrics},
        token_ids=[list(one) if one else None for one in token_ids],
    )


def paired(**by_arm):
    """Rounds of arms whose values are given round by round; the first arm's are 1."""
    names = {"stock": STOCK, "again": STOCK_AGAIN, "moescope": MOESCOPE}
    count = len(next(iter(by_arm.values())))
    values = {"stock": [0.0] * count, **by_arm}
    return [
        Round(
            order=tuple(names[name] for name in values),
            passes={names[n]: made(1.0 + percents[i] / 100) for n, percents in values.items()},
        )
        for i in range(count)
    ]


def chat(token_ids=(1, 2)):
    return [
        (0, delta(content="a")),
        (0, chunk_of(token_ids)),
        (0, usage(3, 2) + DONE),
    ]


def chunk_of(token_ids):
    values = orjson.loads(delta(content="b")[6:])
    values["choices"][0]["token_ids"] = list(token_ids)
    return b"data: " + orjson.dumps(values) + b"\n\n"


def measure(names, scripts=None, *, count=3, prompts=("x", "y"), **hooks):
    servers, done = measure_loads(
        names, [Load.of_prompts(prompts, OPTIONS)], scripts, count=count, **hooks
    )
    return servers, [item for (item,) in done]


def measure_loads(names, loads, scripts=None, *, count=1, **hooks):
    with serving_all(names, scripts or {}) as (servers, urls):
        done = list(
            rounds.measure(
                loads, hosting.SideBySide(urls), list(names),
                rounds=count, seed=0, hooks=rounds.Hooks(**hooks),
            )
        )  # fmt: skip
    return servers, done


class serving_all:  # noqa: N801
    def __init__(self, names, scripts):
        self.contexts = {
            name: serving(scripts.get(name, lambda number, body: chat())) for name in names
        }

    def __enter__(self):
        servers = {name: context.__enter__() for name, context in self.contexts.items()}
        return servers, {name: one.url for name, one in servers.items()}

    def __exit__(self, *error):
        for context in self.contexts.values():
            context.__exit__(*error)
