"""Runs as the demo would have seen them, made up with fixed times."""

from prefixcache.types import Ledger
from prefixcache_worker.demo.record import Attempt, Death, Request, Run

SYSTEM = tuple(range(1000, 2000))


def request(name, worker, sent_s, ttft_s, ledger, *, question, answer=(5, 6, 7), **known):
    prompt = SYSTEM + tuple(question)
    made = Request(name, name.split("/")[0], 0, "bicycle", prompt, len(SYSTEM), worker, sent_s)
    made.granted_s, made.first_s, made.done_s = sent_s + 0.01, sent_s + ttft_s, sent_s + ttft_s + 1
    made.ledger, made.num_computed = ledger, len(prompt) - ledger.reused
    made.answer, made.text = list(answer), "Thank you for\ntelling us."
    for key, value in known.items():
        setattr(made, key, value)
    return made


def shared_run():
    requests = [
        request("a/1", "w1", 0.0, 1.2, Ledger(cold=1004), question=(1, 2, 3, 4), alone=True),
        request("b/1", "w2", 3.0, 0.1, Ledger(hit=992, partial=8, cold=4), question=(9, 2, 3, 4)),
        request("c/1", "w1", 3.1, 1.0, Ledger(joined=1000, cold=4), question=(8, 2, 3, 4)),
        request("d/1", "w1", 4.0, 0.8, Ledger(joined=512, cold=492), question=(7, 2, 3, 4)),
    ]
    requests[1].alone = True
    requests[3].took_over = True
    for made in requests:  # c/1 and d/1 decoded side by side
        made.kv_alone_bytes = 1_000_000
        made.beside = made.id[0] in "cd"
        made.kv_read_bytes = 500_000 if made.beside else 1_000_000
    attempts = (Attempt("d/1", "w2", 4.0, 4.5, 1004, 0, 256, 0),)
    death = Death("w2", 99, 4.5, True, 1, 40, 32, 7.0, 12.0, "w1", "d/1", attempts)
    return Run(
        shared=True,
        requests=requests,
        workers=["w1", "w2"],
        death=death,
        seconds=6.0,
        num_blocks=1000,
        block_size=16,
        block_bytes=16 * 46080,
        blocks_used=66,
    )


def unshared_run():
    requests = [
        request(r.id, "w1", 0.0, 1.5, Ledger(), question=r.prompt[-4:])
        for r in shared_run().requests
    ]
    return Run(shared=False, requests=requests, workers=["w1", "w2"], seconds=9.0)
