import random

from prefixcache.types import pack
from prefixcache_worker.demo.ideal import Sequenced, common_prefix, ideal_tokens, num_blocks


def naive_ideal(requests):
    """Every position of every stored sequence as one tuple: the definition, written out."""
    known: set[tuple[int, ...]] = set()
    total = 0
    for request in requests:
        prompt = request.prompt
        missing = sum(prompt[: i + 1] not in known for i in range(len(prompt)))
        total += max(1, missing)
        stored = prompt + request.answer[:-1]
        known |= {stored[: i + 1] for i in range(len(stored))}
    return total


def naive_blocks(requests, block_size):
    """Whole blocks are named by all tokens before their end; a last one belongs to a leaf."""
    stored = {request.prompt + request.answer[:-1] for request in requests}
    leaves = {s for s in stored if not any(o != s and o[: len(s)] == s for o in stored)}
    blocks = {s[:i] for s in stored for i in range(block_size, len(s) + 1, block_size)}
    return len(blocks) + sum(len(leaf) % block_size > 0 for leaf in leaves)


def some_requests(rng):
    chats = []
    for _ in range(rng.randrange(1, 12)):
        if chats and rng.random() < 0.6:
            base = rng.choice(chats)
            start = (base.prompt + base.answer)[: rng.randrange(1, 30)]
        else:
            start = ()
        prompt = start + tuple(rng.choices(range(2), k=rng.randrange(1, 9)))
        chats.append(Sequenced(prompt, tuple(rng.choices(range(3), k=rng.randrange(1, 6)))))
    return chats


def test_common_prefix_counts_whole_tokens_only():
    assert common_prefix(pack([1, 2]), pack([])) == 0
    assert common_prefix(pack([256]), pack([512])) == 0
    assert common_prefix(pack([5, 0x0101]), pack([5, 0x0201])) == 1
    assert common_prefix(pack([1, 2, 3]), pack([1, 2, 3])) == 3


def test_the_ideal_equals_its_definition_on_random_chats():
    rng = random.Random(1)
    for _ in range(300):
        requests = some_requests(rng)
        assert ideal_tokens(requests) == naive_ideal(requests)


def test_the_number_of_blocks_equals_its_definition_on_random_chats():
    rng = random.Random(2)
    for _ in range(300):
        requests = some_requests(rng)
        for block_size in (1, 2, 4):
            assert num_blocks(requests, block_size) == naive_blocks(requests, block_size)


def test_a_prompt_that_is_all_known_still_computes_one_token():
    request = Sequenced((1, 2, 3), (4, 5))
    assert ideal_tokens([request, request]) == 4
